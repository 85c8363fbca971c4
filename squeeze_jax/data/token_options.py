"""Reads the files beside a vocabulary that change token ids, with the precedence that `transformers` 5.23 gives them.

The files are tokenizer_config.json, special_tokens_map.json and added_tokens.json. If tokenizer_config.json has
"added_tokens_decoder", the other two are not read. Otherwise special_tokens_map.json takes precedence over
tokenizer_config.json.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.files import parse_json

log = logging.getLogger(__name__)

CONFIG, SPECIAL, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
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
SIDES = ("truncation_side", "padding_side")
# The special tokens, in the order in which new ones are numbered.
NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
TOKEN = ("single_word", "lstrip", "rstrip", "normalized")
Token = str | tokenizers.AddedToken


class Options(NamedTuple):
    """The options of a tokenizer.

    Attributes:
      values: {name: value} of the options that are not tokens; those that are null are left out.
      named: {name: token} of the special tokens, such as "cls_token"; None for those that the files set to null.
      numbered: {id: token} of the tokens that the files add by number.
      extra: further special tokens.
      where: the path of tokenizer_config.json, for errors.
    """

    values: dict[str, Any]
    named: dict[str, Token | None]
    numbered: dict[int, tokenizers.AddedToken]
    extra: list[Token]
    where: Path

    def content(self, name: str) -> str | None:
        """Returns the text of a special token; None if the tokenizer has no such token."""
        token = self.named.get(name)
        return None if token is None else content(token)

    def has_flags(self, text: str) -> bool:
        """Tells whether the files say how a token matches text, such as whether it takes the space before it."""
        tokens = [*self.numbered.values(), *self.named.values(), *self.extra]
        flagged = [t for t in tokens if isinstance(t, tokenizers.AddedToken)]
        return any(token.content == text for token in flagged)


def content(token: Token) -> str:
    """Returns the text of a token."""
    return token if isinstance(token, str) else token.content


def read(folder: Path, stored: tokenizers.Tokenizer | None) -> Options:
    """Reads the options in the files of a folder.

    Args:
      folder: the folder of the vocabulary.
      stored: the tokenizer of the folder's tokenizer.json; None for a vocabulary in another file.

    Raises:
      UserError: a file is not JSON, or an option or a token has no valid value.
    """
    where = folder / CONFIG
    config = read_json(where) if where.is_file() else {}
    if stored is not None:  # its own template for sequences counts
        config.pop("add_bos_token", None)
        config.pop("add_eos_token", None)
        truncation, padding = stored.truncation or {}, stored.padding or {}
        config.setdefault("truncation_side", truncation.get("direction"))
        config.setdefault("padding_side", padding.get("direction"))
    if not config.get("extra_special_tokens"):
        extra = config.pop("additional_special_tokens", None)
        if extra is not None:
            config["extra_special_tokens"] = extra
    specific = config.pop("model_specific_special_tokens", None) or {}
    if not isinstance(specific, dict):
        raise UserError(
            f"{where}: model_specific_special_tokens should be {{name: token}}"
        )
    specific |= _pop_specific_tokens(config, str) | _pop_named_extra(config)
    if "added_tokens_decoder" in config:
        pairs = _parse_numbered(config["added_tokens_decoder"] or {}, where)
    else:
        pairs = []
        if (folder / SPECIAL).is_file():
            _merge_special(config, folder / SPECIAL)
            specific |= _pop_named_extra(config)
        if (folder / ADDED).is_file():
            pairs = _read_added(folder / ADDED, config)
        if stored is not None:
            pairs += stored.get_added_tokens_decoder().items()
    # Of two tokens with one number the last counts, but both keep their flags where they are named.
    by_content = {token.content: token for _, token in pairs}
    named = {name: config.pop(name) for name in NAMES if name in config}
    named |= _pop_specific_tokens(config, str | dict | tokenizers.AddedToken) | specific
    for name, token in named.items():
        token = None if token is None else _parse(token, where)
        if name in NAMES and token is not None:
            token = by_content.get(content(token), token)
        named[name] = token
    extra = config.pop("extra_special_tokens", None)
    if extra is None:
        extra = config.pop("additional_special_tokens", None)
    if not isinstance(extra, list | None):
        raise UserError(f"{where}: extra_special_tokens should be a list of tokens")
    values = {name: value for name, value in config.items() if value is not None}
    _check(values, where)
    return Options(
        values, named, dict(pairs), [_parse(t, where) for t in extra or ()], where
    )


def added_tokens(
    options: Options, backend: tokenizers.Tokenizer
) -> list[tokenizers.AddedToken]:
    """Returns the tokens to add to a backend, in the order in which `transformers` numbers those that are new."""
    present = backend.get_added_tokens_decoder().values()
    flags = {repr(token) for token in present}
    tokens: list[Token] = [
        token
        for _, token in sorted(options.numbered.items())
        if repr(token) not in flags
    ]
    known = {token.content for token in [*present, *tokens]}
    named = [token for token in options.named.values() if token is not None]
    for token in [*named, *options.extra]:
        if content(token) not in known and token not in tokens:
            tokens.append(token)
    texts = {content(token) for token in named}
    return [_marked(token, texts) for token in tokens]


def _marked(token: Token, named: set[str]) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if token.content in named:
        token.special = True
    return token


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file cannot be read, is not JSON, or holds no object.
    """
    try:
        value = parse_json(text_files.read_text(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _check(values: Mapping[str, Any], where: Path) -> None:
    """Raises a UserError if one of `FLAGS` is not true or false, or one of `SIDES` is not "left" or "right"."""
    for name in FLAGS:
        if not isinstance(values.get(name, True), bool):
            raise UserError(
                f"{where}: {name} = {shortened(repr(values[name]), 60)} should be true or false"
            )
    for name in values.get("fast_tokenizer_files", ()):
        if name != "tokenizer.json":
            raise UserError(
                f"{where}: fast_tokenizer_files names {shortened(repr(name), 60)}, which is not read: remove the line, and give that"
                " file the name tokenizer.json if it counts"
            )
    for name in SIDES:
        if values.get(name, "left") not in ("left", "right"):
            raise UserError(
                f'{where}: {name} = {shortened(repr(values[name]), 60)} should be "left" or "right"'
            )
    if values.get("padding_side") == "left":
        log.warning(
            '%s: padding_side = "left" has no effect: sequences are padded on the right',
            where,
        )


def _pop_specific_tokens(config: dict, kinds) -> dict[str, Any]:
    """Takes the tokens that only some models have, such as "image_token", out of the configuration."""
    names = [
        name
        for name, value in config.items()
        if name.endswith("_token") and name not in NAMES and isinstance(value, kinds)
    ]
    return {name: config.pop(name) for name in names}


def _pop_named_extra(config: dict) -> dict[str, Any]:
    """Takes "extra_special_tokens" out of the configuration if each of them has a name."""
    extra = config.get("extra_special_tokens")
    return config.pop("extra_special_tokens") if isinstance(extra, dict) else {}


def _merge_special(config: dict, path: Path) -> None:
    """Lets the entries of a special_tokens_map.json replace those of the configuration, in place."""
    for name, value in read_json(path).items():
        if name == "extra_special_tokens" and isinstance(value, list):
            old = config.get(name)
            value = [
                *(old if isinstance(old, list) else ()),
                *(_parse(t, path, special=True) for t in value),
            ]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            value = _parse(value, path, special=True)
        config[name] = value


def _read_added(path: Path, config: dict) -> list[tuple[int, tokenizers.AddedToken]]:
    """Returns the tokens of an added_tokens.json as pairs (id, token)."""
    extra = config.get("extra_special_tokens") or []
    tokens = [*map(config.get, NAMES), *(extra if isinstance(extra, list) else ())]
    # Tokens in tokenizer_config.json that have flags do not count here for transformers.
    special = {content(token) for token in tokens if isinstance(token, Token)}
    tokens = []
    for text, id in read_json(path).items():
        if not isinstance(id, int) or isinstance(id, bool):
            raise UserError(
                f"{path}: {text!r} has the id {shortened(repr(id), 60)}, which should be a number"
            )
        token = tokenizers.AddedToken(
            text, normalized=text not in special, special=text in special
        )
        tokens.append((id, token))
    return tokens


def _parse_numbered(tokens, where: Path) -> list[tuple[int, tokenizers.AddedToken]]:
    try:
        numbered = [(int(id), token) for id, token in tokens.items()]
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{where}: added_tokens_decoder should be {{id: token}}"
        ) from None
    for id, token in numbered:
        if not isinstance(token, dict):
            raise UserError(
                f"{where}: added_tokens_decoder has {shortened(repr(token), 60)} for the id {id}, which should be an object"
            )
    return [(id, _parse(token, where)) for id, token in numbered]


def _parse(token, where: Path, special: bool | None = None) -> Token:
    if isinstance(token, Token):
        return token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(
            f"{where}: the added token {shortened(repr(token), 60)} has no content"
        )
    flags = {name: token[name] for name in TOKEN if isinstance(token.get(name), bool)}
    if special is None:
        special = bool(token.get("special", False))
    return tokenizers.AddedToken(token["content"], special=special, **flags)
