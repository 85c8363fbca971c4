"""Pretraining on text: how well masked or next tokens are told, and what is told of segments or of replaced tokens."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from squeeze_jax.train.losses import causal_lm, masked_lm, pretraining_loss, replaced
from squeeze_jax.train.metrics._metric import Metric

# Beyond it there is no float.
_LARGEST = 700.0


def make(data) -> Metric:
    """Scores "eval_loss", "eval_accuracy" and "eval_perplexity", the last two of tokens; all are sums on the devices.

    With two segments "eval_order_accuracy" is of them. With replaced tokens the first three are the generator's, except
    that "eval_loss" has the weight of `losses.replaced` for both, and "eval_replaced_accuracy" is the discriminator's.

    Args:
      data: of `data/tasks/pretraining.py`: what masks a batch.
    """

    def measure(logits, batch):
        batch = data.masked(batch)
        examples = batch["mask"].astype(jnp.float32)
        parts = logits if isinstance(logits, Mapping) else {"masked_lm": logits}
        scored = masked_lm.scored if "targets" in batch else causal_lm.scored
        found = {"tokens": scored(masked_lm.part(parts, "masked_lm"), batch)}
        if "next_sentence" in parts:
            losses, right = pretraining_loss.ordered(parts["next_sentence"], batch)
            found["order"] = (losses, right, examples)
        if "replaced" in parts:
            found["replaced"] = replaced.judged(
                parts["replaced"], parts["is_replaced"], batch
            )
        sums = {"examples": jnp.sum(examples)}
        for name, (losses, right, weights) in found.items():
            sums[f"{name}_loss"] = jnp.sum(losses * weights)
            sums[f"{name}_right"] = jnp.sum(right * weights)
            sums[f"{name}_count"] = jnp.sum(weights)
        return sums, {}

    return Metric(measure, score, "eval_accuracy")


def score(sums, rows):
    """Means over what is counted, and the perplexity, the exponential of the tokens' mean loss."""
    del rows

    def mean(name, of):
        return float(sums[f"{name}_{of}"]) / max(float(sums[f"{name}_count"]), 1.0)

    loss = total = mean("tokens", "loss")
    scores = {"eval_accuracy": mean("tokens", "right")}
    scores["eval_perplexity"] = math.exp(min(loss, _LARGEST))
    for name, weight in ("order", 1.0), ("replaced", replaced.WEIGHT):
        if f"{name}_loss" in sums:
            total += weight * mean(name, "loss")
            scores[f"eval_{name}_accuracy"] = mean(name, "right")
    return {"eval_loss": total, **scores}
