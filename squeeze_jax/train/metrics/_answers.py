"""How well answers in words agree with the accepted ones: exact match and F1 of SQuAD, arXiv 1606.05250 and 1806.03822.

The rules are those of the official evaluation, so that its numbers come out for the same predictions, odd corners
included: SQuAD 1.1 and 2.0 differ in what two texts share that have no word left once articles are gone.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """What is compared of a text: words in lower case, without ASCII punctuation, then without English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def accepted(answers: Sequence[str], version2: bool) -> list[str]:
    """The texts that a prediction is compared with; in SQuAD 2.0 "" stands for no answer."""
    if not version2:
        return list(answers)
    return [text for text in answers if words(text)] or [""]


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the words are those of one of the accepted answers, in order."""
    said = words(prediction)
    return float(any(said == words(text) for text in answers))


def f1(prediction: str, answers: Sequence[str], version2: bool = False) -> float:
    """2 p r / (p + r) of the words as bags, for the accepted answer where it is the highest.

    Args:
      prediction: text.
      answers: accepted texts.
      version2: whether two texts without a word agree, as in SQuAD 2.0; in 1.1 they have nothing in common.
    """
    said = Counter(words(prediction))
    return max(_overlap(said, Counter(words(t)), version2) for t in answers)


def _overlap(said: Counter, wanted: Counter, version2: bool) -> float:
    if not said or not wanted:
        return float(version2 and said == wanted)
    # 2pr / (p + r) with p = common / said and r = common / wanted.
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def evaluate(
    answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], version2: bool
) -> dict[str, float]:
    """Exact match and F1 in percent over all questions; a question without a prediction is an error of the caller.

    Args:
      answers: accepted texts of each question's id; none where the question has no answer.
      predictions: the text for each id; "" says that there is no answer.
      version2: by the rules of SQuAD 2.0, which also tells questions with an answer from those without.

    Returns:
      "exact" and "f1", and for 2.0 the same with "has_answer_" and "no_answer_" before, where there are such questions.
    """
    scores = each(answers, predictions, version2)
    has = np.array([bool(texts) for texts in answers.values()])
    groups = {"": np.ones_like(has)}
    if version2:
        groups |= {"has_answer_": has, "no_answer_": ~has}
    return {
        f"{group}{name}": 100 * float(values[which].mean())
        for group, which in groups.items()
        if which.any()
        for name, values in scores.items()
    }


def each(
    answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], version2: bool
) -> dict[str, np.ndarray]:
    """ "exact" and "f1" of every question, 0 to 1, in the order of `answers`."""
    rows = [(predictions[id], accepted(a, version2)) for id, a in answers.items()]
    return {
        "exact": np.array([exact(*row) for row in rows]),
        "f1": np.array([f1(*row, version2) for row in rows]),
    }


def thresholds(
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    odds: Mapping[str, float],
) -> dict[str, float]:
    """The best scores of SQuAD 2.0 in percent that a threshold on the odds of "no answer" can give, and where they are.

    Questions are answered in the order of their odds, the others count as said to have no answer; the best point of
    that order is found for each score by itself.

    Args:
      answers: see `evaluate`.
      predictions: the text for each id, as if every question had an answer.
      odds: of "no answer" for each id, any scale, more is likelier.

    Returns:
      "best_exact", "best_exact_threshold", "best_f1", "best_f1_threshold": no answer where the odds are above that;
      0 where answering nothing is best.
    """
    has = np.array([bool(texts) for texts in answers.values()])
    said = np.array([bool(predictions[id]) for id in answers])
    values = np.array([odds[id] for id in answers], np.float64)
    order = np.argsort(values, kind="stable")
    best = {}
    for name, scores in each(answers, predictions, True).items():
        # Answering a question gains its score; answering what has no answer loses the point of having said nothing.
        gains = np.cumsum(np.where(has, scores, -said.astype(float))[order])
        at = int(gains.argmax())
        gain = max(gains[at], 0.0)
        best[f"best_{name}"] = 100 * float(((~has).sum() + gain) / len(has))
        best[f"best_{name}_threshold"] = float(values[order][at]) if gain > 0 else 0.0
    return best
