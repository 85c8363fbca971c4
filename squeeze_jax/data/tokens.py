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

from squeeze_jax import files
from squeeze_jax.data import (
    text_files,
    token_backends,
    token_classes,
    token_options,
    tokenizer,
)
from squeeze_jax.data.token_classes import Class
from squeeze_jax.data.token_options import CONFIG, SPECIAL
from squeeze_jax.data.tokenizer import BERT, END, ROBERTA, ROLES, Tokenizer
from squeeze_jax.errors import UserError
from squeeze_jax.files import write

log = logging.getLogger(__name__)

JSON, WORDPIECE, BPE = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a folder or a file.

    The token ids are those of `transformers.AutoTokenizer`: the tokenizer's class in tokenizer_config.json or config.json next
    to the file counts, and so do the options and the tokens in tokenizer_config.json, special_tokens_map.json and
    added_tokens.json, such as "do_lower_case". If "do_lower_case" is not set, a vocab.txt with capital letters makes a cased
    tokenizer.

    Args:
      path: a tokenizer.json, a vocab.txt (WordPiece), or a vocab.json with a merges.txt beside it (byte-level BPE; without a
        class like RoBERTa's if the vocabulary has "<s>", like GPT-2's if it has "<|endoftext|>"). Of a folder, the first of
        these files is read that exists and that the class reads.

    Raises:
      UserError: there is no such file or folder, the file is in another format, a vocabulary has an empty line or a token
        twice, or it lacks special tokens; or the class is not one of `token_classes.KINDS`, or contradicts the file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no tokenizer {path}: there is no such folder or file")
    folder = path if path.is_dir() else path.parent
    found = token_classes.find(folder)
    if path.is_dir():
        path = _vocabulary_file(folder, found)
    if files.suffix(path) == ".txt" and path.name != BPE[1]:
        return _read_wordpiece(path, found)
    if path.name in BPE:
        return _read_byte_level(path.parent, found)
    if files.suffix(path) == ".json":
        return _read_tokenizer_json(path, found)
    raise UserError(
        f"{path} is no tokenizer: give a folder, a {JSON}, or a vocabulary with one token a line, {WORDPIECE}"
    )


def _vocabulary_file(folder: Path, found: Class | None) -> Path:
    """Returns the file of a folder to read: the first that exists and that the tokenizer's class reads."""
    first = (JSON, WORDPIECE, BPE[0])
    whose, looked = "", f"{JSON}, {WORDPIECE}, and {' with '.join(BPE)}"
    if found is not None:
        files = token_classes.KINDS[found.kind].files
        first, whose = (JSON, *files[:1]), f" for {found.name}"
        looked = " and ".join([JSON, " with ".join(files)][: len(first)])
    path = next((folder / name for name in first if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no tokenizer{whose}: looked for {looked}")
    return path


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
    config, special = _companion_config(saved, content)
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


def _companion_config(saved: Tokenizer, content: dict) -> tuple[dict, dict]:
    """Returns the contents of the files beside tokenizer.json: the class in `transformers` with options; special tokens.

    The class is one that reads the vocabulary alone if it builds the same tokenizer.
    """
    options = {}
    if saved.truncation_side != "right":
        options["truncation_side"] = saved.truncation_side
    if saved.backend.encode_special_tokens:
        options["split_special_tokens"] = True
    # Other tokens stay unnamed, because transformers would find named ones within texts.
    added = saved.backend.get_added_tokens_decoder()
    special = {
        name: added[getattr(saved, role)].content
        for role, (name, _) in ROLES.items()
        if getattr(saved, role) in added
    }
    generic = options | {"tokenizer_class": token_classes.GENERIC}, special
    kinds = [content["model"].get("type")]
    kinds += [
        (content[key] or {}).get("type") for key in ("normalizer", "pre_tokenizer")
    ]
    ends = {}
    if kinds[:2] == ["WordPiece", "BertNormalizer"]:
        normalizer = content["normalizer"]
        found = Class("BertTokenizer", "bert")
        own = {
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    elif kinds == ["BPE", None, "ByteLevel"]:
        processor = content["post_processor"] or {}
        own = {"add_prefix_space": content["pre_tokenizer"]["add_prefix_space"]}
        found, ends = Class("GPT2Tokenizer", "gpt2"), (END, END)
        if processor.get("type") == "RobertaProcessing":
            own["trim_offsets"] = processor["trim_offsets"]
            found, ends = (
                Class("RobertaTokenizer", "roberta"),
                (ROBERTA["cls"], ROBERTA["sep"]),
            )
        ends = dict(zip(("bos_token", "eos_token"), ends, strict=True))
    else:
        return generic
    named = dict.fromkeys(token_classes.KINDS[found.kind].special) | special | ends
    if not token_backends.builds(found, saved, options | own, named):
        return generic
    nulls = {name: None for name, token in named.items() if token is None}
    config = {"tokenizer_class": found.name} | options | own | nulls
    return config, special | ends


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
    return tokenizer.bert(backend.get_vocab(), lower=lower)


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


def _read_wordpiece(path: Path, found: Class | None) -> Tokenizer:
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
    options = token_options.read(path.parent, None)
    _check_kind(found, ("bert",), path)
    special = {*BERT.values(), *map(options.content, options.named)}
    lower = True
    if "do_lower_case" not in options.values:
        words = vocabulary.keys() - special
        lower = all(w == w.lower() for w in words if not w.startswith("["))
        if not lower:
            log.warning(
                "%s has capital letters and no do_lower_case in %s beside it: text keeps its capital letters",
                path,
                CONFIG,
            )
    unknown = options.content("unk_token") or BERT["unknown"]
    model = models.WordPiece(vocabulary, unk_token=unknown)
    made = token_backends.backend("bert", model, options, lower)
    return token_backends.finish(made, "bert", options, path)


def _read_byte_level(folder: Path, found: Class | None) -> Tokenizer:
    vocabulary = token_options.read_json(folder / BPE[0])
    text_files.read_text(folder / BPE[1])  # raises a UserError if unreadable
    try:
        model = models.BPE.from_file(*(str(folder / name) for name in BPE))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise UserError(
            f"{folder} holds no byte-level BPE in {' and '.join(BPE)}: {_one_line(error)}"
        ) from None
    path, kind = folder / BPE[0], "roberta" if ROBERTA["cls"] in vocabulary else "gpt2"
    if found is not None:
        _check_kind(found, ("roberta", "gpt2"), path)
        kind = found.kind
    elif kind == "gpt2" and END not in vocabulary:
        raise UserError(
            f"{path} lacks special tokens: neither <s> and </s> as RoBERTa's, nor {END} as GPT-2's"
        )
    options = token_options.read(folder, None)
    made = token_backends.backend(kind, model, options)
    loaded = token_backends.finish(made, kind, options, path)
    mask = options.named.get("mask_token", ROBERTA["mask"])
    if kind == "roberta" and mask == ROBERTA["mask"] and not options.has_flags(mask):
        # In RoBERTa, the space before a word is a part of it, so <mask> takes the space as well.
        made.add_special_tokens([tokenizers.AddedToken(mask, lstrip=True)])
        log.warning(
            "%s: <mask> takes the space before it, as in RoBERTa's published tokenizer.json, which is absent here",
            folder,
        )
    return loaded


def _check_kind(found: Class | None, kinds: tuple[str, ...], path: Path) -> None:
    """Raises a UserError if a class does not read a vocabulary such as the one in a file."""
    if found is not None and found.kind not in kinds:
        raise UserError(
            f"{path} is no vocabulary for {found.name}, which the files beside it name: give the {JSON} of that class, or name the"
            f" class of this vocabulary in {CONFIG}"
        )


def _read_tokenizer_json(path: Path, found: Class | None) -> Tokenizer:
    try:
        stored = tokenizers.Tokenizer.from_str(text_files.read_text(path))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tokenizer.json: {_one_line(error)}") from None
    options = token_options.read(path.parent, stored)
    if stored.padding and (found is None or found.kind == "generic"):
        options.named.setdefault("pad_token", stored.padding["pad_token"])
    stored.no_truncation()
    stored.no_padding()
    if found is not None:
        made = token_backends.rebuild(stored, found, options, path)
        return token_backends.finish(made, found.kind, options, path)
    token_backends.check_unnamed(stored, options, path)
    loaded = token_backends.finish(stored, "generic", options, path)
    template = {part.content for part in loaded.single_template}
    for role in "cls", "sep":
        text = options.content(f"{role}_token")
        if text and len(template) > 1 and getattr(loaded, role) not in template:
            raise UserError(
                f"{path} does not put the token {text!r} around texts, which {CONFIG} beside it names as its {role}_token: name its"
                f' class in {CONFIG}, such as "tokenizer_class": "BertTokenizer"'
            )
    return _framed(loaded, path)


def _framed(loaded: Tokenizer, path: Path) -> Tokenizer:
    """Returns a tokenizer that puts its "cls" and "sep" tokens around texts, if the file has them and no template."""
    if len(loaded.single_template) > 1 or None in (loaded.cls, loaded.sep):
        return loaded
    cls, sep = loaded.token(loaded.cls), loaded.token(loaded.sep)
    if cls == ROBERTA["cls"]:
        tokenizer.put_around_like_roberta(loaded.backend, cls, sep)
    else:
        tokenizer.put_around_like_bert(loaded.backend, cls, sep)
    log.warning(
        "%s puts nothing around texts, and no tokenizer_class beside it says so: texts become %s ... %s",
        path,
        cls,
        sep,
    )
    special = {
        role: loaded.token(id)
        for role in ROLES
        if (id := getattr(loaded, role)) is not None
    }
    return tokenizer.wrap(loaded.backend, special, loaded.truncation_side)


def _write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=2) + "\n")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
