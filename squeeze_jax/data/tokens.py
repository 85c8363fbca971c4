"""Tokenizers from and to the files that `transformers` uses, and new ones from text."""

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
from squeeze_jax.files import write

log = logging.getLogger(__name__)

JSON, WORDPIECE, BPE = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a folder with tokenizer.json, or vocab.txt (WordPiece), or vocab.json and merges.txt (byte-level BPE; as RoBERTa's
        where the vocabulary has "<s>", as GPT-2's where it has "<|endoftext|>"), the first of these that is there; or one of
        these files. What tokenizer_config.json and special_tokens_map.json beside it say of special tokens, of
        "do_lower_case" and of "add_prefix_space" counts. Without a word on it, a vocabulary with capital letters is taken to
        be a cased one.

    Raises:
      UserError: nothing there, a file that is no such thing, empty or double lines in a vocabulary, no special tokens.
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
    config = _config(path.parent)
    token_options.check(config, path.parent)
    if path.suffix == ".txt" and path.name != BPE[1]:
        return _wordpiece(path, config)
    if path.name in BPE:
        return _byte_level(path.parent, config)
    if path.suffix == ".json":
        return _from_json(path, config)
    raise UserError(
        f"{path} is no tokenizer: give a folder, a {JSON}, or a vocabulary with one token a line, {WORDPIECE}"
    )


def save(made: Tokenizer, folder: str | Path) -> None:
    """Writes what `transformers.AutoTokenizer` and `load` read; the folder is made where it is not there."""
    folder = Path(folder).expanduser()
    content = json.loads(made.backend.to_str())
    kind, vocabulary = content["model"].get("type"), content["model"]["vocab"]
    special = {
        name: made.token(getattr(made, role))
        for role, (name, _) in ROLES.items()
        if getattr(made, role) is not None
    }
    config, special = _described(made, content, special)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made.backend.save(str(folder / JSON))
        _write(folder / CONFIG, config | special)
        _write(folder / SPECIAL, special)
        if kind == "WordPiece":
            words = sorted(vocabulary, key=vocabulary.get)
            text = "".join(f"{word}\n" for word in words)
            write(folder / WORDPIECE, text)
        elif kind == "BPE":
            made.backend.model.save(str(folder))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def _described(made: Tokenizer, content: dict, special: dict[str, str]):
    """What to write beside a tokenizer.json: its class in `transformers` with options, and its special tokens."""
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
        gpt2 = made.cls is None
        ends = (END, END) if gpt2 else (ROBERTA["cls"], ROBERTA["sep"])
        return {
            "tokenizer_class": "GPT2Tokenizer" if gpt2 else "RobertaTokenizer",
            "add_prefix_space": content["pre_tokenizer"]["add_prefix_space"],
        }, special | dict(zip(("bos_token", "eos_token"), ends, strict=True))
    return {"tokenizer_class": "PreTrainedTokenizerFast"}, special


def train(
    files: Sequence[str | Path], size: int, *, lower: bool = True, frequency: int = 2
) -> Tokenizer:
    """Makes a WordPiece vocabulary from text, as BERT's: a function of the text alone.

    Args:
      files: UTF-8 text files, .gz too.
      size: tokens at most, the five special ones included; fewer where the text has no more.
      lower: whether text is lower-cased and stripped of accents.
      frequency: pieces that come less often are left out.

    Raises:
      UserError: no file, one that is no text, no text in them, or a size with no room for its letters.
    """
    if not files:
        raise UserError("cannot train a tokenizer without text files")
    paths = [Path(file).expanduser() for file in files]
    backend = tokenizer.words(models.WordPiece({}, unk_token=BERT["unknown"]), lower)
    letters, inner = _letters(map(backend.normalizer.normalize_str, _lines(paths)))
    if not letters:
        raise UserError(f"cannot train a tokenizer: {files[0]} holds no text")
    least = len(BERT) + len(letters) + len(inner)
    if least > size:
        raise UserError(
            f"size = {size} is too small for a vocabulary: special tokens and letters of these files are {least}"
        )
    # Left to itself the trainer numbers letters within words by chance, and by their numbers it decides between equals.
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


def _letters(lines: Iterator[str]) -> tuple[list[str], list[str]]:
    """The 1,000 most frequent characters beside white space, sorted, and those of them that continue words."""
    counts, pairs = collections.Counter(), set()
    for line in lines:
        counts.update(line)
        pairs.update(itertools.pairwise(line))

    def between(c):
        return (
            c.isspace() or c in string.punctuation or unicodedata.category(c)[0] == "P"
        )

    often = sorted(
        (c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c)
    )
    kept = sorted(often[:1000])
    inner = {b for a, b in pairs if not between(a) and not between(b)}
    return kept, sorted(inner.intersection(kept))


def _lines(paths: list[Path]) -> Iterator[str]:
    return itertools.chain.from_iterable(map(text_files.read_lines, paths))


def _wordpiece(path: Path, config: dict) -> Tokenizer:
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
    special = BERT | _names(config)
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
    _demand(vocabulary, [special[k] for k in BERT if k != "mask"], path)
    read = tokenizer.bert(
        vocabulary,
        special,
        lower=lower,
        accents=config.get("strip_accents"),
        chinese=config.get("tokenize_chinese_chars") is not False,
    )
    return _added(read, special, config, path)


def _byte_level(folder: Path, config: dict) -> Tokenizer:
    vocabulary = _read_json(folder / BPE[0])
    try:
        model = models.BPE.from_file(*(str(folder / name) for name in BPE))
    except Exception as error:  # the library's own
        text_files.read_text(folder / BPE[1])
        raise UserError(
            f"{folder} holds no byte-level BPE in {' and '.join(BPE)}: {_line(error)}"
        ) from None
    roberta = ROBERTA["cls"] in vocabulary
    if not roberta and END not in vocabulary:
        raise UserError(
            f"{folder / BPE[0]} lacks special tokens: neither <s> and </s> as RoBERTa's, nor {END} as GPT-2's"
        )
    special = ROBERTA if roberta else {"unknown": END}
    needed, special = special.keys(), special | _names(config)
    _demand(vocabulary, [special[role] for role in needed], folder / BPE[0])
    space = bool(config.get("add_prefix_space", False))
    trim = config.get("trim_offsets", True)
    read = tokenizer.byte_level(model, vocabulary, special, space=space, trim=trim)
    return _added(read, special, config, folder / BPE[0])


def _added(read: Tokenizer, special: dict, config: dict, path: Path) -> Tokenizer:
    """The tokenizer with the tokens that its configuration adds."""
    token_options.add(read.backend, config, _names(config), path)
    return tokenizer.wrap(read.backend, special)


def _from_json(path: Path, config: dict) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text_files.read_text(path))
    except Exception as error:  # the library's own, and UserErrors
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tokenizer.json: {_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    named = _names(config)
    backend = token_options.adapt(backend, config, named, path)
    token_options.add(backend, config, named, path)
    special = {}
    for role, (_, usual) in ROLES.items():
        candidates = [named[role]] if role in named else usual
        found = [t for t in candidates if backend.token_to_id(t) is not None]
        if found:
            special[role] = found[0]
    return tokenizer.wrap(backend, special)


def _config(folder: Path) -> dict:
    """What is said beside a vocabulary; tokenizer_config.json counts for more."""
    found = {}
    for name in (SPECIAL, CONFIG):
        if (folder / name).is_file():
            found |= _read_json(folder / name)
    return found


def _names(config: dict) -> dict[str, str]:
    """{role: token} that a configuration names."""
    found = {}
    for role, (name, _) in ROLES.items():
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _demand(vocabulary, wanted, path) -> None:
    lacking = [token for token in wanted if token not in vocabulary]
    if lacking:
        raise UserError(
            f"{path} lacks the special tokens {', '.join(lacking)}: if they have other names, {CONFIG} beside it says so"
        )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(text_files.read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _write(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=2) + "\n")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
