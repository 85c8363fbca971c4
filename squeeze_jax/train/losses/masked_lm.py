"""The objective of masked language models: cross-entropy of the chosen tokens; Devlin et al., arXiv 1810.04805.

The mean is over the chosen tokens of all examples that count, not over examples.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import _labels


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
      logits: [b, p, vocabulary], or [b, l, vocabulary], of which those at "positions" are taken.
      batch: "targets" int [b, p], the tokens that were there; "chosen" [b, p], which of them count; "mask" [b], which
        examples count; where not all positions are scored "positions" int [b, p].

    Returns:
      Losses in nats, whether the target is the likeliest token, and weights, float32 [b, p] each.

    Raises:
      UserError: a batch without masked tokens, or logits of something else.
    """
    if "targets" not in batch:
        raise UserError(
            "the loss needs masked tokens: config.data should be dict(name='pretraining', ...)"
        )
    targets = batch["targets"]
    shape = tuple(getattr(logits, "shape", logits))
    if "positions" in batch and shape[:2] == batch["tokens"].shape:
        at = batch["positions"][..., None]
        logits = jnp.take_along_axis(logits, at, axis=1, mode="clip")
        shape = logits.shape
    if len(shape) != 3 or shape[:2] != targets.shape:
        raise UserError(
            f"the loss reads scores of tokens at {targets.shape} places, the network gives {shape}: its task, the"
            " objective and config.data.kind should be of one kind"
        )
    weights = batch["chosen"] * batch["mask"][:, None].astype(jnp.float32)
    return *token_losses(logits, targets, weights), weights


def part(logits, name: str) -> jax.Array:
    """One output of a network that has several.

    Raises:
      UserError: it has not.
    """
    if not isinstance(logits, Mapping) or name not in logits:
        has = ", ".join(logits) if isinstance(logits, Mapping) else "one array"
        raise UserError(
            f"the loss reads the network's {name}, and it gives {has}: its task, the objective and config.data.kind should"
            " be of one kind"
        )
    return logits[name]


def token_losses(
    logits: jax.Array, targets: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns cross-entropies in nats and whether the target is the likeliest, float32 [...]; see `_labels.known`.

    Args:
      logits: [..., vocabulary].
      targets: int [...].
      counts: [...], which targets count.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")
    losses = jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]
    hits = jnp.argmax(logits, -1) == targets
    return _labels.known(targets, logits.shape[-1], counts, losses, hits)
