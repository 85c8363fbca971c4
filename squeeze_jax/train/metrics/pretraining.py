"""Metrics of pretraining on text: prediction of masked or next tokens, of the order of segments, and of replaced tokens."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.train.losses import causal_lm, masked_lm, pretraining_loss, replaced
from squeeze_jax.train.metrics._metric import Metric

# The exponential of a larger number exceeds the range of a float.
_LARGEST = 700.0


def make(data) -> Metric:
    """Returns the metric with the scores "eval_loss", "eval_accuracy" and "eval_perplexity".

    Accuracy and perplexity measure the prediction of tokens; for ELECTRA, by the generator. A network that also predicts the order
    of two segments has the score "eval_order_accuracy"; ELECTRA has "eval_replaced_accuracy" of the discriminator.
    "eval_loss" is the sum of all losses, in which the discriminator's has the default weight of `losses.replaced`.

    Args:
      data: a data task of `data/tasks/pretraining.py`, whose `masked` masks a batch.
    """

    def measure(logits, batch):
        batch = masked_lm.read(data.masked(batch), "metrics.pretraining")
        heads = logits if isinstance(logits, Mapping) else {"masked_lm": logits}
        token_losses = (
            masked_lm.masked_losses
            if "targets" in batch
            else causal_lm.next_token_losses
        )
        token_logits = masked_lm.head_logits(heads, "masked_lm")
        results = {"tokens": token_losses(token_logits, batch)}
        examples = batches.example_weights(batch, len(results["tokens"][0]))
        if "next_sentence" in heads:
            losses, hits = pretraining_loss.segment_losses(
                heads["next_sentence"], batch
            )
            results["order"] = (losses, hits, examples)
        if "replaced" in heads:
            results["replaced"] = replaced.discriminator_losses(
                heads["replaced"], heads["is_replaced"], batch
            )
        sums = {"examples": jnp.sum(examples)}
        for name, (losses, hits, weights) in results.items():
            sums[f"{name}_loss"] = jnp.sum(losses * weights)
            sums[f"{name}_hits"] = jnp.sum(hits * weights)
            sums[f"{name}_count"] = jnp.sum(weights)
        return sums, {}

    return Metric(measure, score, "eval_accuracy")


def score(sums, rows):
    """Returns the scores of `make`: means over the tokens or pairs that count, and the perplexity."""
    del rows

    def mean(name, quantity):
        count = max(float(sums[f"{name}_count"]), 1.0)
        return float(sums[f"{name}_{quantity}"]) / count

    loss = total = mean("tokens", "loss")
    scores = {"eval_accuracy": mean("tokens", "hits")}
    scores["eval_perplexity"] = math.exp(min(loss, _LARGEST))
    for name, weight in ("order", 1.0), ("replaced", replaced.WEIGHT):
        if f"{name}_loss" in sums:
            total += weight * mean(name, "loss")
            scores[f"eval_{name}_accuracy"] = mean(name, "hits")
    return {"eval_loss": total, **scores}
