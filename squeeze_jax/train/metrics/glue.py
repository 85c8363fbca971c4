"""GLUE's scores, Wang et al., arXiv 1804.07461: each task's own, and the one number that counts in GLUE's mean.

| task                | scores                                                                         | "eval_score"            |
|---------------------|--------------------------------------------------------------------------------|-------------------------|
| cola                | "eval_matthews": Matthews' correlation coefficient                             | that                    |
| sst2, qnli, rte, wnli | "eval_accuracy"                                                              | that                    |
| mrpc, qqp           | "eval_accuracy", "eval_f1" of class 1                                          | their mean              |
| stsb                | "eval_pearson", "eval_spearman"                                                | their mean              |
| mnli                | "eval_accuracy" (matched), "eval_accuracy_mismatched" where the set has such examples | their mean, or the one |

All lie between 0 and 1 (correlations -1 and 1), and higher is better. Where a score is not defined it is 0, the value of
knowing nothing: Matthews' coefficient and F1 where the prediction is constant, as scikit-learn has it in the official
code, and correlations with a constant, or with what is not finite, for which that code (scipy) gives "not a number": of
which no one could say that it is the best.
"""

import jax.numpy as jnp
import numpy as np

from squeeze_jax.train.losses.cross_entropy import scored
from squeeze_jax.train.losses.squared_error import number
from squeeze_jax.train.metrics._metric import Metric

NAMES = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy", "accuracy_mismatched"),
}


def make(data) -> Metric:
    """Scores of one task.

    Args:
      data: has `task`, and `matched`: how many of MNLI's evaluation examples, the first ones, are matched.
    """
    names = NAMES.get(data.task, ("accuracy",))
    if data.task == "mnli" and data.matched in (0, data.num_eval):
        names = ("accuracy",)
    measure = measured_number if data.task == "stsb" else _classes

    def score(sums, rows):
        """The table's scores and "eval_loss"."""
        found = scores(data.task, rows, data.matched)
        loss = sums["loss"] / max(sums["examples"], 1)
        return {"eval_loss": float(loss)} | {f"eval_{k}": v for k, v in found.items()}

    headline = f"eval_{names[0]}" if len(names) == 1 else "eval_score"
    return Metric(measure, score, headline, tuple(f"eval_{n}" for n in (*names, "score")))  # fmt: skip


def scores(task: str, rows, matched: int = 0) -> dict[str, float]:
    """The table's scores without "eval_".

    Args:
      task: of the table.
      rows: "prediction" and "label" [n] of all examples, and "index" [n] where the task is mnli.
      matched: see `make`.
    """
    found, label = np.asarray(rows["prediction"]), np.asarray(rows["label"])
    if task == "stsb":
        made = {
            "pearson": pearson(found, label),
            "spearman": pearson(ranks(found), ranks(label)),
        }
    elif task == "cola":
        made = {"matthews": pearson(found, label)}
    elif task == "mnli" and _both(first := rows["index"] < matched):
        hit = found == label
        made = {
            "accuracy": float(hit[first].mean()),
            "accuracy_mismatched": float(hit[~first].mean()),
        }
    else:
        made = {"accuracy": float((found == label).mean()) if len(label) else 0.0}
        if task in ("mrpc", "qqp"):
            made["f1"] = f1(found, label)
    return made | {"score": float(np.mean(list(made.values())))}


def _both(which: np.ndarray) -> bool:
    return which.any() and not which.all()


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two arrays [n]; of zeros and ones it is Matthews' coefficient. 0 where it is not defined."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if len(a) < 2 or not np.isfinite(a).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in the sorted array [n], equal values at their mean place; not finite ones stay."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return values
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def f1(prediction: np.ndarray, label: np.ndarray) -> float:
    """2 p r / (p + r) of class 1: twice what is rightly said to be in it, of what is said and what is. 0 where nothing is."""
    said, true = np.asarray(prediction) == 1, np.asarray(label) == 1
    total = said.sum() + true.sum()
    return float(2 * (said & true).sum() / total) if total else 0.0


def _classes(logits, batch):
    """logits: [b, classes], "label": int [b] → rows "prediction", "label" [b]."""
    logits, mask = logits.astype(jnp.float32), batch["mask"].astype(jnp.float32)
    losses, _ = scored(logits, batch["label"], batch["mask"])
    sums = {"loss": jnp.sum(losses * mask), "examples": jnp.sum(mask)}
    return sums, {"prediction": jnp.argmax(logits, -1), "label": batch["label"]}


def measured_number(logits, batch):
    """logits: [b, 1], "label": float [b] → sums of squared errors, rows "prediction", "label" [b]."""
    found, mask = number(logits), batch["mask"].astype(jnp.float32)
    losses = jnp.square(found - batch["label"])
    sums = {"loss": jnp.sum(losses * mask), "examples": jnp.sum(mask)}
    return sums, {"prediction": found, "label": batch["label"]}
