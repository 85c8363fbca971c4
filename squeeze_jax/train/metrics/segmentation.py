"""Semantic segmentation metrics, computed from the confusion matrix of all pixels.

Pixel accuracy and mean IoU are defined as by Long et al., arXiv 1411.4038, section 5: with n_ij the number of pixels of class
i predicted as class j, IoU_i = n_ii / (Σ_j n_ij + Σ_j n_ji - n_ii). The matrix is summed over the whole evaluation set
before any score is computed.
"""

import re
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from squeeze_jax.batches import example_weights
from squeeze_jax.train.losses import _labels
from squeeze_jax.train.losses.cross_entropy import labels_and_mask, losses_and_hits
from squeeze_jax.train.metrics._metric import Metric

HEADLINE = "eval_mean_iou"


def make(data) -> Metric:
    """Returns the metric with the scores "eval_loss", "eval_pixel_accuracy", "eval_mean_iou" and "eval_iou_CLASS".

    There is one "eval_iou_CLASS" per class, with "_" for characters other than letters and digits. If two classes would have
    the same name, such as "low+" and "low-", the later one gets a number: "eval_iou_low__2". A class that occurs in neither
    targets nor predictions has no IoU: the mean does not count it, and its score is absent.

    Args:
      data: the data task, whose `label_names` are the names of the classes.
    """
    names = tuple("eval_iou_" + re.sub(r"\W+", "_", n) for n in data.label_names)
    choices = ("eval_pixel_accuracy", HEADLINE)
    return Metric(measure, partial(score, names), HEADLINE, names=choices)


def measure(logits, batch):
    """Measures a batch.

    Args:
      logits: [b, h, w, classes].
      batch: "target" int [b, h, w]; may have a "mask", bool [b].

    Returns:
      The sums "loss" and "examples", float32 [], and "confusion", int32 [classes, classes], whose rows are the true
      classes; and no rows. The matrix has integers, because float32 cannot count beyond 2**24 pixels.
    """
    batch = _labels.read(batch, "metrics.segmentation")
    logits, classes = logits.astype(jnp.float32), logits.shape[-1]
    labels, counts = labels_and_mask(logits, batch)
    losses, _ = losses_and_hits(logits, labels, counts)
    cell = labels * classes + jnp.argmax(logits, -1)
    valid = counts & (labels >= 0) & (labels < classes)
    # Pixels that do not count go to one more cell, which is dropped.
    cell = jnp.where(valid, cell, classes * classes)
    cells = jnp.zeros(classes * classes + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    sums = {
        "loss": jnp.sum(jnp.where(counts, losses, 0)),
        "confusion": cells[:-1].reshape(classes, classes),
        "examples": jnp.sum(example_weights(batch, len(logits))),
    }
    return sums, {}


def score(names, sums, rows):
    """Returns the scores of `make`; `names` are the names of the scores of the classes."""
    del rows
    confusion = np.asarray(sums["confusion"], np.int64)
    # The loss is NaN if logits are NaN or a label is none of the classes.
    if np.isnan(sums["loss"]):
        overall = ("eval_loss", "eval_pixel_accuracy", HEADLINE)
        return dict.fromkeys(overall, float("nan"))
    hits, pixels = np.diag(confusion), max(int(confusion.sum()), 1)
    union = confusion.sum(0) + confusion.sum(1) - hits
    present = np.flatnonzero(union)
    unnamed = range(len(names), len(confusion))
    names = _unique([*names, *(f"eval_iou_{c}" for c in unnamed)])
    iou = {int(c): float(hits[c] / union[c]) for c in present}
    return {
        "eval_loss": sums["loss"] / pixels,
        "eval_pixel_accuracy": float(hits.sum() / pixels),
        HEADLINE: float(np.mean(list(iou.values()))) if iou else 0.0,
    } | {names[c]: value for c, value in iou.items()}


def _unique(names: Sequence[str]) -> list[str]:
    """Returns the names, with "_2", "_3" and so on behind the later ones of equal names."""
    unique = []
    for name in names:
        number, new = 1, name
        while new in unique or (number > 1 and new in names):
            number += 1
            new = f"{name}_{number}"
        unique.append(new)
    return unique
