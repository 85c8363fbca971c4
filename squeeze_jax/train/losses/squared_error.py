"""The loss of regression: the mean squared error of one number per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax.batches import mask_of
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import _labels

READS = 'logits [b, 1] and numbers batch["label"] [b]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (mean squared error, {"absolute_error"})`.

    The loss takes logits [b, 1] or [b], and batch["label"] float [b] or [b, 1].
    """

    def loss(logits, endpoints, batch):
        del endpoints
        batch = _labels.read(batch, "losses.squared_error")
        mask = mask_of(batch, len(logits))
        error = predicted_number(logits) - _labels.numbers_of(batch, len(logits))
        absolute = mean(jnp.abs(error), mask)
        return mean(jnp.square(error), mask), {"absolute_error": absolute}

    return loss


def predicted_number(logits: jax.Array) -> jax.Array:
    """Returns the predicted numbers, float32 [b], from logits [b, 1] or [b].

    Raises:
      UserError: the network returns more than one number per example.
    """
    if logits.shape[1:] not in ((), (1,)):
        raise UserError(
            f"a regression needs one number an example, [b, 1], not logits {list(logits.shape)}: make the network with"
            " num_classes=1"
        )
    return logits.reshape(logits.shape[0]).astype(jnp.float32)
