"""The class `Tokenizer`, and functions that build tokenizers from vocabularies in memory with the library `tokenizers`.

There are WordPiece tokenizers, as in BERT (Wu et al., arXiv 1609.08144), and byte-level byte-pair encoding, as in GPT-2
(Radford et al., 2019) and RoBERTa. `tokens` reads and writes their files.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from squeeze_jax import files
from squeeze_jax.errors import UserError

# {role of a special token: (its name in `transformers`, the usual tokens)}
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


class TemplatePart(NamedTuple):
    """One part of a sequence template: the content is a text ("A" or "B") or a special token's id; the segment is 0 or 1."""

    content: str | int
    segment: int


A, B = TemplatePart("A", 0), TemplatePart("B", 1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; `tokens.load` and `tokens.train` build it. It can be pickled.

    Attributes:
      backend: the tokenizer of the library `tokenizers`, without truncation and padding.
      size: of the vocabulary: the largest id + 1.
      pad, unknown, cls, sep, mask: ids of the special tokens; None for those that it lacks.
      single_template, pair_template: the parts of a sequence of one text and of a sequence of two, such as
        [CLS] A [SEP] and [CLS] A [SEP] B [SEP].
      truncation_side: "right" cuts off the end of texts that are too long, "left" their beginning.
    """

    backend: tokenizers.Tokenizer
    size: int
    pad: int | None
    unknown: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    single_template: tuple[TemplatePart, ...] = (A,)
    pair_template: tuple[TemplatePart, ...] = (A, B)
    truncation_side: str = "right"

    def digest(self) -> str:
        """Returns a text that is the same for tokenizers in which equal ids are equal tokens."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return files.digest(sorted(vocabulary.items()))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of a text, int32 [n], and the characters [begin, end) of each token, int32 [n, 2].

        No special tokens are added. A special token within the text, such as "[MASK]", becomes that one token.
        """
        (encoding,) = self.locate_many([text])
        return encoding

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, int32 [n], without places; many times as fast as `encode`, on all cores."""
        encodings = self._encode(self.backend.encode_batch_fast, texts)
        return [np.array(each.ids, np.int32) for each in encodings]

    def locate_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the result of `encode` for each text, on all cores."""
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
        """Returns the token with this id, such as "##ing"; "" if no token has it."""
        token = self.backend.id_to_token(int(id))
        return "" if token is None else token

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text that token ids stand for, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def single(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Adds special tokens around a text and cuts it if needed, at the end unless `truncation_side` says otherwise.

        Args:
          ids: the token ids of the text.
          length: the largest number of tokens of the sequence, special tokens included.

        Returns:
          The sequence's token ids and segments, int32 [n] each, n ≤ length.

        Raises:
          UserError: `length` leaves no room for one token of the text.
        """
        room = self._room(self.single_template, length)
        return _fill_template(self.single_template, {"A": self._cut(ids, room)})

    def pair(
        self, a: np.ndarray, b: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Joins two texts as `single` does one; cuts tokens from the longer text until both fit."""
        room = self._room(self.pair_template, length)
        short, long = sorted((len(a), len(b)))
        if short + long > room:
            short = min(short, room // 2)
            long = room - short
        first, second = (long, short) if len(a) > len(b) else (short, long)
        texts = {"A": self._cut(a, first), "B": self._cut(b, second)}
        return _fill_template(self.pair_template, texts)

    def _cut(self, ids: np.ndarray, count: int) -> np.ndarray:
        begin = max(0, len(ids) - count) if self.truncation_side == "left" else 0
        return ids[begin : begin + count]

    def room(self, length: int, pair: bool = False) -> int:
        """Returns how many tokens of text fit into a sequence of `length` tokens together with its special tokens.

        Raises:
          UserError: there is no room for one token of each text.
        """
        return self._room(self.pair_template if pair else self.single_template, length)

    def _room(self, template: tuple[TemplatePart, ...], length: int) -> int:
        texts = sum(part.content in ("A", "B") for part in template)
        room = length - (len(template) - texts)
        if room < texts:
            raise UserError(
                f"length = {length} leaves no room for text beside {len(template) - texts} special tokens"
            )
        return room


def _fill_template(template: tuple[TemplatePart, ...], texts: dict[str, np.ndarray]):
    parts = [texts.get(content, (content,)) for content, _ in template]
    # The parts are small, so this is several times as fast as concatenating arrays.
    ids, segments = np.empty((2, sum(map(len, parts))), np.int32)
    begin = 0
    for part, (_, segment) in zip(parts, template, strict=True):
        end = begin + len(part)
        ids[begin:end], segments[begin:end] = part, segment
        begin = end
    return ids, segments


def bert(vocabulary: Mapping[str, int], *, lower: bool) -> Tokenizer:
    """Returns a WordPiece tokenizer with the special tokens of BERT; pairs of texts become [CLS] A [SEP] B [SEP].

    Args:
      vocabulary: {token: id}; it holds all tokens of `BERT`.
      lower: whether text is lower-cased and stripped of accents.
    """
    model = models.WordPiece(dict(vocabulary), unk_token=BERT["unknown"])
    backend = bert_backend(model, lower)
    backend.add_special_tokens(list(BERT.values()))
    put_around_like_bert(backend, BERT["cls"], BERT["sep"])
    return wrap(backend, BERT)


def bert_backend(
    model, lower: bool, accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """Returns a backend that splits text into words as BERT does, and words into pieces by `model`.

    Args:
      model: a model of the library `tokenizers`, such as `models.WordPiece`.
      lower: whether text is lower-cased.
      accents: whether accents are removed; None removes them if text is lower-cased.
      chinese: whether each Chinese character is a word.
    """
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


def byte_level_backend(model: models.BPE, space: bool = False) -> tokenizers.Tokenizer:
    """Returns a backend that splits text into words as GPT-2 does, and the bytes of words into pieces by `model`.

    Args:
      model: byte-level byte-pair encoding.
      space: whether a space is put before each text.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def put_around_like_bert(backend: tokenizers.Tokenizer, cls: str, sep: str) -> None:
    """Makes the sequences of a backend "cls" A "sep", and "cls" A "sep" B "sep" with B in segment 1, in place."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )


def put_around_like_roberta(
    backend: tokenizers.Tokenizer,
    cls: str,
    sep: str,
    *,
    space: bool = False,
    trim: bool = True,
) -> None:
    """Makes the sequences of a backend "cls" A "sep", and "cls" A "sep" "sep" B "sep" in segment 0, in place.

    Args:
      backend: changed in place.
      cls, sep: tokens of the backend.
      space: whether the backend puts a space before each text.
      trim: whether the places that `Tokenizer.encode` returns exclude the space before a token.
    """
    around = [(token, backend.token_to_id(token)) for token in (sep, cls)]
    backend.post_processor = processors.RobertaProcessing(*around, trim, space)


def wrap(
    backend: tokenizers.Tokenizer,
    special: Mapping[str, str],
    truncation_side: str = "right",
) -> Tokenizer:
    """Returns the `Tokenizer` with a given backend.

    Args:
      backend: a tokenizer of the library `tokenizers`, without truncation and padding.
      special: {role: token}.
      truncation_side: see `Tokenizer`.
    """
    ids = {role: backend.token_to_id(special.get(role, "")) for role in ROLES}
    single, pair = _templates(json.loads(backend.to_str())["post_processor"])
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(
        backend,
        size,
        **ids,
        single_template=single,
        pair_template=pair,
        truncation_side=truncation_side,
    )


def _templates(processor: dict | None):
    """Returns the templates of one text and of two, from the "post_processor" of a tokenizer.json."""
    kind = processor and processor["type"]
    if kind == "Sequence":
        templates = [_templates(each) for each in processor["processors"]]
        return next((t for t in templates if t != ((A,), (A, B))), ((A,), (A, B)))
    if kind == "TemplateProcessing":
        special = processor["special_tokens"]
        return tuple(
            tuple(_template_parts(processor[name], special))
            for name in ("single", "pair")
        )
    if kind in ("BertProcessing", "RobertaProcessing"):
        double = kind == "RobertaProcessing"
        cls, sep = (TemplatePart(processor[name][1], 0) for name in ("cls", "sep"))
        middle = (sep, sep, B._replace(segment=0)) if double else (sep, B)
        last = sep if double else sep._replace(segment=1)
        return (cls, A, sep), (cls, A, *middle, last)
    return (A,), (A, B)


def _template_parts(template: list, special: dict) -> Iterator[TemplatePart]:
    for each in template:
        ((kind, value),) = each.items()
        if kind == "Sequence":
            yield TemplatePart(value["id"], value["type_id"])
        else:
            for id in special[value["id"]]["ids"]:
                yield TemplatePart(id, value["type_id"])
