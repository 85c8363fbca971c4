"""Metrics of language models on contiguous text: loss, accuracy and perplexity of the next token."""

import math

import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.train.losses import next_token
from squeeze_jax.train.metrics._metric import Metric

# The exponential of a larger number exceeds the range of a float.
_LARGEST = 700.0


def make(data=None) -> Metric:
    """Returns the metric with the scores "eval_loss" (nats per token), "eval_accuracy" and "eval_perplexity".

    The perplexity is the exponential of the mean loss.
    """
    del data

    def measure(logits, batch):
        batch = batches.read(batch, "metrics.perplexity")
        losses, hits, weights = next_token.target_losses(logits, batch)
        sums = {
            "loss": jnp.sum(losses * weights),
            "hits": jnp.sum(hits * weights),
            "tokens": jnp.sum(weights),
            "examples": jnp.sum(batches.example_weights(batch, len(losses))),
        }
        return sums, {}

    return Metric(measure, score, "eval_perplexity")


def score(sums, rows):
    """Returns the scores of `make`, which are means over the tokens that count."""
    del rows
    tokens = max(sums["tokens"], 1.0)
    loss = sums["loss"] / tokens
    return {
        "eval_loss": loss,
        "eval_accuracy": sums["hits"] / tokens,
        "eval_perplexity": math.exp(min(loss, _LARGEST)),
    }
