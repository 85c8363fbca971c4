"""Classification: cross-entropy, and how often the label is the likeliest class or among the five likeliest."""

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.train.losses.cross_entropy import one_hot
from squeeze_jax.train.metrics._metric import Metric


def make(data=None) -> Metric:
    """Scores "eval_loss", "eval_accuracy" and "eval_top5"; everything is summed on the devices."""
    return Metric(measure, score, "eval_accuracy", names=("eval_accuracy", "eval_top5"))


def measure(logits, batch):
    """logits: [b, classes], batch: {"label": int [b], "mask": bool [b]} → sums "loss", "top1", "top5", "examples"."""
    logits, mask = logits.astype(jnp.float32), batch["mask"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy(
        logits, one_hot(batch["label"], logits.shape[-1])
    )
    # Of equal logits the first counts as the higher, so that a constant network is right by chance alone.
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == batch["label"][:, None]
    sums = {
        "loss": jnp.sum(losses * mask),
        "top1": jnp.sum(hits[:, 0] * mask),
        "top5": jnp.sum(hits.any(-1) * mask),
        "examples": jnp.sum(mask),
    }
    return sums, {}


def score(sums, rows):
    """Means over the examples."""
    del rows
    count = max(sums["examples"], 1)
    names = {"eval_loss": "loss", "eval_accuracy": "top1", "eval_top5": "top5"}
    return {name: sums[key] / count for name, key in names.items()}
