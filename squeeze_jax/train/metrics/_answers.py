"""Scores answers against accepted answers: exact match and F1 of SQuAD (arXiv 1606.05250 and 1806.03822).

The rules are those of the official evaluation, also in special cases, so that the same predictions get the same scores.
One such case: for two texts that have no words left after articles are removed, F1 is 0 in SQuAD 1.1 and 1 in SQuAD 2.0.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Returns the words of a text that scores compare: in lower case, without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def accepted_answers(answers: Sequence[str], version2: bool) -> list[str]:
    """Returns the answers that a prediction is compared with.

    For SQuAD 2.0 it drops answers without words, and returns [""], which stands for "no answer", if none is left.
    """
    if not version2:
        return list(answers)
    return [text for text in answers if words(text)] or [""]


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the prediction has the same words in the same order as one of the accepted answers, else 0.0."""
    predicted = words(prediction)
    return float(any(predicted == words(text) for text in answers))


def f1(prediction: str, answers: Sequence[str], version2: bool = False) -> float:
    """Returns the F1 score of a prediction's words, 0 to 1: the highest over the accepted answers.

    F1 = 2 p r / (p + r), where p and r are precision and recall of the words, which are compared without their order.

    Args:
      prediction: the predicted text.
      answers: the accepted texts.
      version2: whether two texts without words get an F1 of 1, as in SQuAD 2.0; in SQuAD 1.1 they get 0.
    """
    predicted = Counter(words(prediction))
    return max(_f1(predicted, Counter(words(text)), version2) for text in answers)


def _f1(predicted: Counter, accepted: Counter, version2: bool) -> float:
    """Returns the F1 score of two bags of words; see `f1`."""
    if not predicted or not accepted:
        return float(version2 and predicted == accepted)
    # 2 p r / (p + r) with p = common / predicted and r = common / accepted.
    return 2 * (predicted & accepted).total() / (predicted.total() + accepted.total())


def evaluate(
    answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], version2: bool
) -> dict[str, float]:
    """Returns exact match and F1 in percent, averaged over all questions.

    Args:
      answers: {id of a question: accepted answers}; an empty list if the question has no answer.
      predictions: {id: predicted text}, with every id of `answers`; "" predicts that there is no answer.
      version2: whether the rules of SQuAD 2.0 apply.

    Returns:
      "exact" and "f1". For SQuAD 2.0 also "has_answer_exact", "has_answer_f1", "no_answer_exact" and "no_answer_f1", over
      the questions with and without an answer, if there are such questions.
    """
    scores = question_scores(answers, predictions, version2)
    has_answer = np.array([bool(texts) for texts in answers.values()])
    groups = {"": np.ones_like(has_answer)}
    if version2:
        groups |= {"has_answer_": has_answer, "no_answer_": ~has_answer}
    return {
        f"{prefix}{name}": 100 * float(values[in_group].mean())
        for prefix, in_group in groups.items()
        if in_group.any()
        for name, values in scores.items()
    }


def question_scores(
    answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], version2: bool
) -> dict[str, np.ndarray]:
    """Returns "exact" and "f1" of every question, 0 to 1, as arrays in the order of `answers`; see `evaluate`."""
    pairs = [
        (predictions[id], accepted_answers(texts, version2))
        for id, texts in answers.items()
    ]
    return {
        "exact": np.array([exact(*pair) for pair in pairs]),
        "f1": np.array([f1(*pair, version2) for pair in pairs]),
    }


def thresholds(
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    odds: Mapping[str, float],
) -> dict[str, float]:
    """Returns the best SQuAD 2.0 scores in percent that a threshold for "no answer" can reach, and the best thresholds.

    A question gets the answer "no answer" if its odds of having no answer exceed the threshold. The thresholds of exact
    match and F1 are chosen independently.

    Args:
      answers: see `evaluate`.
      predictions: {id: predicted text}, as if every question had an answer.
      odds: {id: odds that the question has no answer}, on any scale.

    Returns:
      "best_exact", "best_exact_threshold", "best_f1" and "best_f1_threshold". A threshold is 0 if it is best to answer
      no question at all.
    """
    has_answer = np.array([bool(texts) for texts in answers.values()])
    is_predicted = np.array([bool(predictions[id]) for id in answers])
    values = np.array([odds[id] for id in answers], np.float64)
    order = np.argsort(values, kind="stable")
    best = {}
    for name, scores in question_scores(answers, predictions, True).items():
        # Begin without any answers, which earns one point for each question that has none. Then answer the questions in
        # the order of their odds: this gains the score of a question with an answer, and loses the point of one without.
        changes = np.where(has_answer, scores, -is_predicted.astype(float))
        gains = np.cumsum(changes[order])
        best_index = int(gains.argmax())
        gain = max(gains[best_index], 0.0)
        best[f"best_{name}"] = 100 * float(((~has_answer).sum() + gain) / len(order))
        threshold = float(values[order][best_index]) if gain > 0 else 0.0
        best[f"best_{name}_threshold"] = threshold
    return best
