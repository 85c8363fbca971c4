"""The objective of language models on contiguous text: cross-entropy of the token after each.

Unlike `losses.causal_lm` it has a target for the last token of a window too, which is the first token of the next window.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
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
    """Returns the loss of each target, whether it is the likeliest token, and its weight.

    Args:
      logits: [b, l, vocabulary], of the token after each.
      batch: "targets" int [b, l]; "attended" [b, l], which targets count; "mask" [b], which rows count.

    Returns:
      Losses in nats, hits and weights, float32 [b, l] each.

    Raises:
      UserError: a batch without targets, or logits of another shape.
    """
    if "targets" not in batch or "fresh" not in batch:
        raise UserError(
            "losses.next_token needs targets: config.data should be dict(name='contiguous', ...)"
        )
    targets, shape = batch["targets"], tuple(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != targets.shape:
        raise UserError(
            f"losses.next_token reads logits [b, l, vocabulary] for targets {targets.shape}, but the network returns"
            f" {shape or type(logits).__name__}: choose a network for the task causal_lm"
        )
    weights = batch["attended"] * batch["mask"][:, None].astype(jnp.float32)
    return *token_losses(logits, targets, weights), weights
