"""Builds tokenizers as the classes of `transformers` 5.23 do, from a vocabulary and the options in the files beside it.

Of a tokenizer.json, most classes take the vocabulary alone. Where another part of the file differs from what the class builds,
and no option explains the difference, the file is not read.
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, processors

from squeeze_jax.data import token_options, tokenizer
from squeeze_jax.data.token_classes import GENERIC, KINDS, Class
from squeeze_jax.data.token_options import CONFIG, NAMES, Options
from squeeze_jax.data.tokenizer import BERT, ROLES
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)

# {field of a tokenizer.json: the option of tokenizer_config.json that sets it}
_OPTION_OF = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
    "add_prefix_space": "add_prefix_space",
    "prepend_scheme": "add_prefix_space",
    "unk_token": "unk_token",
    "Lowercase": "do_lower_case",
    "NFKD": "keep_accents",
    "StripAccents": "keep_accents",
}


def backend(
    kind: str, model, options: Options, lower: bool = True
) -> tokenizers.Tokenizer:
    """Returns the backend of one of the `KINDS` around a model, without added tokens.

    Args:
      kind: "bert", "roberta" or "gpt2".
      model: a model of the library `tokenizers`.
      options: see `token_options`.
      lower: whether a tokenizer like BERT's lower-cases text if the options do not tell.
    """
    values = options.values
    if kind != "bert":
        space = values.get("add_prefix_space", False)
        return tokenizer.byte_level_backend(model, space)
    return tokenizer.bert_backend(
        model,
        values.get("do_lower_case", lower),
        values.get("strip_accents"),
        values.get("tokenize_chinese_chars", True),
    )


def rebuild(
    stored: tokenizers.Tokenizer, found: Class, options: Options, where: Path
) -> tokenizers.Tokenizer:
    """Returns the backend that a class builds from the vocabulary in a tokenizer.json, without added tokens.

    Args:
      stored: the tokenizer in the file.
      found: the class; "generic" leaves `stored` unchanged.
      options: see `token_options`.
      where: the path of the file, for errors.

    Raises:
      UserError: the file has another model, normalizer or pre-tokenizer than the class, which no option explains.
    """
    if found.kind == "generic":
        return stored
    content = json.loads(stored.to_str())
    parts = _parts(found.kind, content, options)
    given = {name for name in options.values if name in _OPTION_OF.values()}
    if "unk_token" in options.named:
        given.add("unk_token")
    for part, expected in parts.items():
        _compare(part, content[part], expected, given, found, where)
        vocabulary = content[part] if part == "model" else {}
        content[part] = {**vocabulary, **expected} if expected else None
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))


def builds(
    found: Class,
    saved: tokenizer.Tokenizer,
    values: dict[str, Any],
    named: dict[str, str | None],
) -> bool:
    """Tells whether a class builds a tokenizer from its vocabulary, options and special tokens.

    Args:
      found: the class.
      saved: the tokenizer.
      values, named: see `token_options.Options`.
    """
    numbered = saved.backend.get_added_tokens_decoder()
    added = {token.content for token in numbered.values()}
    if not {text for text in named.values() if text is not None} <= added:
        return False
    options = Options(values, named, numbered, [], Path())
    try:
        made = rebuild(saved.backend, found, options, Path())
        again = finish(made, found.kind, options, Path())
    except UserError:
        return False
    return all(
        of(again) == of(saved)
        for of in (
            lambda made: (made.single_template, made.pair_template),
            lambda made: [getattr(made, role) for role in ROLES],
            lambda made: getattr(made.backend.model, "unk_token", None),
            lambda made: made.backend.get_vocab(),
            lambda made: repr(made.backend.get_added_tokens_decoder()),
        )
    )


def _parts(kind: str, content: Mapping, options: Options) -> dict[str, Any]:
    """Returns the model without its vocabulary, the normalizer and the pre-tokenizer of a class, as in a tokenizer.json."""
    if kind in ("bert", "roberta", "gpt2"):
        unknown = options.content("unk_token") or BERT["unknown"]
        model = (
            models.WordPiece({}, unk_token=unknown)
            if kind == "bert"
            else models.BPE({}, [], continuing_subword_prefix="", end_of_word_suffix="")
        )
        parts = json.loads(backend(kind, model, options).to_str())
        del parts["model"]["vocab"]
        parts["model"].pop("merges", None)
    else:
        parts = {
            "model": {"type": "Unigram", "unk_id": 1, "byte_fallback": False},
            "normalizer": _unigram_normalizer(kind, content, options.values),
            "pre_tokenizer": _unigram_pre_tokenizer(options.values),
        }
        if kind == "xlm-roberta":
            parts["model"]["unk_id"] = 3
    return {part: parts[part] for part in ("model", "normalizer", "pre_tokenizer")}


def _unigram_normalizer(kind: str, content: Mapping, values: Mapping) -> dict:
    """Returns the normalizer of ALBERT or XLM-RoBERTa, with the table of characters from the tokenizer.json."""
    steps = []
    if kind == "albert":
        steps += [
            {"type": "Replace", "pattern": {"String": quotes}, "content": '"'}
            for quotes in ("``", "''")
        ]
        if not values.get("keep_accents", False):
            steps += [{"type": "NFKD"}, {"type": "StripAccents"}]
        if values.get("do_lower_case", True):
            steps += [{"type": "Lowercase"}]
    table = [s for s in _steps(content["normalizer"]) if s["type"] == "Precompiled"]
    return {"type": "Sequence", "normalizers": steps + table[:1]}


def _unigram_pre_tokenizer(values: Mapping) -> dict:
    scheme = "always" if values.get("add_prefix_space", True) else "never"
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}
    steps = [{"type": "WhitespaceSplit"}, mark | {"split": True}]
    return {"type": "Sequence", "pretokenizers": steps}


def _steps(part: Mapping | None) -> list[dict]:
    """Returns the steps of a normalizer or a pre-tokenizer, or [the model]."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    steps = part.get("normalizers", part.get("pretokenizers"))
    return [step for each in steps for step in _steps(each)]


def _compare(
    part: str,
    stored: Mapping | None,
    expected: Mapping | None,
    given: Collection[str],
    found: Class,
    where: Path,
) -> None:
    """Raises a UserError if a tokenizer.json has another part than its class builds, unless an option asks for that part."""
    as_it_is = f'"tokenizer_class": "{GENERIC}" in {CONFIG} uses the file as it is'
    stored, expected = (
        [s for s in _steps(steps) if not _counts_elsewhere(s, given)]
        for steps in (stored, expected)
    )
    words = {"type": "WhitespaceSplit"}
    if words in expected and words not in stored:  # as version 4 saved them
        expected.remove(words)
        log.warning(
            "%s: text is divided at white space first, as %s of transformers 5 does; %s",
            where,
            found.name,
            as_it_is,
        )
    kinds = [[step["type"] for step in steps] for steps in (stored, expected)]
    if kinds[0] != kinds[1]:
        has, takes = (", ".join(names) or "none" for names in kinds)
        raise UserError(
            f"{where}: its {part} is {has}, but {found.name} takes {takes}: {as_it_is}"
        )
    for old, new in zip(stored, expected, strict=True):
        for field in new:
            if _OPTION_OF.get(field) in given or field == "trim_offsets":
                continue
            has, takes = old.get(field), new[field]
            if has == takes or (has in (None, "") and takes in (None, "")):
                continue
            if field == "strip_accents" and _strips(old) == _strips(new):
                continue
            option = _OPTION_OF.get(field)
            fix = f"set {option} in {CONFIG}, or " if option else ""
            raise UserError(
                f"{where}: its {part} has {field} = {json.dumps(has)}, but {found.name} takes {json.dumps(takes)}: {fix}{as_it_is}"
            )


def _strips(normalizer: Mapping) -> bool:
    """Tells whether a normalizer like BERT's removes accents."""
    strips = normalizer["strip_accents"]
    return normalizer["lowercase"] if strips is None else strips


def _counts_elsewhere(step: Mapping, given: Collection[str]) -> bool:
    """Tells whether a step is set by a given option, or changes nothing: words are split at each space anyway."""
    return _OPTION_OF.get(step["type"]) in given or (
        step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}
    )


def finish(
    made: tokenizers.Tokenizer, kind: str, options: Options, where: Path
) -> tokenizer.Tokenizer:
    """Adds tokens to a backend and returns the tokenizer that puts the special tokens of its class around texts.

    Special tokens that the vocabulary lacks become new tokens, and a warning names them.

    Args:
      made: changed in place.
      kind: a key of `KINDS`.
      options: see `token_options`.
      where: the file of the vocabulary, for errors.

    Raises:
      UserError: the vocabulary lacks a special token and the files name no other.
    """
    options = _with_defaults(made, kind, options, where)
    _add_tokens(made, options, where)
    made.encode_special_tokens = options.values.get("split_special_tokens", False)
    ends = {"add_bos_token", "add_eos_token"} & options.values.keys()
    if kind in ("gpt2", "generic", "albert") and ends:
        _put_ends_around(made, options)
    elif kind == "bert" or (kind == "albert" and made.post_processor is None):
        cls, sep = (_needed(options, name) for name in ("cls_token", "sep_token"))
        tokenizer.put_around_like_bert(made, cls, sep)
    elif kind == "roberta":
        cls, sep = (_needed(options, name) for name in ("cls_token", "sep_token"))
        space = options.values.get("add_prefix_space", False)
        trim = options.values.get("trim_offsets", True)
        tokenizer.put_around_like_roberta(made, cls, sep, space=space, trim=trim)
    elif kind == "xlm-roberta":
        cls, sep = (_needed(options, name) for name in ("bos_token", "eos_token"))
        tokenizer.put_around_like_roberta(made, cls, sep, trim=False)
    special = {role: options.content(name) for role, (name, _) in ROLES.items()}
    if kind == "generic":
        for role, (name, usual) in ROLES.items():
            present = [t for t in usual if made.token_to_id(t) is not None]
            if name not in options.named and present:
                special[role] = present[0]
    special = {role: token for role, token in special.items() if token is not None}
    side = options.values.get("truncation_side", "right")
    return tokenizer.wrap(made, special, side)


def _with_defaults(
    made: tokenizers.Tokenizer, kind: str, options: Options, where: Path
) -> Options:
    """Returns options with the special tokens of the class; raises a UserError if the vocabulary lacks one of them."""
    row, numbered = KINDS[kind], {t.content for t in options.numbered.values()}
    lacking = [
        row.special[name]
        for name in row.required
        if name not in options.named
        and made.token_to_id(row.special[name]) is None
        and row.special[name] not in numbered
    ]
    if lacking:
        raise UserError(
            f"{where} lacks the special tokens {', '.join(dict.fromkeys(lacking))}: if they have other names, {CONFIG} beside it"
            " says so"
        )
    tokens = row.special | options.named
    ordered = {name: tokens[name] for name in NAMES if name in tokens}
    options = options._replace(named=ordered | tokens)
    for name in row.fixed:
        text = _needed(options, name)
        if made.model.token_to_id(text) is None:
            raise UserError(
                f"{where} lacks the token {text!r} that {CONFIG} beside it names as its {name}"
            )
    return options


def _needed(options: Options, name: str) -> str:
    text = options.content(name)
    if text is None:
        raise UserError(
            f"{options.where}: {name} = null, but tokenizers of this class need one: name a token, or remove the line"
        )
    return text


def _add_tokens(made: tokenizers.Tokenizer, options: Options, where: Path) -> None:
    numbered = {token.content for token in options.numbered.values()}
    texts = dict.fromkeys(options.content(name) for name in options.named)
    lacking = [
        text
        for text in texts
        if text and made.token_to_id(text) is None and text not in numbered
    ]
    made.add_tokens(token_options.added_tokens(options, made))
    moved = [
        f"{token.content} = {made.token_to_id(token.content)}, not {id}"
        for id, token in sorted(options.numbered.items())
        if made.token_to_id(token.content) != id
    ]
    if moved:
        log.warning(
            "%s: %d added tokens have other ids than the files beside it say, because ids go on from the vocabulary's last: %s%s",
            where,
            len(moved),
            "; ".join(moved[:3]),
            "; ..." if len(moved) > 3 else "",
        )
    if lacking:
        log.warning(
            "%s lacks special tokens, which become new tokens at its end: %s; a name that is null in %s has no token",
            where,
            ", ".join(f"{text} = {made.token_to_id(text)}" for text in lacking),
            CONFIG,
        )


def _put_ends_around(made: tokenizers.Tokenizer, options: Options) -> None:
    """Makes a backend put its "bos" and "eos" tokens around each text, if the options ask for them."""
    around, ids = {}, {}
    for name in "bos", "eos":
        token = options.content(f"{name}_token")
        if options.values.get(f"add_{name}_token") and token is not None:
            around[name], ids[token] = token, made.token_to_id(token)
    first, second = (
        " ".join(
            f"{part}:{segment}"
            for part in (around.get("bos"), text, around.get("eos"))
            if part
        )
        for segment, text in enumerate(("$A", "$B"))
    )
    made.post_processor = processors.TemplateProcessing(
        single=first, pair=f"{first} {second}", special_tokens=list(ids.items())
    )


def check_unnamed(stored: tokenizers.Tokenizer, options: Options, where: Path) -> None:
    """Checks that the options beside a tokenizer.json agree with it where no file tells the tokenizer's class.

    Raises:
      UserError: an option or a special token contradicts the file.
    """
    content = json.loads(stored.to_str())
    steps = _steps(content["normalizer"]) + _steps(content["pre_tokenizer"])
    types = {step["type"] for step in steps}
    has = {}
    if "BertNormalizer" not in types and content["model"]["type"] != "BPE":
        has["do_lower_case"] = "Lowercase" in types
        has["keep_accents"] = "StripAccents" not in types
    for step in steps:
        for field in step.keys() & _OPTION_OF.keys():
            is_scheme = field == "prepend_scheme"
            value = step[field] != "never" if is_scheme else step[field]
            has[_OPTION_OF[field]] = value
    wanted = options.values | {"unk_token": options.content("unk_token")}
    if content["model"].get("unk_token") is not None:
        has["unk_token"] = content["model"]["unk_token"]
    for name, value in has.items():
        if wanted.get(name) not in (None, value):
            raise UserError(
                f"{where}: {name} = {json.dumps(wanted[name])} beside it contradicts the file, which has {json.dumps(value)}: name"
                f' its class in {CONFIG}, such as "tokenizer_class": "BertTokenizer"'
            )
