"""Classification metrics: cross-entropy, accuracy and, for more than 5 classes, top-5 accuracy."""

import jax
import jax.numpy as jnp

from squeeze_jax.train.losses import _labels
from squeeze_jax.train.losses.cross_entropy import labels_and_mask, losses_and_hits
from squeeze_jax.train.metrics._metric import Metric

TOP = 5  # with as many classes or fewer, every network has the top-5 accuracy 1


def make(data=None) -> Metric:
    """Returns the metric with scores "eval_loss", "eval_accuracy" and, for more than 5 classes, "eval_top5".

    All are sums over examples on the devices; no rows are kept.

    Args:
      data: the data task, whose `label_names` are the names of the classes; None if the number of classes is not known.
    """
    classes = len(data.label_names) if data is not None else 0
    few = 0 < classes <= TOP
    names = ("eval_accuracy",) if few else ("eval_accuracy", "eval_top5")
    return Metric(measure, score, "eval_accuracy", names=names)


def measure(logits, batch):
    """Measures a batch.

    Args:
      logits: [b, classes].
      batch: "label" int [b]; may have a "mask", bool [b]. A label that counts but is none of the classes makes the sums NaN.

    Returns:
      The sums "loss", "top1", "top5" (only for more than 5 classes) and "examples", float32 [], and no rows.
    """
    batch = _labels.read(batch, "metrics.classification")
    labels, mask = labels_and_mask(logits, batch)
    logits, mask = logits.astype(jnp.float32), mask.astype(jnp.float32)
    losses, _ = losses_and_hits(logits, labels, mask)
    # Among equal logits the first ranks highest, so that a network with constant outputs is right only by chance.
    top_classes = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))[1]
    hits = top_classes == labels[:, None]
    top1, top5 = _labels.nan_for_invalid_labels(
        labels, logits.shape[-1], mask, hits[:, 0], hits.any(-1)
    )
    sums = {
        "loss": jnp.sum(losses * mask),
        "top1": jnp.sum(top1 * mask),
        "examples": jnp.sum(mask),
    }
    if logits.shape[-1] > TOP:
        sums["top5"] = jnp.sum(top5 * mask)
    return sums, {}


def score(sums, rows):
    """Returns the scores of `make`: the sums divided by the number of examples."""
    del rows
    count = max(sums["examples"], 1)
    names = {"eval_loss": "loss", "eval_accuracy": "top1", "eval_top5": "top5"}
    return {name: sums[key] / count for name, key in names.items() if key in sums}
