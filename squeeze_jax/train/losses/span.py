"""The loss of extractive question answering: cross-entropies of the start and end positions of the answer.

The softmax covers all positions of the sequence, also the question and the padding, as in BERT, arXiv 1810.04805. The
network learns that an answer lies within the document, and the code that extracts answers ensures it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax import batches
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses.masked_lm import head_logits

SIDES = ("start", "end")

READS = 'logits {"start": [b, l], "end": [b, l]}, and integers batch["start"] and batch["end"] [b]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`.

    Logits are {"start": [b, l], "end": [b, l]}. Labels are batch["start"] and batch["end"], int [b]; they are 0 if the
    window does not contain the answer. The loss is the mean over both sides. "accuracy" is the share of windows whose
    start and end are both right.
    """

    def loss(logits, endpoints, batch):
        del endpoints
        batch = batches.read(batch, "losses.span")
        sides = (_side_loss(logits, batch, side) for side in SIDES)
        losses, hits = zip(*sides, strict=True)
        accuracy = mean(hits[0] & hits[1], batches.mask_of(batch, len(hits[0])))
        return (losses[0] + losses[1]) / 2, {"accuracy": accuracy}

    return loss


def position_losses(
    logits: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropies of positions, and a mask of the positions that count.

    Args:
      logits: [b, l].
      position: int [b]. Positions of l or more do not count; negative positions give NaN.

    Returns:
      Losses in nats, float32 [b], and the mask, bool [b].
    """
    inside = position < logits.shape[-1]
    label = jnp.where(inside, jnp.maximum(position, 0), 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), label
    )
    return jnp.where(position < 0, jnp.nan, losses), inside


def _side_loss(logits, batch, side):
    """Returns the mean loss of one side, "start" or "end", and bool [b]: whether each predicted position is right."""
    scores, position = head_logits(logits, side), jnp.asarray(batch[side])
    losses, inside = position_losses(scores, position)
    hits = jnp.argmax(scores, -1) == position
    return mean(losses, batches.mask_of(batch, len(scores)).astype(bool) & inside), hits
