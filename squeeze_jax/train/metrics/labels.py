"""Multi-label classification metrics. A class counts as predicted if its probability is at least one half."""

import jax.numpy as jnp
import numpy as np

from squeeze_jax.batches import mask_of
from squeeze_jax.train.losses import _labels
from squeeze_jax.train.losses.binary_cross_entropy import example_losses
from squeeze_jax.train.metrics._metric import Metric

NAMES = ("eval_f1", "eval_f1_macro", "eval_exact", "eval_label_accuracy")


def make(data=None) -> Metric:
    """Returns the metric with the scores "eval_loss" and `NAMES`, which lie between 0 and 1 except the loss.

    "eval_f1" is micro-averaged: 2 TP / (2 TP + FP + FN) over all classes together. "eval_f1_macro" is the mean of the F1
    scores of the classes; a class without labels and predictions has an F1 score of 0, as in scikit-learn. "eval_exact" is
    the share of examples whose labels are all right. "eval_label_accuracy" is the share of all labels that are right.
    """
    return Metric(measure, score, "eval_f1", NAMES, agreement=label_agreement)


def measure(logits, batch):
    """Measures a batch.

    Args:
      logits: [b, classes].
      batch: "label" float [b, classes]; may have a "mask", bool [b].

    Returns:
      Sums, and no rows. "loss", "hits" (right labels), "exact" (examples whose labels are all right) and "examples" are
      float32 []; "true_positives", "positives" (labels) and "predictions" are float32 [classes].
    """
    batch = _labels.read(batch, "metrics.labels")
    mask = mask_of(batch, len(logits)).astype(jnp.float32)
    labels = jnp.asarray(batch["label"])
    losses = example_losses(logits, labels)
    predicted, true = logits >= 0, labels >= 0.5
    weights = mask[:, None]
    hits = predicted == true
    sums = {
        "loss": jnp.sum(jnp.where(mask > 0, losses, 0)),
        "true_positives": jnp.sum((predicted & true) * weights, 0),
        "positives": jnp.sum(true * weights, 0),
        "predictions": jnp.sum(predicted * weights, 0),
        "hits": jnp.sum(hits * weights),
        "exact": jnp.sum(hits.all(-1) * mask),
        "examples": jnp.sum(mask),
    }
    return sums, {}


def score(sums, rows):
    """Returns the scores of `make`."""
    del rows
    examples, classes = max(sums["examples"], 1), len(sums["positives"])
    # F1 = 2 TP / (2 TP + FP + FN); the denominator is the number of positives plus the number of predictions.
    total = np.asarray(sums["positives"] + sums["predictions"], np.float64)
    twice_hits = 2 * np.asarray(sums["true_positives"], np.float64)
    f1 = np.divide(twice_hits, total, out=np.zeros_like(total), where=total > 0)
    return {
        "eval_loss": float(sums["loss"] / examples),
        "eval_f1": float(twice_hits.sum() / total.sum()) if total.any() else 0.0,
        "eval_f1_macro": float(f1.mean()),
        "eval_exact": float(sums["exact"] / examples),
        "eval_label_accuracy": float(sums["hits"] / examples / classes),
    }


def label_agreement(live, exported) -> np.ndarray:
    """Returns for each example the share of classes that two networks predict alike, float [n].

    Args:
      live, exported: outputs of the live network and of an exported file, {name: logits [n, classes]}.
    """
    return np.mean([(live[k] >= 0) == (exported[k] >= 0) for k in live], (0, 2))
