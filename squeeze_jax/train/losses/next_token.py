"""The loss of language models on contiguous text: the cross-entropy of each next token.

Unlike `losses.causal_lm`, it also has a target for the last position of a window: the first token of the next window.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses.masked_lm import token_losses

READS = 'logits [b, l, vocabulary], and batch["targets"] and batch["attended"] [b, l]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; see `target_losses` for logits and batch."""

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = target_losses(logits, batch)
        return mean(losses, weights), {"accuracy": mean(hits, weights)}

    return loss


def target_losses(
    logits: jax.Array, batch: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the loss of each target.

    Args:
      logits: [b, l, vocabulary]; position i predicts the token after it.
      batch: "targets" int [b, l]; may have "attended" [b, l], 1 for the targets that count, and "mask" [b], the rows
        that count.

    Returns:
      Losses in nats, hits (1 where the target has the highest logit) and weights (1 where the target counts), float32
      [b, l] each.

    Raises:
      UserError: the batch has no targets or those of masked tokens, or the logits have another shape.
    """
    advice = "add it; config.data = dict(name='contiguous', …) makes such batches"
    batch = batches.read(batch, "losses.next_token", advice)
    if "chosen" in batch and "fresh" not in batch:
        raise UserError(
            "losses.next_token reads a target for each position, and the batch has masked tokens: choose losses.masked_lm, or"
            " config.data = dict(name='contiguous', …)"
        )
    targets, shape = jnp.asarray(batch["targets"]), tuple(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != targets.shape:
        raise UserError(
            f"losses.next_token reads logits [b, l, vocabulary] for targets {targets.shape}, but the network returns"
            f" {shape or type(logits).__name__}: choose a network for the task causal_lm"
        )
    weights = batches.token_weights(batch, *targets.shape)
    return *token_losses(logits, targets, weights), weights
