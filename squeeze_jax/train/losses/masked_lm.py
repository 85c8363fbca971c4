"""The loss of masked language models: the cross-entropy of the masked tokens.

Devlin et al., arXiv 1810.04805. The loss is a mean over the masked tokens of all examples that count, not over examples.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import _labels

READS = 'logits [b, p, vocabulary], and batch["targets"] and batch["chosen"] [b, p]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; see `masked_losses` for logits and batch."""

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = masked_losses(logits, batch)
        return mean(losses, weights), {"accuracy": mean(hits, weights)}

    return loss


def read(batch: Mapping, reader: str) -> Mapping:
    """Returns a batch of a loss or metric that reads masked tokens, see `batches.read`."""
    advice = "add it; config.data = dict(name='pretraining', …) makes batches of masked tokens"
    return batches.read(batch, reader, advice)


def masked_losses(
    logits: jax.Array, batch: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the loss of each masked token.

    Args:
      logits: [b, p, vocabulary] for p positions per sequence. Or [b, l, vocabulary] for all positions, of which the
        function takes those in "positions".
      batch: "targets" int [b, p], the original tokens; "chosen" [b, p], 1 for the targets that count; "positions" int
        [b, p], unless p = l. May have a "mask" [b], true for the examples that count.

    Returns:
      Losses in nats, hits (1 where the target has the highest logit) and weights (1 where the target counts), float32
      [b, p] each.

    Raises:
      UserError: the batch has no masked tokens, or the logits have another shape.
    """
    batch = read(batch, "losses.masked_lm")
    targets = jnp.asarray(batch["targets"])
    shape = tuple(getattr(logits, "shape", logits))
    if "positions" in batch and shape[:2] == jnp.shape(batch["tokens"]):
        positions = jnp.asarray(batch["positions"])[..., None]
        logits = jnp.take_along_axis(logits, positions, axis=1, mode="clip")
        shape = logits.shape
    if len(shape) != 3 or shape[:2] != targets.shape:
        raise UserError(
            f"the loss reads scores of tokens at {targets.shape} places, the network gives {shape}: its task, the"
            " objective and config.data.kind should be of one kind"
        )
    mask = batches.mask_of(batch, len(targets))
    weights = batch["chosen"] * mask[:, None].astype(jnp.float32)
    return *token_losses(logits, targets, weights), weights


def head_logits(logits, name: str) -> jax.Array:
    """Returns the logits of one head of a network with several heads.

    Args:
      logits: {name of a head: logits}.
      name: the head.

    Raises:
      UserError: the network has no such head.
    """
    if not isinstance(logits, Mapping) or name not in logits:
        outputs = ", ".join(logits) if isinstance(logits, Mapping) else "one array"
        raise UserError(
            f"the loss reads the network's {name}, and it gives {outputs}: its task, the objective and config.data.kind should"
            " be of one kind"
        )
    return logits[name]


def token_losses(
    logits: jax.Array, targets: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropies in nats, and hits: 1 where the target has the highest logit; float32 [...] each.

    Args:
      logits: [..., vocabulary].
      targets: int [...].
      counts: [...], zero or False where the target does not count.

    Raises:
      UserError: a target is not in the vocabulary; see `_labels.nan_for_invalid_labels`.
    """
    target_logits = jnp.take_along_axis(
        logits, targets[..., None], axis=-1, mode="clip"
    )
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits[..., 0]
    hits = jnp.argmax(logits, -1) == targets
    return _labels.nan_for_invalid_labels(
        targets, logits.shape[-1], counts, losses, hits
    )
