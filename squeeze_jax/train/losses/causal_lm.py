"""The loss of causal language models: the cross-entropy of each next token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses.masked_lm import token_losses

READS = 'logits [b, l, vocabulary], and batch["tokens"] and batch["attended"] [b, l]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; see `next_token_losses` for logits and batch."""

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = next_token_losses(logits, batch)
        return mean(losses, weights), {"accuracy": mean(hits, weights)}

    return loss


def next_token_losses(
    logits: jax.Array, batch: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the loss of each token except the first of a sequence, which has no token before it.

    Args:
      logits: [b, l, vocabulary]; position i predicts token i + 1.
      batch: "tokens" int [b, l]; may have "attended" [b, l], the padding mask, and "mask" [b], the examples that count.

    Returns:
      Losses in nats, hits (1 where the token has the highest logit) and weights (1 where the token counts), float32
      [b, l - 1] each.
    """
    batch = batches.read(batch, "losses.causal_lm")
    tokens = jnp.asarray(batch["tokens"])
    weights = batches.token_weights(batch, *tokens.shape)[:, 1:]
    losses, hits = token_losses(logits[:, :-1], tokens[:, 1:], weights)
    return losses, hits, weights
