"""The objective of plain classification: softmax cross-entropy with label smoothing.

`x(logits, endpoints, batch) → (scalar, metrics)` is the shape of every objective; `batch["mask"]` says which examples
count. Label smoothing: Szegedy et al., arXiv 1512.00567.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.nn.means import mean


def make(label_smoothing: float = 0.0) -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`.

    Args:
      label_smoothing: weight of the uniform distribution in the target, in [0, 1).
    """

    def loss(logits, endpoints, batch):
        del endpoints
        classes = logits.shape[-1]
        target = one_hot(batch["label"], classes)  # [b, classes]
        target = optax.smooth_labels(target, label_smoothing)
        losses = optax.softmax_cross_entropy(logits, target)
        hit = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
        return mean(losses, batch["mask"]), {"accuracy": mean(hit, batch["mask"])}

    return loss


def one_hot(label: jax.Array, classes: int) -> jax.Array:
    """Labels as float32 [b, classes], whether given as integers [b] or mixed already."""
    return jax.nn.one_hot(label, classes) if label.ndim == 1 else label
