"""Reads and writes tokenizers in the file formats of `transformers`, and trains new vocabularies on text."""

import collections
import itertools
import json
import logging
import string
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models

from squeeze_jax.data import text_files, token_options, tokenizer
from squeeze_jax.data.tokenizer import BERT, END, ROBERTA, ROLES, Tokenizer
from squeeze_jax.errors import UserError
from squeeze_jax.files import parse_json, write

log = logging.getLogger(__name__)

JSON, WORDPIECE, BPE = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a folder or a file.

    The options and the special tokens in tokenizer_config.json and special_tokens_map.json next to the file are applied, such
    as "do_lower_case" and "add_prefix_space". If "do_lower_case" is not set, a vocab.txt with capital letters makes a cased
    tokenizer.

    Args:
      path: a tokenizer.json, a vocab.txt (WordPiece), or a vocab.json with a merges.txt beside it (byte-level BPE, like
        RoBERTa's if the vocabulary has "<s>", like GPT-2's if it has "<|endoftext|>"). Of a folder, the first of these files
        is read that exists.

    Raises:
      UserError: there is no such file or folder, the file is in another format, a vocabulary has an empty line or a token
        twice, or it lacks special tokens.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder, names = path, (JSON, WORDPIECE, BPE[0])
        path = next((path / n for n in names if (path / n).is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} holds no tokenizer: looked for {JSON}, {WORDPIECE}, and {' with '.join(BPE)}"
            )
    elif not path.is_file():
        raise UserError(f"no tokenizer {path}: there is no such folder or file")
    config = _read_config(path.parent)
    token_options.check(config, path.parent)
    if path.suffix == ".txt" and path.name != BPE[1]:
        return _read_wordpiece(path, config)
    if path.name in BPE:
        return _read_byte_level(path.parent, config)
    if path.suffix == ".json":
        return _read_tokenizer_json(path, config)
    raise UserError(
        f"{path} is no tokenizer: give a folder, a {JSON}, or a vocabulary with one token a line, {WORDPIECE}"
    )


def save(saved: Tokenizer, folder: str | Path) -> None:
    """Writes a tokenizer to files that `transformers.AutoTokenizer` and `load` read.

    Args:
      saved: the tokenizer.
      folder: where to write; created if needed.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = Path(folder).expanduser()
    content = json.loads(saved.backend.to_str())
    kind, vocabulary = content["model"].get("type"), content["model"]["vocab"]
    special = {
        name: saved.token(getattr(saved, role))
        for role, (name, _) in ROLES.items()
        if getattr(saved, role) is not None
    }
    config, special = _companion_config(saved, content, special)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved.backend.save(str(folder / JSON))
        _write_json(folder / CONFIG, config | special)
        _write_json(folder / SPECIAL, special)
        if kind == "WordPiece":
            words = sorted(vocabulary, key=vocabulary.get)
            text = "".join(f"{word}\n" for word in words)
            write(folder / WORDPIECE, text)
        elif kind == "BPE":
            saved.backend.model.save(str(folder))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def _companion_config(saved: Tokenizer, content: dict, special: dict[str, str]):
    """Returns the contents of the files beside tokenizer.json: the class in `transformers` with options; special tokens."""
    kinds = [content["model"].get("type")]
    kinds += [
        (content[key] or {}).get("type") for key in ("normalizer", "pre_tokenizer")
    ]
    if kinds[:2] == ["WordPiece", "BertNormalizer"]:
        normalizer = content["normalizer"]
        return {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }, special
    if kinds == ["BPE", None, "ByteLevel"]:
        gpt2 = saved.cls is None
        ends = (END, END) if gpt2 else (ROBERTA["cls"], ROBERTA["sep"])
        return {
            "tokenizer_class": "GPT2Tokenizer" if gpt2 else "RobertaTokenizer",
            "add_prefix_space": content["pre_tokenizer"]["add_prefix_space"],
        }, special | dict(zip(("bos_token", "eos_token"), ends, strict=True))
    return {"tokenizer_class": "PreTrainedTokenizerFast"}, special


def train(
    files: Sequence[str | Path], size: int, *, lower: bool = True, frequency: int = 2
) -> Tokenizer:
    """Trains a WordPiece vocabulary like BERT's; equal texts and options give equal vocabularies.

    Args:
      files: UTF-8 text files; gzipped if the name ends in ".gz".
      size: the largest number of tokens, the five special tokens included. Little text may give fewer.
      lower: whether text is lower-cased and stripped of accents.
      frequency: pieces that occur less often than this are left out.

    Raises:
      UserError: no file, a file that is not UTF-8 text, no text in the files, or a size with no room for all letters.
    """
    if not files:
        raise UserError("cannot train a tokenizer without text files")
    paths = [Path(file).expanduser() for file in files]
    backend = tokenizer.bert_backend(
        models.WordPiece({}, unk_token=BERT["unknown"]), lower
    )
    letters, inner = _alphabet(map(backend.normalizer.normalize_str, _lines(paths)))
    if not letters:
        raise UserError(f"cannot train a tokenizer: {files[0]} holds no text")
    least = len(BERT) + len(letters) + len(inner)
    if least > size:
        raise UserError(
            f"size = {size} is too small for a vocabulary: special tokens and letters of these files are {least}"
        )
    # Listing the letters fixes their ids: the trainer numbers other letters within words by chance, and it breaks ties by id.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=frequency,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*BERT.values(), *(f"##{letter}" for letter in inner)],
        show_progress=False,
    )
    backend.train_from_iterator(_lines(paths), trainer)
    return tokenizer.bert(backend.get_vocab(), BERT, lower=lower)


def _alphabet(lines: Iterator[str]) -> tuple[list[str], list[str]]:
    """Returns the 1,000 most frequent characters other than white space, sorted, and those of them that continue words."""
    counts, pairs = collections.Counter(), set()
    for line in lines:
        counts.update(line)
        pairs.update(itertools.pairwise(line))

    def separates_words(c):
        return (
            c.isspace() or c in string.punctuation or unicodedata.category(c)[0] == "P"
        )

    by_frequency = sorted(
        (c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c)
    )
    letters = sorted(by_frequency[:1000])
    inner = {b for a, b in pairs if not separates_words(a) and not separates_words(b)}
    return letters, sorted(inner.intersection(letters))


def _lines(paths: list[Path]) -> Iterator[str]:
    return itertools.chain.from_iterable(map(text_files.read_lines, paths))


def _read_wordpiece(path: Path, config: dict) -> Tokenizer:
    vocabulary = {}
    lines = [line.rstrip("\r\n") for line in text_files.read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    for number, token in enumerate(lines, 1):
        if not token:
            raise UserError(
                f"{path}:{number} is empty: a vocabulary has one token a line"
            )
        if token in vocabulary:
            raise UserError(
                f"{path}:{number} has the token {token!r} of line {vocabulary[token] + 1} again"
            )
        vocabulary[token] = number - 1
    special = BERT | _named_tokens(config)
    lower = config.get("do_lower_case")
    if lower is None:
        words = vocabulary.keys() - set(special.values())
        lower = all(w == w.lower() for w in words if not w.startswith("["))
        if not lower:
            log.warning(
                "%s has capital letters and no do_lower_case in %s beside it: text keeps its capital letters",
                path,
                CONFIG,
            )
    _check_special_tokens(vocabulary, [special[k] for k in BERT if k != "mask"], path)
    loaded = tokenizer.bert(
        vocabulary,
        special,
        lower=lower,
        accents=config.get("strip_accents"),
        chinese=config.get("tokenize_chinese_chars") is not False,
    )
    return _with_added_tokens(loaded, special, config, path)


def _read_byte_level(folder: Path, config: dict) -> Tokenizer:
    vocabulary = _read_json(folder / BPE[0])
    text_files.read_text(folder / BPE[1])  # raises a UserError if unreadable
    try:
        model = models.BPE.from_file(*(str(folder / name) for name in BPE))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise UserError(
            f"{folder} holds no byte-level BPE in {' and '.join(BPE)}: {_one_line(error)}"
        ) from None
    roberta = ROBERTA["cls"] in vocabulary
    if not roberta and END not in vocabulary:
        raise UserError(
            f"{folder / BPE[0]} lacks special tokens: neither <s> and </s> as RoBERTa's, nor {END} as GPT-2's"
        )
    special = ROBERTA if roberta else {"unknown": END}
    required_roles, special = special.keys(), special | _named_tokens(config)
    _check_special_tokens(
        vocabulary, [special[role] for role in required_roles], folder / BPE[0]
    )
    space = bool(config.get("add_prefix_space", False))
    trim = config.get("trim_offsets", True)
    loaded = tokenizer.byte_level(model, vocabulary, special, space=space, trim=trim)
    return _with_added_tokens(loaded, special, config, folder / BPE[0])


def _with_added_tokens(
    loaded: Tokenizer, special: dict, config: dict, path: Path
) -> Tokenizer:
    """Returns the tokenizer with the tokens that its configuration adds."""
    token_options.add(loaded.backend, config, _named_tokens(config), path)
    return tokenizer.wrap(loaded.backend, special)


def _read_tokenizer_json(path: Path, config: dict) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text_files.read_text(path))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tokenizer.json: {_one_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    named = _named_tokens(config)
    backend = token_options.adapt(backend, config, named, path)
    token_options.add(backend, config, named, path)
    special = {}
    for role, (_, usual) in ROLES.items():
        candidates = [named[role]] if role in named else usual
        present = [t for t in candidates if backend.token_to_id(t) is not None]
        if present:
            special[role] = present[0]
    return tokenizer.wrap(backend, special)


def _read_config(folder: Path) -> dict:
    """Returns the options in a folder's special_tokens_map.json and tokenizer_config.json; the latter takes precedence."""
    config = {}
    for name in (SPECIAL, CONFIG):
        if (folder / name).is_file():
            config |= _read_json(folder / name)
    return config


def _named_tokens(config: dict) -> dict[str, str]:
    """Returns the special tokens that a configuration names, {role: token}."""
    named = {}
    for role, (name, _) in ROLES.items():
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[role] = token
    return named


def _check_special_tokens(vocabulary, required, path) -> None:
    lacking = [token for token in required if token not in vocabulary]
    if lacking:
        raise UserError(
            f"{path} lacks the special tokens {', '.join(lacking)}: if they have other names, {CONFIG} beside it says so"
        )


def _read_json(path: Path) -> dict:
    try:
        content = parse_json(text_files.read_text(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=2) + "\n")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
