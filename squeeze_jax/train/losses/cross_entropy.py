"""The objective of plain classification, of images or of each pixel: softmax cross-entropy with label smoothing.

`x(logits, endpoints, batch) → (scalar, metrics)` is the shape of every objective; `batch["mask"]` says which examples
count. Label smoothing: Szegedy et al., arXiv 1512.00567. Of a map of labels, every pixel that counts has the same weight
(Long et al., arXiv 1411.4038, section 3): a pixel of label `IGNORED` does not count.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.data.source import IGNORED
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Rate


def make(label_smoothing: Rate = 0.0) -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`.

    The loss takes logits [b, classes] with "label", or logits [b, h, w, classes] with "target", int [b, h, w]; then mean
    loss and accuracy are over the pixels that count.

    Args:
      label_smoothing: weight of the uniform distribution in the target, in [0, 1).
    """

    def loss(logits, endpoints, batch):
        del endpoints
        labels, counts = labelled(logits, batch)
        target = one_hot(labels, logits.shape[-1])  # [..., classes]
        target = optax.smooth_labels(target, label_smoothing)
        losses = optax.softmax_cross_entropy(logits, target)
        hit = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
        return mean(losses, counts), {"accuracy": mean(hit, counts)}

    return loss


def labelled(logits: jax.Array, batch) -> tuple[jax.Array, jax.Array]:
    """Returns the labels of the examples or pixels, and a mask of the same leading axes that says which count.

    Raises:
      UserError: the map of labels has another size than the map of logits.
    """
    if "target" not in batch:
        return batch["label"], batch["mask"]
    target = batch["target"]
    if logits.shape[:-1] != target.shape:
        raise UserError(
            f"the network returns logits {logits.shape} for a target {target.shape}: it should return one row of class"
            " scores per pixel, [b, h, w, classes]; a network of models/fcn.py does"
        )
    counts = (target != IGNORED) & batch["mask"][:, None, None]
    return jnp.where(counts, target, 0).astype(jnp.int32), counts


def one_hot(label: jax.Array, classes: int) -> jax.Array:
    """Returns labels as float32 [..., classes], whether given as integers or mixed already."""
    integers = jnp.issubdtype(label.dtype, jnp.integer)
    return jax.nn.one_hot(label, classes) if integers else label
