"""Metrics of extractive question answering: exact match and F1 of the answers, as in SQuAD's official evaluation.

An answer is chosen among all windows of a question. Scores are in percent, as published. For SQuAD 2.0 there are also
scores for questions with an answer and for those without, and the best scores that any threshold for "no answer" could
reach. "eval_exact" and "eval_f1" use the threshold `config.data.null_threshold`.
"""

import functools

import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.train.losses import span
from squeeze_jax.train.losses.masked_lm import head_logits
from squeeze_jax.train.metrics import _answers
from squeeze_jax.train.metrics._metric import Metric


def make(data) -> Metric:
    """Returns the metric with the scores "eval_loss", "eval_exact" and "eval_f1".

    For SQuAD 2.0 it also has the scores of `_answers.thresholds` and those of questions with and without an answer, such
    as "eval_best_f1_threshold" and "eval_has_answer_f1".

    Args:
      data: a data task of `data.tasks.squad`.
    """
    return Metric(
        functools.partial(measure, length=data.length),
        functools.partial(score, data=data),
        "eval_f1",
        scale=100.0,
    )


def measure(logits, batch, *, length: int):
    """Measures a batch of windows.

    Args:
      logits: {"start": [b, l], "end": [b, l]} with l ≤ length.
      batch: "start" int [b] and "end" int [b]; may have a "mask", bool [b].
      length: number of positions in the rows.

    Returns:
      The sums "examples", and for each side "<side>_loss" and "<side>_count", the number of windows whose position is
      below l. The rows "start" and "end", float32 [b, length]: the logits, padded with -inf.
    """
    batch, rows = batches.read(batch, "metrics.squad"), {}
    mask = batches.example_weights(batch, len(head_logits(logits, "start")))
    sums = {"examples": jnp.sum(mask)}
    for side in span.SIDES:
        scores = head_logits(logits, side)
        losses, inside = span.position_losses(scores, jnp.asarray(batch[side]))
        sums[f"{side}_loss"] = jnp.sum(losses * mask * inside)
        sums[f"{side}_count"] = jnp.sum(mask * inside)
        x = scores.astype(jnp.float32)
        padding = ((0, 0), (0, length - x.shape[1]))
        rows[side] = jnp.pad(x, padding, constant_values=-jnp.inf)
    return sums, rows


def score(sums, rows, *, data):
    """Returns the scores of `make`: the mean loss over all windows, as in `losses.span`, and the scores of all answers."""
    answers, golds = data.answers(rows), data.golds
    scores = _answers.evaluate(golds, answers.texts(data.threshold), data.version2)
    if data.version2:
        scores |= _answers.thresholds(golds, answers.texts(), answers.odds)
    sides = [float(sums[f"{k}_loss"] / max(sums[f"{k}_count"], 1)) for k in span.SIDES]
    return {"eval_loss": sum(sides) / len(sides)} | {
        f"eval_{name}": value for name, value in scores.items()
    }
