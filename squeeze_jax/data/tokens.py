"""Tokenizers: text to numbers and back, from and to the files that `transformers` uses, by the `tokenizers` library.

WordPiece (BERT and what follows it; Wu et al., arXiv 1609.08144) and byte-level byte-pair encoding (GPT-2; Radford et al.,
2019), and anything else that a tokenizer.json describes.
"""

import collections
import dataclasses
import gzip
import itertools
import json
import string
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from squeeze_jax.errors import UserError

JSON, WORDPIECE, BPE = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
# {role: (its name in `transformers`, what it is usually called)}
ROLES = {
    "pad": ("pad_token", ("[PAD]", "<pad>")),
    "unknown": ("unk_token", ("[UNK]", "<unk>", "<|endoftext|>")),
    "cls": ("cls_token", ("[CLS]", "<s>")),
    "sep": ("sep_token", ("[SEP]", "</s>")),
    "mask": ("mask_token", ("[MASK]", "<mask>")),
}
BERT = {"pad": "[PAD]", "unknown": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
BERT["mask"] = "[MASK]"
ROBERTA = {"pad": "<pad>", "unknown": "<unk>", "cls": "<s>", "sep": "</s>"}
ROBERTA["mask"] = "<mask>"
END = "<|endoftext|>"


class Piece(NamedTuple):
    """One part of a sequence: a text ("A" or "B"), or the id of a special token; and its segment."""

    content: str | int
    segment: int


A, B = Piece("A", 0), Piece("B", 1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; `load` and `train` build it. Survives pickling.

    Attributes:
      backend: the library's, without truncation and padding.
      size: of its vocabulary: the largest id and one.
      pad, unknown, cls, sep, mask: ids of the special tokens; None where it has none.
      one, two: how a sequence of one text and one of two are made.
    """

    backend: tokenizers.Tokenizer
    size: int
    pad: int | None
    unknown: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    one: tuple[Piece, ...] = (A,)
    two: tuple[Piece, ...] = (A, B)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text, int32 [n], and where each begins and ends in it, in characters, int32 [n, 2].

        Without special tokens around it; one that stands in the text, such as "[MASK]", is itself.
        """
        found = self.backend.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
        return np.array(found.ids, np.int32), offsets

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns only the ids of each text, int32 [n]; many times as fast, on all cores."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]

    def token(self, id: int) -> str:
        """The token that an id stands for, such as "##ing"."""
        found = self.backend.id_to_token(int(id))
        return "" if found is None else found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def single(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a text's ids with special tokens, and segments, int32 [n] each, n ≤ length; cut off at its end.

        Raises:
          UserError: no room for one token of the text.
        """
        return _join(self.one, {"A": ids[: self._room(self.one, length)]})

    def pair(
        self, a: np.ndarray, b: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `single`, of two texts; tokens are taken from the end of the longer until they fit."""
        room = self._room(self.two, length)
        short, long = sorted((len(a), len(b)))
        if short + long > room:
            short = min(short, room // 2)
            long = room - short
        keep = (long, short) if len(a) > len(b) else (short, long)
        return _join(self.two, {"A": a[: keep[0]], "B": b[: keep[1]]})

    def room(self, length: int, pair: bool = False) -> int:
        """How many tokens of text a sequence of `length` has room for."""
        return self._room(self.two if pair else self.one, length)

    def _room(self, form: tuple[Piece, ...], length: int) -> int:
        texts = sum(piece.content in ("A", "B") for piece in form)
        room = length - (len(form) - texts)
        if room < texts:
            raise UserError(
                f"length = {length} leaves no room for text beside {len(form) - texts} special tokens"
            )
        return room


def _join(form: tuple[Piece, ...], texts: dict[str, np.ndarray]):
    # Much faster than concatenating arrays, as the parts are small.
    ids, segments = [], []
    for content, segment in form:
        part = texts[content].tolist() if isinstance(content, str) else (content,)
        ids += part
        segments += [segment] * len(part)
    return np.array(ids, np.int32), np.array(segments, np.int32)


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
    if path.suffix == ".txt" and path.name != BPE[1]:
        return _wordpiece(path, config)
    if path.name in BPE:
        return _byte_level(path.parent, config)
    if path.suffix == ".json":
        return _from_json(path, config)
    raise UserError(
        f"{path} is no tokenizer: give a folder, a {JSON}, or a vocabulary with one token a line, {WORDPIECE}"
    )


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes what `transformers.AutoTokenizer` and `load` read; the folder is made where it is not there."""
    folder = Path(folder).expanduser()
    content = json.loads(tokenizer.backend.to_str())
    kind, vocabulary = content["model"].get("type"), content["model"]["vocab"]
    special = {
        name: tokenizer.token(getattr(tokenizer, role))
        for role, (name, _) in ROLES.items()
        if getattr(tokenizer, role) is not None
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "WordPiece":
        normalizer = content["normalizer"] or {}
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.get("lowercase", False),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        }
    elif kind == "BPE":
        pre = content["pre_tokenizer"] or {}
        name = "GPT2Tokenizer" if tokenizer.cls is None else "RobertaTokenizer"
        start, end = (END, END) if tokenizer.cls is None else ("<s>", "</s>")
        special |= {"bos_token": start, "eos_token": end}
        config = {
            "tokenizer_class": name,
            "add_prefix_space": pre.get("add_prefix_space", False),
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.backend.save(str(folder / JSON))
        _write(folder / CONFIG, config | special)
        _write(folder / SPECIAL, special)
        if kind == "WordPiece":
            words = sorted(vocabulary, key=vocabulary.get)
            text = "".join(f"{word}\n" for word in words)
            (folder / WORDPIECE).write_text(text, encoding="utf-8")
        elif kind == "BPE":
            tokenizer.backend.model.save(str(folder))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


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
    backend = _backend(models.WordPiece({}, unk_token=BERT["unknown"]), lower)
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
    return _bert(backend.get_vocab(), lower=lower, special=BERT)


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
    for path in paths:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(
                path, "rt", encoding="utf-8"
            ) as file:
                yield from file
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except (UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _wordpiece(path: Path, config: dict) -> Tokenizer:
    vocabulary = {}
    lines = [line.rstrip("\r\n") for line in _text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    for number, token in enumerate(lines, 1):
        if not token.strip():
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
    return _bert(
        vocabulary,
        lower=lower,
        accents=config.get("strip_accents"),
        chinese=config.get("tokenize_chinese_chars", True),
        special=special,
        path=path,
    )


def _bert(
    vocabulary, *, lower, special, accents=None, chinese=True, path=None
) -> Tokenizer:
    _demand(vocabulary, [v for k, v in special.items() if k != "mask"], path)
    model = models.WordPiece(vocabulary, unk_token=special["unknown"])
    backend = _backend(model, lower, accents, chinese)
    _add(backend, [t for t in special.values() if t in vocabulary])
    cls, sep = special["cls"], special["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(t, vocabulary[t]) for t in (cls, sep)],
    )
    return _wrap(backend, special)


def _backend(model, lower, accents=None, chinese=True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese,
        strip_accents=accents,
        lowercase=lower,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _byte_level(folder: Path, config: dict) -> Tokenizer:
    vocabulary = _read_json(folder / BPE[0])
    try:
        model = models.BPE.from_file(*(str(folder / name) for name in BPE))
    except Exception as error:  # the library's own
        _text(folder / BPE[1])
        raise UserError(
            f"{folder} holds no byte-level BPE in {' and '.join(BPE)}: {_line(error)}"
        ) from None
    roberta = "<s>" in vocabulary
    if not roberta and END not in vocabulary:
        raise UserError(
            f"{folder / BPE[0]} lacks special tokens: neither <s> and </s> as RoBERTa's, nor {END} as GPT-2's"
        )
    special = (ROBERTA if roberta else {"unknown": END}) | _names(config)
    _demand(vocabulary, (ROBERTA if roberta else special).values(), folder / BPE[0])
    backend = tokenizers.Tokenizer(model)
    space = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    present = [t for t in special.values() if t in vocabulary]
    _add(backend, dict.fromkeys([*present, *([END] if END in vocabulary else [])]))
    if roberta:
        sep, cls = ((special[k], vocabulary[special[k]]) for k in ("sep", "cls"))
        trim = config.get("trim_offsets", True)
        backend.post_processor = processors.RobertaProcessing(sep, cls, trim, space)
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _wrap(backend, special)


def _from_json(path: Path, config: dict) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(_text(path))
    except Exception as error:  # the library's own, and UserErrors
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tokenizer.json: {_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    named = _names(config)
    special = {}
    for role, (_, usual) in ROLES.items():
        candidates = [named[role]] if role in named else usual
        found = [t for t in candidates if backend.token_to_id(t) is not None]
        if found:
            special[role] = found[0]
    return _wrap(backend, special)


def _wrap(backend: tokenizers.Tokenizer, special: dict[str, str]) -> Tokenizer:
    ids = {role: backend.token_to_id(special.get(role, "")) for role in ROLES}
    one, two = _forms(json.loads(backend.to_str())["post_processor"])
    if one == (A,) and ids["cls"] is not None and ids["sep"] is not None:
        around = {"cls": ["", ids["cls"]], "sep": ["", ids["sep"]]}
        double = special["cls"] == ROBERTA["cls"]
        kind = "RobertaProcessing" if double else "BertProcessing"
        one, two = _forms(around | {"type": kind})
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(backend, size, **ids, one=one, two=two)


def _forms(processor: dict | None):
    """How sequences of one text and of two are made, from what a tokenizer.json says of it."""
    kind = processor and processor["type"]
    if kind == "Sequence":
        found = [_forms(each) for each in processor["processors"]]
        return next((f for f in found if f != ((A,), (A, B))), ((A,), (A, B)))
    if kind == "TemplateProcessing":
        special = processor["special_tokens"]
        return tuple(
            tuple(_pieces(processor[name], special)) for name in ("single", "pair")
        )
    if kind in ("BertProcessing", "RobertaProcessing"):
        double = kind == "RobertaProcessing"
        cls, sep = (Piece(processor[name][1], 0) for name in ("cls", "sep"))
        middle = (sep, sep, B._replace(segment=0)) if double else (sep, B)
        last = sep if double else sep._replace(segment=1)
        return (cls, A, sep), (cls, A, *middle, last)
    return (A,), (A, B)


def _pieces(template: list, special: dict) -> Iterator[Piece]:
    for each in template:
        ((kind, value),) = each.items()
        if kind == "Sequence":
            yield Piece(value["id"], value["type_id"])
        else:
            for id in special[value["id"]]["ids"]:
                yield Piece(id, value["type_id"])


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


def _add(backend: tokenizers.Tokenizer, special) -> None:
    # The space before a masked word is a part of the word.
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, lstrip=t == ROBERTA["mask"]) for t in special]
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _text(path: Path) -> str:
    try:
        # Not in text mode: that takes a carriage return within a line for a line's end.
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
