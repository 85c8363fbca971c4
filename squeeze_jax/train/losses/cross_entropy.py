"""The loss of classification, of examples or of pixels: softmax cross-entropy with label smoothing.

All losses have the signature `loss(logits, endpoints, batch) → (scalar, metrics)`. `batch["mask"]` is true for the examples
that count; without it all count. Label smoothing is described by Szegedy et al., arXiv 1512.00567. For a map of labels, all
pixels that count have the same weight (Long et al., arXiv 1411.4038, section 3); pixels with the label `IGNORED` do not count.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.batches import mask_of
from squeeze_jax.data.source import IGNORED
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Rate
from squeeze_jax.registry import checked
from squeeze_jax.train.losses import _labels

READS = 'logits [b, classes] with integers batch["label"] [b], or logits [b, h, w, classes] with integers batch["target"] [b, h, w]'


@checked
def make(label_smoothing: Rate = 0.0) -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"accuracy"})`.

    The loss takes logits [b, classes] with batch["label"], or logits [b, h, w, classes] with batch["target"], int
    [b, h, w]. With a target, loss and accuracy are means over the pixels that count.

    Args:
      label_smoothing: weight of the uniform distribution in the target distribution, in [0, 1).
    """

    def loss(logits, endpoints, batch):
        del endpoints
        batch = _labels.read(batch, "losses.cross_entropy")
        labels, counts = labels_and_mask(logits, batch)
        losses, hits = losses_and_hits(logits, labels, counts, label_smoothing)
        return mean(losses, counts), {"accuracy": mean(hits, counts)}

    return loss


def losses_and_hits(
    logits: jax.Array, labels: jax.Array, counts: jax.Array, label_smoothing: float = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns the losses in nats, and hits: 1 where the label has the highest logit; float32 [...] each.

    Args:
      logits: [..., classes].
      labels: int [...], or the probability of each class, float [..., classes].
      counts: [...], zero or False where the label does not count.
      label_smoothing: see `make`.

    Raises:
      UserError: the labels have a wrong shape, or one is none of the classes; see `_labels.nan_for_invalid_labels`.

    Probabilities that are negative or do not add up to 1 make the loss NaN.
    """
    _labels.check_shapes(logits, labels)
    classes = logits.shape[-1]
    target = one_hot(labels, classes)  # [..., classes]
    losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(target, label_smoothing)
    )
    hits = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    if labels.ndim == logits.ndim:
        shares = (labels >= 0).all(-1) & (jnp.abs(labels.sum(-1) - 1) < 1e-3)
        invalid = ~shares & (counts != 0)
        values = (losses, hits.astype(jnp.float32))
        return tuple(jnp.where(invalid, jnp.nan, v) for v in values)
    return _labels.nan_for_invalid_labels(labels, classes, counts, losses, hits)


def labels_and_mask(logits: jax.Array, batch) -> tuple[jax.Array, jax.Array]:
    """Returns the labels of the examples or pixels, and a mask that is true for the labels that count.

    Args:
      logits: [b, classes] or [b, h, w, classes].
      batch: "label", or "target" int [b, h, w]; may have a "mask", bool [b].

    Raises:
      UserError: the target has another size than the logits.
    """
    mask = mask_of(batch, len(logits))
    if "target" not in batch:
        labels = jnp.asarray(batch["label"])
        if labels.ndim > 1 and labels.shape == logits.shape[:-1]:
            raise UserError(
                f"labels are a map {list(labels.shape)}: call it 'target' in the batch"
            )
        return labels, mask
    target = batch["target"]
    if logits.shape[:-1] != target.shape:
        raise UserError(
            f"the network returns logits {logits.shape} for a target {target.shape}: it should return one row of class"
            " scores per pixel, [b, h, w, classes]; a network of models/fcn.py does"
        )
    counts = (target != IGNORED) & mask[:, None, None]
    return jnp.where(counts, target, 0).astype(jnp.int32), counts


def one_hot(label: jax.Array, classes: int) -> jax.Array:
    """Returns integer labels as one-hot vectors, float32 [..., classes]; returns probabilities of classes unchanged."""
    are_integers = jnp.issubdtype(label.dtype, jnp.integer)
    return jax.nn.one_hot(label, classes) if are_integers else label
