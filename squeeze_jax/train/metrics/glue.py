"""The metrics of the GLUE tasks (Wang et al., arXiv 1804.07461).

Each task has its own scores. "eval_score" is their mean, which is the task's contribution to the average over GLUE.

| task                  | scores                                                                                   |
|-----------------------|------------------------------------------------------------------------------------------|
| cola                  | "eval_matthews": Matthews' correlation coefficient                                       |
| sst2, qnli, rte, wnli | "eval_accuracy"                                                                          |
| mrpc, qqp             | "eval_accuracy", "eval_f1" of class 1                                                    |
| stsb                  | "eval_pearson", "eval_spearman"                                                          |
| mnli                  | "eval_accuracy" (matched), and "eval_accuracy_mismatched" if the data have such examples |

Scores lie between 0 and 1, correlations between -1 and 1; higher is better. A score that is not defined is 0, as for a
network without knowledge. Matthews' coefficient and F1 of constant predictions are 0 in the official code too
(scikit-learn). For correlations with a constant or with values that are not finite, the official code (scipy) returns NaN,
which could not be ranked.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np

from squeeze_jax.batches import mask_of
from squeeze_jax.train.losses import _labels
from squeeze_jax.train.losses.cross_entropy import losses_and_hits
from squeeze_jax.train.losses.squared_error import predicted_number
from squeeze_jax.train.metrics._metric import Metric

NAMES = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy", "accuracy_mismatched"),
}


def make(data) -> Metric:
    """Returns the metric of one task, with the scores of the table, "eval_score" and "eval_loss".

    Args:
      data: the data task. Its `task` is the name in the table; its `matched` is the number of matched examples, which
        come first in MNLI's evaluation set.
    """
    names = NAMES.get(data.task, ("accuracy",))
    if data.task == "mnli" and data.matched in (0, data.num_eval):
        names = ("accuracy",)
    measure = (
        partial(measure_regression, reader="metrics.glue")
        if data.task == "stsb"
        else _measure_classification
    )

    def score(sums, rows):
        named = scores(data.task, rows, data.matched)
        loss = sums["loss"] / max(sums["examples"], 1)
        return {"eval_loss": float(loss)} | {f"eval_{k}": v for k, v in named.items()}

    headline = f"eval_{names[0]}" if len(names) == 1 else "eval_score"
    return Metric(measure, score, headline, tuple(f"eval_{n}" for n in (*names, "score")))  # fmt: skip


def scores(task: str, rows, matched: int = 0) -> dict[str, float]:
    """Returns the scores of a task and their mean "score", under the names of the table without "eval_".

    Args:
      task: name of the task in the table.
      rows: "prediction" and "label" [n] of all examples; for the task mnli also "index" [n].
      matched: see `make`.
    """
    prediction, label = np.asarray(rows["prediction"]), np.asarray(rows["label"])
    if task == "stsb":
        values = {
            "pearson": pearson(prediction, label),
            "spearman": pearson(ranks(prediction), ranks(label)),
        }
    elif task == "cola":
        values = {"matthews": pearson(prediction, label)}
    elif task == "mnli" and _is_mixed(is_matched := rows["index"] < matched):
        hits = prediction == label
        values = {
            "accuracy": float(hits[is_matched].mean()),
            "accuracy_mismatched": float(hits[~is_matched].mean()),
        }
    else:
        hits = prediction == label
        values = {"accuracy": float(hits.mean()) if len(label) else 0.0}
        if task in ("mrpc", "qqp"):
            values["f1"] = f1(prediction, label)
    return values | {"score": float(np.mean(list(values.values())))}


def _is_mixed(flags: np.ndarray) -> bool:
    """Returns whether some flags are true and some are false."""
    return flags.any() and not flags.all()


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Pearson's correlation of two arrays [n], or 0 if it is not defined.

    For arrays of zeros and ones it equals Matthews' correlation coefficient.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if len(a) < 2 or not np.isfinite(a).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks of values [n], counted from 1; equal values get the mean of their ranks.

    Returns the values unchanged if one of them is not finite.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return values
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def f1(prediction: np.ndarray, label: np.ndarray) -> float:
    """Returns the F1 score of class 1: 2 TP / (2 TP + FP + FN); 0 if class 1 occurs in neither array.

    Args:
      prediction, label: int [n], the predicted and the true classes.
    """
    predicted, true = np.asarray(prediction) == 1, np.asarray(label) == 1
    total = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / total) if total else 0.0


def _measure_classification(logits, batch):
    """Measures a batch: logits [b, classes], "label" int [b] → sums "loss", "examples"; rows "prediction", "label" [b]."""
    batch = _labels.read(batch, "metrics.glue")
    labels, mask = jnp.asarray(batch["label"]), mask_of(batch, len(logits))
    logits, mask = logits.astype(jnp.float32), mask.astype(jnp.float32)
    losses, _ = losses_and_hits(logits, labels, mask)
    sums = {"loss": jnp.sum(losses * mask), "examples": jnp.sum(mask)}
    return sums, {"prediction": jnp.argmax(logits, -1), "label": labels}


def measure_regression(logits, batch, reader: str = "metrics.regression"):
    """Measures a batch of a regression.

    Args:
      logits: [b, 1].
      batch: "label" float [b]; may have a "mask", bool [b].
      reader: the metric, for errors.

    Returns:
      The sums "loss" (squared errors) and "examples", float32 []; and the rows "prediction" and "label", float [b].
    """
    prediction = predicted_number(logits)
    batch = _labels.read(batch, reader)
    mask = mask_of(batch, len(logits)).astype(jnp.float32)
    labels = _labels.numbers_of(batch, len(logits))
    losses = jnp.square(prediction - labels)
    sums = {"loss": jnp.sum(losses * mask), "examples": jnp.sum(mask)}
    return sums, {"prediction": prediction, "label": labels}
