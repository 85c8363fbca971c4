"""Extractive question answering: exact match and F1 of the answers read off all windows, as SQuAD's official evaluation.

In percent, as published. For version 2 also apart for questions with an answer and without, and the best scores that a
threshold on "no answer" would give: that is `config.data.null_threshold`, which `eval_exact` and `eval_f1` are at.
"""

import functools

import jax.numpy as jnp

from squeeze_jax.train.losses import span
from squeeze_jax.train.metrics import _answers
from squeeze_jax.train.metrics._metric import Metric


def make(data) -> Metric:
    """Scores "eval_loss", "eval_exact", "eval_f1", and for version 2 "eval_has_answer_f1", "eval_best_f1_threshold" and so on.

    Args:
      data: of `data.tasks.squad`.
    """
    return Metric(
        functools.partial(measure, length=data.length),
        functools.partial(score, data=data),
        "eval_f1",
        scale=100.0,
    )


def measure(logits, batch, *, length: int):
    """logits: {"start": [b, l], "end": [b, l]}, batch: {"start": int [b], "end": int [b], "mask": bool [b]}, l ≤ length.

    Returns:
      sums "examples" and of each side "<side>_loss" and "<side>_count", the windows whose position is not beyond l; rows
      "start", "end", float32 [b, length]: the logits, -inf beyond l.
    """
    mask, rows = batch["mask"].astype(jnp.float32), {}
    sums = {"examples": jnp.sum(mask)}
    for side in span.SIDES:
        values, inside = span.losses(logits[side], batch[side])
        sums[f"{side}_loss"] = jnp.sum(values * mask * inside)
        sums[f"{side}_count"] = jnp.sum(mask * inside)
        x = logits[side].astype(jnp.float32)
        beyond = ((0, 0), (0, length - x.shape[1]))
        rows[side] = jnp.pad(x, beyond, constant_values=-jnp.inf)
    return sums, rows


def score(sums, rows, *, data):
    """Mean loss, as that of `losses.span` over all windows, and the scores of the answers to all questions."""
    found, golds = data.answers(rows), data.golds
    scores = _answers.evaluate(golds, found.texts(data.threshold), data.version2)
    if data.version2:
        scores |= _answers.thresholds(golds, found.texts(), found.odds)
    sides = [float(sums[f"{k}_loss"] / max(sums[f"{k}_count"], 1)) for k in span.SIDES]
    return {"eval_loss": sum(sides) / len(sides)} | {
        f"eval_{name}": value for name, value in scores.items()
    }
