"""Several labels per example: a class counts as predicted where its probability is at least one half."""

import jax.numpy as jnp
import numpy as np

from squeeze_jax.train.losses.binary_cross_entropy import scored
from squeeze_jax.train.metrics._metric import Metric

NAMES = ("eval_f1", "eval_f1_macro", "eval_exact", "eval_label_accuracy")


def make(data=None) -> Metric:
    """Scores "eval_loss" and those in `NAMES`, all but the loss between 0 and 1.

    "eval_f1" is micro-averaged: 2 TP / (2 TP + FP + FN) of all classes together. "eval_f1_macro" is the mean of the classes' F1
    scores, of which one without labels and predictions is 0, as in scikit-learn. "eval_exact" is the share of examples
    whose labels are all right, and "eval_label_accuracy" that of right labels.
    """
    return Metric(measure, score, "eval_f1", NAMES, agreement=same_labels)


def measure(logits, batch):
    """logits: [b, classes], batch: {"label": float [b, classes], "mask": bool [b]} → sums of losses and of right labels."""
    mask = batch["mask"].astype(jnp.float32)
    predicted, true = logits >= 0, batch["label"] >= 0.5
    counted = mask[:, None]
    hits = predicted == true
    sums = {
        "loss": jnp.sum(jnp.where(mask > 0, scored(logits, batch["label"]), 0)),
        "true_positives": jnp.sum((predicted & true) * counted, 0),
        "positives": jnp.sum(true * counted, 0),
        "predictions": jnp.sum(predicted * counted, 0),
        "hits": jnp.sum(hits * counted),
        "exact": jnp.sum(hits.all(-1) * mask),
        "examples": jnp.sum(mask),
    }
    return sums, {}


def score(sums, rows):
    """Returns the scores of `make`."""
    del rows
    examples, classes = max(sums["examples"], 1), len(sums["positives"])
    both = np.asarray(sums["positives"] + sums["predictions"], np.float64)
    double = 2 * np.asarray(sums["true_positives"], np.float64)
    each = np.divide(double, both, out=np.zeros_like(both), where=both > 0)
    return {
        "eval_loss": float(sums["loss"] / examples),
        "eval_f1": float(double.sum() / both.sum()) if both.any() else 0.0,
        "eval_f1_macro": float(each.mean()),
        "eval_exact": float(sums["exact"] / examples),
        "eval_label_accuracy": float(sums["hits"] / examples / classes),
    }


def same_labels(live, found) -> np.ndarray:
    """Returns the share of classes with the same prediction, float [n], of outputs {name: [n, classes]}."""
    return np.mean([(live[k] >= 0) == (found[k] >= 0) for k in live], (0, 2))
