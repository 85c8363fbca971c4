"""Semantic segmentation: a confusion matrix of all pixels, and the scores that follow from it.

Pixel accuracy and mean IoU are those of Long et al., arXiv 1411.4038, section 5: with n_ij the number of pixels of class
i predicted as class j, IoU_i = n_ii / (Σ_j n_ij + Σ_j n_ji - n_ii). The matrix is summed over the whole evaluation set
before any score is computed.
"""

import re
from functools import partial

import jax.numpy as jnp
import numpy as np

from squeeze_jax.train.losses.cross_entropy import labelled, scored
from squeeze_jax.train.metrics._metric import Metric

HEADLINE = "eval_mean_iou"


def make(data) -> Metric:
    """Scores "eval_loss", "eval_pixel_accuracy", "eval_mean_iou" and one "eval_iou_CLASS" per class.

    A class that neither a target nor a prediction contains has no IoU: it does not count in the mean, and its own score
    is left out.

    Args:
      data: its `label_names` name the classes.
    """
    names = tuple("eval_iou_" + re.sub(r"\W+", "_", n) for n in data.label_names)
    choices = ("eval_pixel_accuracy", HEADLINE)
    return Metric(measure, partial(score, names), HEADLINE, names=choices)


def measure(logits, batch):
    """logits: [b, h, w, classes], batch: {"target": int [b, h, w], "mask": bool [b]} → sums.

    Sums are "loss" and "examples", float32, and "confusion", int32 [classes, classes], rows the true classes: integers,
    because float32 cannot count beyond 2**24 pixels.
    """
    logits, classes = logits.astype(jnp.float32), logits.shape[-1]
    labels, counts = labelled(logits, batch)
    losses, _ = scored(logits, labels, counts)
    cell = labels * classes + jnp.argmax(logits, -1)
    inside = counts & (labels >= 0) & (labels < classes)
    cell = jnp.where(inside, cell, classes * classes)  # one cell more, thrown away
    cells = jnp.zeros(classes * classes + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    sums = {
        "loss": jnp.sum(jnp.where(counts, losses, 0)),
        "confusion": cells[:-1].reshape(classes, classes),
        "examples": jnp.sum(batch["mask"].astype(jnp.float32)),
    }
    return sums, {}


def score(names, sums, rows):
    """Returns the scores of the summed matrix; `names` are those of the classes' scores."""
    del rows
    confusion = np.asarray(sums["confusion"], np.int64)
    if np.isnan(sums["loss"]):  # the network's numbers are none, or a label no class
        names_of_all = ("eval_loss", "eval_pixel_accuracy", HEADLINE)
        return dict.fromkeys(names_of_all, float("nan"))
    hits, pixels = np.diag(confusion), max(int(confusion.sum()), 1)
    union = confusion.sum(0) + confusion.sum(1) - hits
    present = np.flatnonzero(union)
    iou = {int(c): float(hits[c] / union[c]) for c in present}
    return {
        "eval_loss": sums["loss"] / pixels,
        "eval_pixel_accuracy": float(hits.sum() / pixels),
        HEADLINE: float(np.mean(list(iou.values()))) if iou else 0.0,
    } | {names[c] if c < len(names) else f"eval_iou_{c}": v for c, v in iou.items()}
