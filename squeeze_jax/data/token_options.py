"""Applies the options of tokenizer_config.json that change token ids to a tokenizer, as `transformers` 5.23 does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from squeeze_jax.data import tokenizer
from squeeze_jax.errors import UserError, shortened

# These classes of `transformers` use a tokenizer.json as it is.
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
    """Raises a UserError if one of the options in `FLAGS` is not true, false or null."""
    for name in FLAGS:
        if not isinstance(config.get(name), bool | None):
            raise UserError(
                f"{folder}/tokenizer_config.json: {name} = {shortened(repr(config[name]), 60)} should be true or false"
            )


def adapt(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named, where: Path
) -> tokenizers.Tokenizer:
    """Returns the backend from a tokenizer.json with the options of the tokenizer_config.json next to it applied.

    Args:
      backend: the tokenizer in tokenizer.json; may be changed in place.
      config: the content of tokenizer_config.json. If "tokenizer_class" is one of `GENERIC`, the backend stays unchanged.
      named: the special tokens that `config` names, {role: token}.
      where: the path of tokenizer.json, for errors.

    Raises:
      UserError: the config has an option that this backend cannot follow.
    """
    if config.get("tokenizer_class") in GENERIC:
        return backend
    backend = _with_token_flags(backend, config, where)
    content = json.loads(backend.to_str())
    kind = content["model"].get("type")
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        _normalize(backend, config)
    elif kind != "BPE":  # the classes of BPE tokenizers ignore these options
        _check_normalizer(content["normalizer"], config, where)
    space = config.get("add_prefix_space")
    if space is not None and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        backend.pre_tokenizer.add_prefix_space = space
    if kind == "WordPiece":
        _set_special_tokens(backend, named, where)
    return backend


def _with_token_flags(backend, config, where) -> tokenizers.Tokenizer:
    """Returns the backend whose added tokens match text by the flags in "added_tokens_decoder", such as "lstrip"."""
    flags = {token.content: token for token in _decoder_tokens(config, where)}
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] in flags:
            for name in TOKEN:
                token[name] = getattr(flags[token["content"]], name)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def add(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named, where) -> None:
    """Adds the tokens of a tokenizer_config.json to a backend, in place, and applies its options about special tokens.

    The option "split_special_tokens" makes special tokens within a text plain text. "add_bos_token" and "add_eos_token" put a
    token before and after each text, unless the backend has its own template for sequences.

    Args:
      backend: changed in place.
      config, named, where: see `adapt`.

    Raises:
      UserError: an entry is not a token, or the vocabulary lacks the token to put around texts.
    """
    present = {t.content for t in backend.get_added_tokens_decoder().values()}
    new = {}
    for token in _added_tokens(config, named, where):
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
    """Makes the backend put its "bos" and "eos" tokens around each text, if the config asks for them."""
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


def _check_normalizer(normalizer, config, where) -> None:
    text = json.dumps(normalizer)
    for name, has in (
        ("do_lower_case", '"Lowercase"' in text),
        ("keep_accents", '"StripAccents"' not in text),
    ):
        if config.get(name) not in (None, has):
            raise UserError(
                f"{where}: {name} = {json.dumps(config[name])} beside it contradicts its normalizer: save the tokenizer again"
            )


def _set_special_tokens(backend, named, where) -> None:
    """Makes a BERT tokenizer use the unknown token, the "cls" and the "sep" token that the config names."""
    if "unknown" in named:
        backend.model.unk_token = named["unknown"]
    if not {"cls", "sep"} & named.keys():
        return
    cls_and_sep = [named.get("cls", "[CLS]"), named.get("sep", "[SEP]")]
    cls, sep = cls_and_sep
    ids = [backend.token_to_id(token) for token in cls_and_sep]
    if None in ids:
        lacking = cls_and_sep[ids.index(None)]
        raise UserError(
            f"{where} lacks the token {lacking!r} that tokenizer_config.json names"
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=list(zip(cls_and_sep, ids, strict=True)),
    )


def _added_tokens(config, named, where) -> Iterator[tokenizers.AddedToken]:
    """Yields the tokens that a configuration adds, in the order in which `transformers` numbers them."""
    yield from _decoder_tokens(config, where)
    for role in named:
        entry = config[tokenizer.ROLES[role][0]]
        yield _parse_token(
            entry | {"special": True} if isinstance(entry, dict) else entry, where
        )
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name) or ()
        for token in extra.values() if isinstance(extra, dict) else extra:
            yield _parse_token(token, where)


def _decoder_tokens(config, where) -> Iterator[tokenizers.AddedToken]:
    """Yields the tokens of "added_tokens_decoder", in the order of their ids."""
    numbered = config.get("added_tokens_decoder") or {}
    try:
        numbered = sorted((int(id), token) for id, token in numbered.items())
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{where}: added_tokens_decoder beside it should be {{id: token}}"
        ) from None
    for _, token in numbered:
        yield _parse_token(token, where)


def _parse_token(token, where) -> tokenizers.AddedToken:
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
