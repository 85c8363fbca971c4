"""Finds the best answers to questions from a network's logits for where an answer begins and ends, over all windows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data.spans import Split, Text, Windows

CHUNK = 1000  # windows searched at a time
SIDES = ("start", "end")


class Best(NamedTuple):
    """An answer: its text, the characters [begin, end) of the document, and its score, the sum of two logits."""

    text: str
    begin: int
    end: int
    score: float


class Answers(NamedTuple):
    """The answers to questions, as dicts by the questions' ids.

    Attributes:
      best: the answers to a question, the best first; the list may be empty if logits are not finite.
      no_answer: the score of "no answer" to a question.
    """

    best: dict[str, list[Best]]
    no_answer: dict[str, float]

    @property
    def odds(self) -> dict[str, float]:
        """The score of "no answer" minus the best answer's score, for each question."""
        return {
            id: self.no_answer[id] - (best[0].score if best else -np.inf)
            for id, best in self.best.items()
        }

    def texts(self, threshold: float | None = None) -> dict[str, str]:
        """Returns the text of the best answer to each question; "" for "no answer".

        Args:
          threshold: "no answer" wins if its `odds` are above this; None for questions that all have an answer.
        """
        texts = {id: best[0].text if best else "" for id, best in self.best.items()}
        if threshold is None:
            return texts
        odds = self.odds
        return {id: "" if odds[id] > threshold else texts[id] for id in texts}


def best_answers(
    split: Split, logits: Mapping[str, np.ndarray], *, n_best: int, max_answer: int
) -> Answers:
    """Returns the best answers to every question of a split.

    Args:
      split: the questions as windows.
      logits: {"start", "end"}: float [w, l], for all windows in order.
      n_best, max_answer: see `search`.
    """
    sides = [logits[side] for side in SIDES]
    limits = dict(n_best=n_best, max_answer=max_answer)
    candidates = search(
        split.windows, split.documents, split.document_of, *sides, **limits
    )
    no_answer = no_answer_scores(split.windows, *sides, len(split.questions))
    best: dict[str, list[Best]] = {q.id: [] for q in split.questions}
    for index, begin, end, score in zip(*candidates, strict=True):
        question = split.questions[index]
        text = split.sources[question.document][begin:end]
        begin += len(text) - len(text.lstrip())
        if text := text.strip():
            place = int(begin), int(begin) + len(text)
            best[question.id].append(Best(text, *place, float(score)))
    return Answers(best, dict(zip(best, no_answer.tolist(), strict=True)))


class Candidates(NamedTuple):
    """Possible answers, as numpy arrays [n]; those of one question are neighbours, the best first.

    Attributes:
      question: index of the question.
      begin, end: characters [begin, end) of its document.
      score: the sum of the two logits.
    """

    question: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    score: np.ndarray


def search(
    windows: Windows,
    documents: Sequence[Text],
    document_of: Sequence[int],
    start: np.ndarray,
    end: np.ndarray,
    *,
    n_best: int,
    max_answer: int,
) -> Candidates:
    """Returns the best answers to every question over all its windows.

    In each window it combines the `n_best` tokens of the document with the highest start logits and those with the highest end
    logits. A token counts in every window that shows it, even if another window shows more of the text around it. An answer
    that occurs in two windows gets the higher of its two scores.

    Args:
      windows: the windows that the logits belong to.
      documents: the tokenized documents.
      document_of: the index of each question's document.
      start, end: logits, float [w, l].
      n_best: the largest number of answers to a question.
      max_answer: the largest number of tokens in an answer.
    """
    parts = []
    for first_row in range(0, len(windows), CHUNK):
        rows = slice(first_row, first_row + CHUNK)
        part = Windows(*(column[rows] for column in windows))
        parts.append(_best_spans(part, start[rows], end[rows], n_best, max_answer))
    question, first, last, score = map(np.concatenate, zip(*parts, strict=True))
    texts = [documents[d] for d in document_of]
    begin = np.array(
        [texts[q].offsets[t, 0] for q, t in zip(question, first, strict=True)], int
    )
    stop = np.array(
        [texts[q].offsets[t, 1] for q, t in zip(question, last, strict=True)], int
    )
    return _rank(Candidates(question, begin, stop, score), n_best)


def _best_spans(windows, start, end, n_best, max_answer):
    """Returns the arrays question, first token, last token and score of the `n_best` best spans of each window."""
    positions = np.arange(start.shape[1])
    stop = windows.place + windows.end - windows.begin
    inside = (positions >= windows.place[:, None]) & (positions < stop[:, None])
    first, start = _highest(np.where(inside, start, -np.inf), n_best)
    last, end = _highest(np.where(inside, end, -np.inf), n_best)
    tokens = last[:, None, :] - first[:, :, None] + 1
    allowed = (tokens >= 1) & (tokens <= max_answer)
    scores = np.where(allowed, start[:, :, None] + end[:, None, :], -np.inf)
    best, scores = _highest(scores.reshape(len(scores), -1), n_best)
    row, rank = np.nonzero(np.isfinite(scores))
    a, b = np.divmod(best[row, rank], last.shape[1])
    shift = (windows.begin - windows.place)[row]
    return (
        windows.question[row],
        first[row, a] + shift,
        last[row, b] + shift,
        scores[row, rank],
    )


def _highest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices and the values of the `count` highest entries of each row, in no particular order."""
    count = min(count, values.shape[1])
    index = np.argpartition(values, -count, axis=1)[:, -count:]
    return index, np.take_along_axis(values, index, 1)


def _rank(candidates: Candidates, n_best: int) -> Candidates:
    """Returns each answer to a question once, sorted by score, at most `n_best` per question."""
    # The first of several answers with the same characters is kept: the one with the highest score. If scores are equal, the
    # answer that begins first ranks higher, then the one that ends first.
    order = np.lexsort(
        (-candidates.score, candidates.end, candidates.begin, candidates.question)
    )
    candidates = Candidates(*(column[order] for column in candidates))
    same = [column[1:] == column[:-1] for column in candidates[:3]]
    keep = np.r_[True, ~np.logical_and.reduce(same)][: len(order)]
    candidates = Candidates(*(column[keep] for column in candidates))
    order = np.lexsort(
        (candidates.end, candidates.begin, -candidates.score, candidates.question)
    )
    candidates = Candidates(*(column[order] for column in candidates))
    first = np.searchsorted(candidates.question, candidates.question)
    keep = np.arange(len(first)) - first < n_best
    return Candidates(*(column[keep] for column in candidates))


def no_answer_scores(
    windows: Windows, start: np.ndarray, end: np.ndarray, questions: int
) -> np.ndarray:
    """Returns the score of "no answer" to every question, float [questions].

    A window's score is the sum of the two logits at its first token. A question's score is the lowest of its windows.

    Args:
      windows: the windows that the logits belong to.
      start, end: logits, float [w, l].
      questions: the number of questions.
    """
    scores = np.full(questions, np.inf)
    # `fmin` ignores windows whose scores are not numbers.
    np.fmin.at(scores, windows.question, start[:, 0] + end[:, 0])
    return scores
