"""The objective of extractive question answering: where in the sequence an answer begins and where it ends.

Every position of the sequence competes, padding and the question included, as in BERT, arXiv 1810.04805: that an answer
lies within the document is learned, and seen to when answers are read off.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.nn.means import mean

SIDES = ("start", "end")


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`; accuracy is of begin and end together.

    logits are {"start": [b, l], "end": [b, l]}, labels batch["start"] and batch["end"], int [b], 0 where the answer is
    not in the window.
    """

    def loss(logits, endpoints, batch):
        del endpoints
        parts, hits = zip(*(_side(logits, batch, k) for k in SIDES), strict=True)
        accuracy = mean(hits[0] & hits[1], batch["mask"])
        return (parts[0] + parts[1]) / 2, {"accuracy": accuracy}

    return loss


def losses(logits: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies [b] of logits [b, l] and positions int [b], and which of them count: those not beyond the sequence.

    That of a negative position is NaN.
    """
    inside = position < logits.shape[-1]
    label = jnp.where(inside, jnp.maximum(position, 0), 0)
    each = optax.softmax_cross_entropy_with_integer_labels
    values = each(logits.astype(jnp.float32), label)
    return jnp.where(position < 0, jnp.nan, values), inside


def _side(logits, batch, key):
    values, inside = losses(logits[key], batch[key])
    hit = jnp.argmax(logits[key], -1) == batch[key]
    return mean(values, batch["mask"] & inside), hit
