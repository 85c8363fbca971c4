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
from squeeze_jax.train.losses import _labels


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
        losses, hits = scored(logits, labels, counts, label_smoothing)
        return mean(losses, counts), {"accuracy": mean(hits, counts)}

    return loss


def scored(
    logits: jax.Array, labels: jax.Array, counts: jax.Array, label_smoothing: float = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns losses in nats and whether the label is the likeliest class, float32 [...]; see `_labels.known`.

    Args:
      logits: [..., classes].
      labels: int [...], or the share of each class, float [..., classes].
      counts: [...], which labels count.
      label_smoothing: see `make`.

    Raises:
      UserError: labels of another shape, or that are none of the classes.
    """
    _labels.check_shapes(logits, labels)
    classes = logits.shape[-1]
    target = one_hot(labels, classes)  # [..., classes]
    losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(target, label_smoothing)
    )
    hits = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    if labels.ndim == logits.ndim:
        return losses, hits.astype(jnp.float32)
    return _labels.known(labels, classes, counts, losses, hits)


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
