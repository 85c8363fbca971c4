"""The objective of masked language models: cross-entropy of the chosen tokens; Devlin et al., arXiv 1810.04805.

The mean is over the chosen tokens of all examples that count, not over examples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; logits and batch are those of `scored`."""

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = scored(logits, batch)
        return mean(losses, weights), {"accuracy": mean(hits, weights)}

    return loss


def scored(logits: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each place contributes.

    Args:
      logits: [b, p, vocabulary], or [b, l, vocabulary].
      batch: "targets" int [b, p], the tokens that were there; "chosen" [b, p], which of them count; "mask" [b], which
        examples count.

    Returns:
      Losses in nats, whether the target is the likeliest token, and weights, float32 [b, p] each.

    Raises:
      UserError: a batch without masked tokens, or logits of other places than its targets.
    """
    if "targets" not in batch:
        raise UserError(
            "the loss needs masked tokens: config.data should be dict(name='pretraining', ...)"
        )
    targets = batch["targets"]
    if logits.shape[:-1] != targets.shape:
        raise UserError(
            f"the network scores places {logits.shape[:-1]}, the data chose {targets.shape}: it needs a task that reads"
            " positions, or config.data.predictions = 0"
        )
    weights = batch["chosen"] * batch["mask"][:, None].astype(jnp.float32)
    return *token_losses(logits, targets), weights


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies in nats and whether the target is the likeliest, float32 [...]; logits [..., vocabulary]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")
    losses = jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]
    return losses, (jnp.argmax(logits, -1) == targets).astype(jnp.float32)


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean over all axes; 0 where nothing weighs."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)
