"""What a tokenizer is, and the kinds of it, made from a vocabulary in memory by the `tokenizers` library.

WordPiece (BERT and what follows it; Wu et al., arXiv 1609.08144) and byte-level byte-pair encoding (GPT-2; Radford et al.,
2019). Files are read and written in `tokens`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from squeeze_jax.errors import UserError

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
    """A tokenizer; `tokens.load` and `tokens.train` build it. Survives pickling.

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
        (found,) = self.locate_many([text])
        return found

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns only the ids of each text, int32 [n]; many times as fast, on all cores."""
        found = self._encode(self.backend.encode_batch_fast, texts)
        return [np.array(each.ids, np.int32) for each in found]

    def locate_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns of each text what `encode` does, on all cores."""
        return [
            (np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2))
            for e in self._encode(self.backend.encode_batch, texts)
        ]

    def _encode(self, encode: Callable, texts: Sequence[str]) -> list:
        try:
            return encode(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise UserError(
                        f"{text[:200]!r} is no text: it has bytes that are not UTF-8, or half of a surrogate pair"
                    ) from None
            raise

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
    parts = [texts.get(content, (content,)) for content, _ in form]
    # Several times as fast as concatenating arrays, as the parts are small.
    ids, segments = np.empty((2, sum(map(len, parts))), np.int32)
    begin = 0
    for part, (_, segment) in zip(parts, form, strict=True):
        end = begin + len(part)
        ids[begin:end], segments[begin:end] = part, segment
        begin = end
    return ids, segments


def bert(
    vocabulary: Mapping[str, int],
    special: Mapping[str, str],
    *,
    lower: bool,
    accents: bool | None = None,
    chinese: bool = True,
) -> Tokenizer:
    """BERT's: WordPiece, [CLS] A [SEP] B [SEP].

    Args:
      vocabulary: {token: id}.
      special: {role: token}; all but "mask" in the vocabulary.
      lower: whether text is lower-cased.
      accents: whether accents are taken off; None for where it is lower-cased.
      chinese: whether each Chinese character is a word.
    """
    model = models.WordPiece(dict(vocabulary), unk_token=special["unknown"])
    backend = words(model, lower, accents, chinese)
    _add(backend, [t for t in special.values() if t in vocabulary])
    cls, sep = special["cls"], special["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(t, vocabulary[t]) for t in (cls, sep)],
    )
    return wrap(backend, special)


def words(
    model, lower: bool, accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """BERT's way to words, before a model of their pieces."""
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


def byte_level(
    model: models.BPE,
    vocabulary: Mapping[str, int],
    special: Mapping[str, str],
    *,
    space: bool = False,
    trim: bool = True,
) -> Tokenizer:
    """GPT-2's, or with a "cls" among the special tokens RoBERTa's: <s> A </s></s> B </s>, one segment.

    Args:
      model: byte-level byte pairs.
      vocabulary: {token: id} of it.
      special: {role: token}; "cls" and "sep" in the vocabulary.
      space: whether a text gets a space before it.
      trim: whether places of RoBERTa's tokens leave out the space before them.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    named = [*special.values(), END]
    _add(backend, dict.fromkeys(t for t in named if t in vocabulary))
    if "cls" in special:
        sep, cls = ((special[k], vocabulary[special[k]]) for k in ("sep", "cls"))
        backend.post_processor = processors.RobertaProcessing(sep, cls, trim, space)
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return wrap(backend, special)


def wrap(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> Tokenizer:
    """A tokenizer of the library's.

    Args:
      backend: without truncation and padding. Where it does not say how sequences are made, they are as BERT's or RoBERTa's.
      special: {role: token}.
    """
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


def _add(backend: tokenizers.Tokenizer, special) -> None:
    # The space before a masked word is a part of the word.
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, lstrip=t == ROBERTA["mask"]) for t in special]
    )
