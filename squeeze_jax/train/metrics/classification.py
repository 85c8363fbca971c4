"""Classification: cross-entropy, and how often the label is the likeliest class or among the five likeliest."""

import jax
import jax.numpy as jnp

from squeeze_jax.train.losses._labels import known
from squeeze_jax.train.losses.cross_entropy import scored
from squeeze_jax.train.metrics._metric import Metric


def make(data=None) -> Metric:
    """Scores "eval_loss", "eval_accuracy" and "eval_top5"; everything is summed on the devices."""
    return Metric(measure, score, "eval_accuracy", names=("eval_accuracy", "eval_top5"))


def measure(logits, batch):
    """logits: [b, classes], batch: {"label": int [b], "mask": bool [b]} → sums "loss", "top1", "top5", "examples".

    A label that is none of the classes makes the sums NaN.
    """
    logits, mask = logits.astype(jnp.float32), batch["mask"].astype(jnp.float32)
    losses, _ = scored(logits, batch["label"], batch["mask"])
    # Of equal logits the first counts as the higher, so that a constant network is right by chance alone.
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == batch["label"][:, None]
    first, five = known(
        batch["label"], logits.shape[-1], mask, hits[:, 0], hits.any(-1)
    )
    sums = {
        "loss": jnp.sum(losses * mask),
        "top1": jnp.sum(first * mask),
        "top5": jnp.sum(five * mask),
        "examples": jnp.sum(mask),
    }
    return sums, {}


def score(sums, rows):
    """Means over the examples."""
    del rows
    count = max(sums["examples"], 1)
    names = {"eval_loss": "loss", "eval_accuracy": "top1", "eval_top5": "top5"}
    return {name: sums[key] / count for name, key in names.items()}
