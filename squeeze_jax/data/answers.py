"""Answers read off a network's scores of where they begin and end, over all windows of a question."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data.spans import Split, Text, Windows

CHUNK = 1000  # windows that are searched at a time
SIDES = ("start", "end")


class Best(NamedTuple):
    """An answer that was read off, and characters [begin, end) of its document; `score` is the sum of two logits."""

    text: str
    begin: int
    end: int
    score: float


class Answers(NamedTuple):
    """What was read off, by the questions' ids.

    Attributes:
      best: answers, the best first; there may be none where logits are not finite.
      nothing: score of "no answer".
    """

    best: dict[str, list[Best]]
    nothing: dict[str, float]

    @property
    def odds(self) -> dict[str, float]:
        """How far the score of "no answer" is above the best answer's."""
        return {
            id: self.nothing[id] - (best[0].score if best else -np.inf)
            for id, best in self.best.items()
        }

    def texts(self, threshold: float | None = None) -> dict[str, str]:
        """The best answers; "" where the odds of "no answer" are above the threshold, if there is one."""
        said = {id: best[0].text if best else "" for id, best in self.best.items()}
        if threshold is None:
            return said
        odds = self.odds
        return {id: "" if odds[id] > threshold else said[id] for id in said}


def read_off(
    split: Split, logits: Mapping[str, np.ndarray], *, n_best: int, max_answer: int
) -> Answers:
    """The best answers to every question of a split.

    Args:
      split: questions as windows.
      logits: "start" and "end", float [w, l], of all its windows in order.
      n_best, max_answer: see `search`.
    """
    sides = [logits[side] for side in SIDES]
    limits = dict(n_best=n_best, max_answer=max_answer)
    found = search(split.windows, split.documents, split.which, *sides, **limits)
    none = nothing(split.windows, *sides, len(split.questions))
    best: dict[str, list[Best]] = {q.id: [] for q in split.questions}
    for number, begin, end, score in zip(*found, strict=True):
        question = split.questions[number]
        text = split.sources[question.document][begin:end]
        begin += len(text) - len(text.lstrip())
        if text := text.strip():
            place = int(begin), int(begin) + len(text)
            best[question.id].append(Best(text, *place, float(score)))
    return Answers(best, dict(zip(best, none.tolist(), strict=True)))


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
    # Windows whose scores are not numbers have no say.
    np.fmin.at(scores, windows.question, start[:, 0] + end[:, 0])
    return scores
