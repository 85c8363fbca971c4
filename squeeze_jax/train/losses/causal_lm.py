"""The objective of language models that read from left to right: cross-entropy of each next token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses.masked_lm import token_losses


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; logits and batch are those of `scored`."""

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = scored(logits, batch)
        return mean(losses, weights), {"accuracy": mean(hits, weights)}

    return loss


def scored(logits: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each token but the first contributes.

    Args:
      logits: [b, l, vocabulary], of the token after each.
      batch: "tokens" int [b, l], "attended" [b, l], "mask" [b].

    Returns:
      Losses in nats, whether the token is the likeliest, and weights, float32 [b, l - 1] each.
    """
    weights = batch["attended"][:, 1:] * batch["mask"][:, None].astype(jnp.float32)
    losses, hits = token_losses(logits[:, :-1], batch["tokens"][:, 1:], weights)
    return losses, hits, weights
