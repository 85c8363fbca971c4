"""The loss of multi-label classification: the sigmoid cross-entropy of each class, averaged over the classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from squeeze_jax.batches import mask_of
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import _labels

READS = 'logits [b, classes] and floats batch["label"] [b, classes]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean loss, {"label_accuracy"})`.

    The loss takes logits [b, classes] and batch["label"] float [b, classes]: 1 for the classes of an example and 0 for the
    others, or probabilities. "label_accuracy" is the share of entries whose predicted probability is on the same side of
    0.5 as the label.
    """

    def loss(logits, endpoints, batch):
        del endpoints
        batch = _labels.read(batch, "losses.binary_cross_entropy")
        mask, labels = mask_of(batch, len(logits)), jnp.asarray(batch["label"])
        losses = example_losses(logits, labels)
        hits = (logits > 0) == (labels > 0.5)
        accuracy = mean(hits.astype(jnp.float32).mean(-1), mask)
        return mean(losses, mask), {"label_accuracy": accuracy}

    return loss


def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of each example in nats, float32 [b]; NaN for an example with a label outside 0 to 1.

    Args:
      logits: [b, classes].
      labels: float [b, classes], 0 to 1.

    Raises:
      UserError: the labels have another shape than the logits, or are integers.
    """
    if labels.shape != logits.shape or not jnp.issubdtype(labels.dtype, jnp.floating):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)} for logits {list(logits.shape)}: give a float, 0 or 1, for each"
            " class"
        )
    _labels.check_shapes(logits, labels)
    labels = labels.astype(jnp.float32)
    valid = ((labels >= 0) & (labels <= 1)).all(-1)
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)
    return jnp.where(valid, losses.mean(-1), jnp.nan)
