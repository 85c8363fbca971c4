"""Options of tokenizer_config.json that change ids, put into a backend as `transformers` 5.23 does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from squeeze_jax.data import tokenizer
from squeeze_jax.errors import UserError, shortened

# These classes of `transformers` take a tokenizer.json as it is.
GENERIC = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
FLAGS = [
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "add_prefix_space",
    "split_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "keep_accents",
    "trim_offsets",
]
TOKEN = ("single_word", "lstrip", "rstrip", "normalized")


def check(config: Mapping[str, Any], folder: Path) -> None:
    """Raises a UserError for an option of another type than true, false or null."""
    for name in FLAGS:
        if not isinstance(config.get(name), bool | None):
            raise UserError(
                f"{folder}/tokenizer_config.json: {name} = {shortened(repr(config[name]), 60)} should be true or false"
            )


def adapt(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named, where: Path
) -> tokenizers.Tokenizer:
    """Returns the backend of a tokenizer.json that splits text as the options beside the file say.

    Args:
      backend: of tokenizer.json; may be changed in place.
      config: of tokenizer_config.json. A generic "tokenizer_class" takes the backend as it is.
      named: {role: token} of its special tokens.
      where: tokenizer.json.

    Raises:
      UserError: an option that cannot be put into this backend.
    """
    if config.get("tokenizer_class") in GENERIC:
        return backend
    backend = _with_flags(backend, config, where)
    content = json.loads(backend.to_str())
    kind = content["model"].get("type")
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        _normalize(backend, config)
    elif kind != "BPE":  # whose classes ignore these options
        _demand_same(content["normalizer"], config, where)
    space = config.get("add_prefix_space")
    if space is not None and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        backend.pre_tokenizer.add_prefix_space = space
    if kind == "WordPiece":
        _rename(backend, named, where)
    return backend


def _with_flags(backend, config, where) -> tokenizers.Tokenizer:
    """Returns the backend with its added tokens matched as "added_tokens_decoder" says, such as with the space before."""
    flags = {token.content: token for token in _numbered(config, where)}
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] in flags:
            for name in TOKEN:
                token[name] = getattr(flags[token["content"]], name)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def add(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named, where) -> None:
    """Adds the tokens that a tokenizer_config.json names, sets whether text may hold special tokens, and what stands around it.

    Args:
      backend: changed in place.
      config, named, where: see `adapt`.

    Raises:
      UserError: an entry that is no token, or a token for the ends of texts that the vocabulary lacks.
    """
    present = {t.content for t in backend.get_added_tokens_decoder().values()}
    new = {}
    for token in _tokens(config, named, where):
        if token.content not in present:
            new.setdefault(token.content, token)
    backend.add_tokens(list(new.values()))
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    ends = [config.get(name) for name in ("add_bos_token", "add_eos_token")]
    plain = backend.post_processor is None or isinstance(
        backend.post_processor, processors.ByteLevel
    )
    if plain and any(ends):
        _surround(backend, config, where)


def _surround(backend, config, where) -> None:
    """Puts the tokens that begin and end a text around each text."""
    around, ids = {}, {}
    for name in "bos", "eos":
        around[name] = ""
        token = config.get(f"{name}_token", tokenizer.END)
        token = token.get("content") if isinstance(token, dict) else token
        if not config.get(f"add_{name}_token") or token is None:
            continue
        around[name], ids[token] = token, backend.token_to_id(token)
        if ids[token] is None:
            raise UserError(
                f"{where} lacks the token {token!r} that add_{name}_token = true beside it puts around texts"
            )
    first, second = (
        " ".join(
            f"{part}:{segment}" for part in (around["bos"], text, around["eos"]) if part
        )
        for segment, text in enumerate(("$A", "$B"))
    )
    backend.post_processor = processors.TemplateProcessing(
        single=first, pair=f"{first} {second}", special_tokens=list(ids.items())
    )


def _normalize(backend, config) -> None:
    old = backend.normalizer
    lower, chinese = (
        getattr(old, ours) if config.get(theirs) is None else config[theirs]
        for ours, theirs in (
            ("lowercase", "do_lower_case"),
            ("handle_chinese_chars", "tokenize_chinese_chars"),
        )
    )
    accents = config.get("strip_accents", old.strip_accents)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=old.clean_text,
        handle_chinese_chars=chinese,
        strip_accents=accents,
        lowercase=lower,
    )


def _demand_same(normalizer, config, where) -> None:
    text = json.dumps(normalizer)
    for name, has in (
        ("do_lower_case", '"Lowercase"' in text),
        ("keep_accents", '"StripAccents"' not in text),
    ):
        if config.get(name) not in (None, has):
            raise UserError(
                f"{where}: {name} = {json.dumps(config[name])} beside it contradicts its normalizer: save the tokenizer again"
            )


def _rename(backend, named, where) -> None:
    """Puts a BERT tokenizer's unknown token and its tokens around texts at their places."""
    if "unknown" in named:
        backend.model.unk_token = named["unknown"]
    if not {"cls", "sep"} & named.keys():
        return
    around = [named.get("cls", "[CLS]"), named.get("sep", "[SEP]")]
    cls, sep = around
    ids = [backend.token_to_id(token) for token in around]
    if None in ids:
        lacking = around[ids.index(None)]
        raise UserError(
            f"{where} lacks the token {lacking!r} that tokenizer_config.json names"
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=list(zip(around, ids, strict=True)),
    )


def _tokens(config, named, where) -> Iterator[tokenizers.AddedToken]:
    """The tokens that a configuration adds, in the order in which `transformers` numbers them."""
    yield from _numbered(config, where)
    for role in named:
        entry = config[tokenizer.ROLES[role][0]]
        yield _token(
            entry | {"special": True} if isinstance(entry, dict) else entry, where
        )
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name) or ()
        for token in extra.values() if isinstance(extra, dict) else extra:
            yield _token(token, where)


def _numbered(config, where) -> Iterator[tokenizers.AddedToken]:
    """The tokens of "added_tokens_decoder", in the order of their ids."""
    numbered = config.get("added_tokens_decoder") or {}
    try:
        numbered = sorted((int(id), token) for id, token in numbered.items())
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{where}: added_tokens_decoder beside it should be {{id: token}}"
        ) from None
    for _, token in numbered:
        yield _token(token, where)


def _token(token, where) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(
            f"{where}: the added token {shortened(repr(token), 60)} beside it has no content"
        )
    special = bool(token.get("special", False))
    flags = {
        name: bool(token[name]) for name in TOKEN if isinstance(token.get(name), bool)
    }
    return tokenizers.AddedToken(token["content"], special=special, **flags)
