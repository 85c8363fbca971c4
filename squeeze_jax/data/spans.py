"""Cuts questions with long documents into windows, for extractive question answering.

A window is the question and as much of the document as fits beside it; neighbouring windows share `stride` tokens. The scheme
follows BERT, arXiv 1810.04805, section 4.2, and gives exactly the windows of the tokenizers in `transformers`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import text
from squeeze_jax.data.questions import Question, Questions
from squeeze_jax.data.tokenizer import Tokenizer
from squeeze_jax.errors import UserError

CHUNK = 1000  # documents tokenized at a time


class Text(NamedTuple):
    """A tokenized text: the token ids, int32 [n], and the characters [begin, end) of each token, int32 [n, 2]."""

    ids: np.ndarray
    offsets: np.ndarray

    def locate(self, begin: int, end: int) -> tuple[int, int] | None:
        """Returns the first and the last token that overlap the characters [begin, end); None if no token does.

        If several tokens are bytes of one character, all of them overlap it.
        """
        first = int(np.searchsorted(self.offsets[:, 1], begin, side="right"))
        last = int(np.searchsorted(self.offsets[:, 0], end, side="left")) - 1
        return (first, last) if first <= last else None


class Windows(NamedTuple):
    """Windows, as numpy int arrays [w].

    Attributes:
      question: index of the question.
      begin, end: the window shows the tokens [begin, end) of the question's document.
      place: the position of the first of these tokens in the window's sequence.
    """

    question: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.question)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Text]:
    """Tokenizes documents and keeps the characters of each token; prints progress on stderr if it takes long."""
    documents, report = [], text.Progress("documents", len(texts))
    for begin in range(0, len(texts), CHUNK):
        chunk = texts[begin : begin + CHUNK]
        documents += [Text(*encoding) for encoding in tokenizer.locate_many(chunk)]
        report(len(documents))
    return documents


def window_bounds(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yields windows [begin, end) over a document.

    Args:
      tokens: of the document.
      room: the largest number of tokens in a window.
      stride: the number of tokens that a window shares with the one before.
    """
    begin = 0
    while begin + room < tokens:
        yield begin, begin + room
        begin += room - stride
    yield begin, tokens


def make_windows(
    questions: Sequence[np.ndarray],
    documents: Sequence[Text],
    document_of: Sequence[int],
    tokenizer: Tokenizer,
    length: int,
    stride: int,
) -> Windows:
    """Returns the windows of all questions, in order.

    Args:
      questions: the token ids of each question.
      documents: the tokenized documents.
      document_of: the index of each question's document.
      tokenizer: has the special tokens around the texts.
      length: tokens of a window's sequence, special tokens included.
      stride: tokens that a window shares with the one before.

    Raises:
      UserError: a question is so long that its windows would not advance.
    """
    before, between, _ = special_token_counts(tokenizer)
    space = tokenizer.room(length, pair=True)
    rows = []
    for number, (question, document) in enumerate(
        zip(questions, document_of, strict=True)
    ):
        room = space - len(question)
        if room <= stride:
            raise UserError(
                f"config.data.length = {length} leaves {max(room, 0)} tokens for the document beside a question of {len(question)}:"
                f" that should be more than config.data.stride = {stride}; raise length, or lower stride or max_question"
            )
        place = before + len(question) + between
        tokens = len(documents[document].ids)
        rows += [(number, *span, place) for span in window_bounds(tokens, room, stride)]
    return Windows(*np.array(rows, np.int32).reshape(-1, 4).T)


def special_token_counts(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Returns how many special tokens stand before a question, between it and its document, and after the document.

    Raises:
      UserError: the tokenizer does not put its "cls" token alone before the question, and a special token between the two.
    """
    content = [part.content for part in tokenizer.pair_template]
    a, b = content.index("A"), content.index("B")
    if a != 1 or b - a < 2 or content[0] != tokenizer.cls:
        raise UserError(
            "the tokenizer does not make sequences like [CLS] question [SEP] document: no answer is at [CLS], so"
            " config.data.tokenizer should be that of an encoder, such as BERT's or RoBERTa's"
        )
    return a, b - a - 1, len(content) - b - 1


def label_positions(
    windows: Windows, spans: Sequence[tuple[int, int] | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the answer's first and last token in each window, int32 [w] each.

    Both are 0, the position of the first token, if the window does not show the whole answer.

    Args:
      windows: of the questions.
      spans: the answer's first and last token in each question's document; None for no answer.
    """
    pairs = np.array([(-1, -1) if span is None else span for span in spans], np.int32)
    first, last = pairs.reshape(-1, 2)[windows.question].T
    inside = (first >= windows.begin) & (last < windows.end) & (first >= 0)
    shift = windows.place - windows.begin
    return np.where(inside, first + shift, 0), np.where(inside, last + shift, 0)


class Split(NamedTuple):
    """A split of questions, cut into windows.

    Attributes:
      questions: in the order of the file.
      sources: the documents' texts.
      documents: the tokenized documents.
      windows: in the order of the questions.
      reader: reads the windows as sequences, with labels "start" and "end": the positions of the answer's first and last token,
        0 if the window does not show the whole answer.
    """

    questions: list[Question]
    sources: list[str]
    documents: list[Text]
    windows: Windows
    reader: text.SequenceReader

    @property
    def document_of(self) -> list[int]:
        """The index of each question's document."""
        return [question.document for question in self.questions]


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts questions into windows; its attributes are arguments of `tasks.squad.make`."""

    tokenizer: Tokenizer
    length: int
    stride: int
    max_question: int
    buckets: tuple[int, ...]

    def split(
        self, content: Questions, labels: Sequence[tuple[int, int] | None]
    ) -> Split:
        """Returns the questions as windows.

        Args:
          content: the questions and their documents.
          labels: the characters [begin, end) of each question's answer; None for no answer.
        """
        documents = tokenize(self.tokenizer, content.documents)
        questions = self.tokenizer.encode_many([q.text for q in content.questions])
        questions = [ids[: self.max_question] for ids in questions]
        document_of = [question.document for question in content.questions]
        shape = self.tokenizer, self.length, self.stride
        windows = make_windows(questions, documents, document_of, *shape)
        places = [
            label and documents[number].locate(*label)
            for number, label in zip(document_of, labels, strict=True)
        ]
        start, end = label_positions(windows, places)
        pairs = (
            (questions[q], documents[document_of[q]].ids[begin:end])
            for q, begin, end in zip(*windows[:3], strict=True)
        )
        sequences = (self.tokenizer.pair(*pair, self.length) for pair in pairs)
        packed = text.pack(sequences, start=start, end=end)
        reader = text.SequenceReader(
            packed, self.length, self.buckets, self.tokenizer.pad
        )
        return Split(content.questions, content.documents, documents, windows, reader)
