"""Labels that are no class: a loss of them is no number, so that a wrong number of classes cannot pass for a good network."""

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError


def known(
    labels: jax.Array, classes: int, counts: jax.Array, *values: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns values, such as losses and hits, in float32: NaN where a label that counts is none of the classes.

    Args:
      labels: int [...].
      classes: how many there are: labels are 0 to classes - 1.
      counts: [...], zero or False where a label may be anything, as that of a padded example.
      *values: [...] each.

    Raises:
      UserError: labels that are no integers; outside of `jax.jit` also a label that is none of the classes.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}: give integers, the numbers of the classes"
        )
    wrong = ((labels < 0) | (labels >= classes)) & (counts != 0)
    if not isinstance(wrong, jax.core.Tracer) and wrong.any():
        first = int(np.asarray(labels)[np.asarray(wrong)][0])
        raise UserError(
            f"the label {first} is none of the {classes} classes, 0 to {classes - 1}: make the network with more classes, or"
            " correct the labels"
        )
    return tuple(jnp.where(wrong, jnp.nan, v.astype(jnp.float32)) for v in values)


def check_shapes(logits: jax.Array, labels: jax.Array) -> None:
    """Checks that there is one label for each row of logits, or a share of each class.

    Raises:
      UserError: there is not.
    """
    wanted = logits.shape[:-1]
    shares = jnp.issubdtype(labels.dtype, jnp.floating)
    if shares and labels.shape == logits.shape:
        return
    if shares or labels.shape != wanted:
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)} for logits {list(logits.shape)}: give integers {list(wanted)}, or"
            f" the share of each class as floats {list(logits.shape)}"
        )
