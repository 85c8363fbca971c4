"""Answers that stand in a document: windows over documents of any length, and answers read off a network's scores.

A window is the question and as much of the document as fits beside it; windows overlap by `stride` tokens. The scheme is
that of BERT, arXiv 1810.04805, section 4.2, and window for window that of `transformers`' tokenizers.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError

CHUNK = 1000  # texts that are tokenized at a time, and windows that are searched


class Text(NamedTuple):
    """A tokenized text: ids int32 [n], and where each token begins and ends in it, in characters, int32 [n, 2]."""

    ids: np.ndarray
    offsets: np.ndarray

    def locate(self, begin: int, end: int) -> tuple[int, int] | None:
        """The first and the last token that has a part of the characters [begin, end); None where none does."""
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


class Found(NamedTuple):
    """Answers read off, numpy arrays [n], those of a question side by side, the best first.

    Attributes:
      question: number of the question.
      begin, end: characters [begin, end) of its document.
      score: sum of the two logits.
    """

    question: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    score: np.ndarray


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], noun: str) -> list[Text]:
    """Tokenizes texts with offsets, in parallel; tells of the progress on stderr if it takes more than a few seconds.

    Args:
      tokenizer: a tokenizer.
      texts: each is tokenized once.
      noun: what they are, for the progress: "documents".
    """
    done, told = [], time.monotonic()
    for begin in range(0, len(texts), CHUNK):
        some = list(texts[begin : begin + CHUNK])
        for found in tokenizer.backend.encode_batch(some, add_special_tokens=False):
            offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
            done.append(Text(np.array(found.ids, np.int32), offsets))
        if time.monotonic() - told > 5:
            told = time.monotonic()
            line = f"tokenized {len(done):,} of {len(texts):,} {noun}"
            print(line, file=sys.stderr, flush=True)
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
    content = [piece.content for piece in tokenizer.two]
    a, b = content.index("A"), content.index("B")
    if a != 1 or b - a < 2 or content[0] != tokenizer.cls:
        raise UserError(
            "the tokenizer does not make sequences like [CLS] question [SEP] document: no answer is at [CLS], so"
            " config.data.tokenizer should be that of an encoder, such as BERT's or RoBERTa's"
        )
    return a, b - a - 1, len(content) - b - 1


def labels(
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


def search(
    windows: Windows,
    documents: Sequence[Text],
    which: Sequence[int],
    start: np.ndarray,
    end: np.ndarray,
    *,
    n_best: int,
    max_answer: int,
) -> Found:
    """The best answers of every question over all its windows.

    The `n_best` highest begins and ends of each window, among tokens of the document, are paired; no token is left out
    because another window shows more around it, and an answer found in two windows counts as the better of them.

    Args:
      windows: of which scores are given.
      documents: tokenized.
      which: the document of each question.
      start, end: logits, float [w, l].
      n_best: answers of a question at most.
      max_answer: tokens of an answer at most.
    """
    parts = []
    for some in range(0, len(windows), CHUNK):
        rows = slice(some, some + CHUNK)
        part = Windows(*(column[rows] for column in windows))
        parts.append(_pairs(part, start[rows], end[rows], n_best, max_answer))
    question, first, last, score = map(np.concatenate, zip(*parts, strict=True))
    texts = [documents[d] for d in which]
    begin = np.array(
        [texts[q].offsets[t, 0] for q, t in zip(question, first, strict=True)], int
    )
    stop = np.array(
        [texts[q].offsets[t, 1] for q, t in zip(question, last, strict=True)], int
    )
    return _rank(Found(question, begin, stop, score), n_best)


def _pairs(windows, start, end, n_best, max_answer):
    """Columns question, first token, last token, score of the `n_best` best pairs of each window."""
    positions = np.arange(start.shape[1])
    stop = windows.place + windows.end - windows.begin
    inside = (positions >= windows.place[:, None]) & (positions < stop[:, None])
    first, start = _top(np.where(inside, start, -np.inf), n_best)
    last, end = _top(np.where(inside, end, -np.inf), n_best)
    tokens = last[:, None, :] - first[:, :, None] + 1
    allowed = (tokens >= 1) & (tokens <= max_answer)
    scores = np.where(allowed, start[:, :, None] + end[:, None, :], -np.inf)
    best, scores = _top(scores.reshape(len(scores), -1), n_best)
    row, rank = np.nonzero(np.isfinite(scores))
    a, b = np.divmod(best[row, rank], last.shape[1])
    shift = (windows.begin - windows.place)[row]
    return (
        windows.question[row],
        first[row, a] + shift,
        last[row, b] + shift,
        scores[row, rank],
    )


def _top(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of the highest of each row, in no order."""
    count = min(count, values.shape[1])
    index = np.argpartition(values, -count, axis=1)[:, -count:]
    return index, np.take_along_axis(values, index, 1)


def _rank(found: Found, n_best: int) -> Found:
    """Each answer of a question once, sorted by score, `n_best` of a question at most."""
    # Of the same characters the better comes first and stays; a tie goes to what begins, then ends first.
    order = np.lexsort((-found.score, found.end, found.begin, found.question))
    found = Found(*(column[order] for column in found))
    same = [column[1:] == column[:-1] for column in found[:3]]
    keep = np.r_[True, ~np.logical_and.reduce(same)][: len(order)]
    found = Found(*(column[keep] for column in found))
    order = np.lexsort((found.end, found.begin, -found.score, found.question))
    found = Found(*(column[order] for column in found))
    first = np.searchsorted(found.question, found.question)
    keep = np.arange(len(first)) - first < n_best
    return Found(*(column[keep] for column in found))


def nothing(
    windows: Windows, start: np.ndarray, end: np.ndarray, questions: int
) -> np.ndarray:
    """Score of "no answer" of every question, float [questions]: the lowest of its windows' at their first token."""
    scores = np.full(questions, np.inf)
    np.minimum.at(scores, windows.question, start[:, 0] + end[:, 0])
    return scores
