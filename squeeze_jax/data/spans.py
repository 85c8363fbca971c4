"""Windows over documents of any length, for questions whose answers stand in them.

A window is the question and as much of the document as fits beside it; windows overlap by `stride` tokens. The scheme is
that of BERT, arXiv 1810.04805, section 4.2, and window for window that of `transformers`' tokenizers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import text
from squeeze_jax.data.questions import Question, Questions
from squeeze_jax.data.tokenizer import Tokenizer
from squeeze_jax.errors import UserError

CHUNK = 1000  # documents that are tokenized at a time


class Text(NamedTuple):
    """A tokenized text: ids int32 [n], and where each token begins and ends in it, in characters, int32 [n, 2]."""

    ids: np.ndarray
    offsets: np.ndarray

    def locate(self, begin: int, end: int) -> tuple[int, int] | None:
        """The first and the last token that has a part of the characters [begin, end); None where none does.

        Of several tokens that are bytes of one character all count.
        """
        first = int(np.searchsorted(self.offsets[:, 1], begin, side="right"))
        last = int(np.searchsorted(self.offsets[:, 0], end, side="left")) - 1
        return (first, last) if first <= last else None


class Windows(NamedTuple):
    """Windows, numpy int arrays [w].

    Attributes:
      question: number of the question.
      begin, end: which tokens of its document the window shows, [begin, end).
      place: where in the sequence the first of these stands.
    """

    question: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.question)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Text]:
    """Tokenizes documents with offsets; tells on stderr how far it is."""
    done, tell = [], text.Progress("documents", len(texts))
    for begin in range(0, len(texts), CHUNK):
        some = texts[begin : begin + CHUNK]
        done += [Text(*found) for found in tokenizer.locate_many(some)]
        tell(len(done))
    return done


def cut(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Windows [begin, end) of up to `room` tokens over a document, each `stride` tokens into the one before."""
    begin = 0
    while begin + room < tokens:
        yield begin, begin + room
        begin += room - stride
    yield begin, tokens


def windows(
    questions: Sequence[np.ndarray],
    documents: Sequence[Text],
    which: Sequence[int],
    tokenizer: Tokenizer,
    length: int,
    stride: int,
) -> Windows:
    """Windows of all questions, in order.

    Args:
      questions: ids of their tokens.
      documents: tokenized.
      which: the document of each question.
      tokenizer: whose special tokens stand around.
      length: of a sequence, special tokens included.
      stride: tokens that a window has in common with the one before.

    Raises:
      UserError: a question so long that windows would not get on.
    """
    before, between, _ = around(tokenizer)
    space = tokenizer.room(length, pair=True)
    rows = []
    for number, (question, document) in enumerate(zip(questions, which, strict=True)):
        room = space - len(question)
        if room <= stride:
            raise UserError(
                f"config.data.length = {length} leaves {max(room, 0)} tokens for the document beside a question of {len(question)}:"
                f" that should be more than config.data.stride = {stride}; raise length, or lower stride or max_question"
            )
        place = before + len(question) + between
        tokens = len(documents[document].ids)
        rows += [(number, *span, place) for span in cut(tokens, room, stride)]
    return Windows(*np.array(rows, np.int32).reshape(-1, 4).T)


def around(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """How many special tokens stand before a question, between it and the document, and after that.

    Raises:
      UserError: a tokenizer that does not put one token, such as [CLS], before and [SEP] between.
    """
    content = [part.content for part in tokenizer.pair_template]
    a, b = content.index("A"), content.index("B")
    if a != 1 or b - a < 2 or content[0] != tokenizer.cls:
        raise UserError(
            "the tokenizer does not make sequences like [CLS] question [SEP] document: no answer is at [CLS], so"
            " config.data.tokenizer should be that of an encoder, such as BERT's or RoBERTa's"
        )
    return a, b - a - 1, len(content) - b - 1


def marks(
    windows: Windows, spans: Sequence[tuple[int, int] | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Where in each window the answer begins and ends, int32 [w]; (0, 0), the first token, where it is not in there whole.

    Args:
      windows: of the questions.
      spans: the first and the last token of the answer in each question's document; None for no answer.
    """
    known = np.array([(-1, -1) if span is None else span for span in spans], np.int32)
    first, last = known.reshape(-1, 2)[windows.question].T
    inside = (first >= windows.begin) & (last < windows.end) & (first >= 0)
    shift = windows.place - windows.begin
    return np.where(inside, first + shift, 0), np.where(inside, last + shift, 0)


class Split(NamedTuple):
    """Questions as windows.

    Attributes:
      questions: that windows are of.
      sources: the documents' texts.
      documents: the same tokenized.
      windows: in the order of the questions.
      reader: of what a network reads, and labels "start" and "end", 0 where a window does not show the answer.
    """

    questions: list[Question]
    sources: list[str]
    documents: list[Text]
    windows: Windows
    reader: text.SequenceReader

    @property
    def which(self) -> list[int]:
        """The document of each question."""
        return [question.document for question in self.questions]


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Makes windows of questions; attributes as the arguments of `tasks.squad.make`."""

    tokenizer: Tokenizer
    length: int
    stride: int
    max_question: int
    buckets: tuple[int, ...]

    def split(
        self, content: Questions, labels: Sequence[tuple[int, int] | None]
    ) -> Split:
        """Windows of the questions, with labels from characters [begin, end) of each one's answer, or None."""
        documents = tokenize(self.tokenizer, content.documents)
        asked = self.tokenizer.encode_many([q.text for q in content.questions])
        asked = [ids[: self.max_question] for ids in asked]
        which = [question.document for question in content.questions]
        shape = self.tokenizer, self.length, self.stride
        made = windows(asked, documents, which, *shape)
        places = [
            label and documents[number].locate(*label)
            for number, label in zip(which, labels, strict=True)
        ]
        start, end = marks(made, places)
        pairs = (
            (asked[q], documents[which[q]].ids[begin:end])
            for q, begin, end in zip(*made[:3], strict=True)
        )
        sequences = (self.tokenizer.pair(*pair, self.length) for pair in pairs)
        packed = text.pack(sequences, start=start, end=end)
        reader = text.SequenceReader(
            packed, self.length, self.buckets, self.tokenizer.pad
        )
        return Split(content.questions, content.documents, documents, made, reader)
