"""Checks labels. A label that is none of the classes makes the loss NaN.

Without this check a network with the wrong number of classes could get a good score.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import batches
from squeeze_jax.errors import UserError

ADVICE = "call the labels 'label', or the map of labels 'target'"


def read(batch: Mapping[str, Any], reader: str) -> Mapping[str, Any]:
    """Returns a batch of a loss or metric that reads labels, see `batches.read`."""
    return batches.read(batch, reader, ADVICE)


def numbers_of(batch: Mapping[str, Any], rows: int) -> jax.Array:
    """Returns the labels of a regression, float32 [b], given as [b] or [b, 1].

    Raises:
      UserError: the batch has no labels, or other ones.
    """
    labels = jnp.asarray(batch["label"])
    if labels.shape not in ((rows,), (rows, 1)):
        raise UserError(
            f"labels are {list(labels.shape)}: a regression of {rows} examples needs one number for each"
        )
    return labels.reshape(rows).astype(jnp.float32)


def nan_for_invalid_labels(
    labels: jax.Array, classes: int, counts: jax.Array, *values: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns values, such as losses and hits, in float32, with NaN wherever a label that counts is none of the classes.

    Args:
      labels: int [...].
      classes: number of classes; valid labels are 0 to classes - 1.
      counts: [...], zero or False for labels that do not count, such as those of padded examples, which may be invalid.
      *values: arrays [...].

    Raises:
      UserError: the labels are no integers; outside of `jax.jit` also if a label that counts is invalid.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}: give integers, the numbers of the classes"
        )
    invalid = ((labels < 0) | (labels >= classes)) & (counts != 0)
    if not isinstance(invalid, jax.core.Tracer) and invalid.any():
        first = int(np.asarray(labels)[np.asarray(invalid)][0])
        raise UserError(
            f"the label {first} is none of the {classes} classes, 0 to {classes - 1}: make the network with more classes, or"
            " correct the labels"
        )
    return tuple(jnp.where(invalid, jnp.nan, v.astype(jnp.float32)) for v in values)


def check_shapes(logits: jax.Array, labels: jax.Array) -> None:
    """Raises a UserError unless labels fit logits.

    Args:
      logits: [..., classes].
      labels: int [...], or float [..., classes] with the probability of each class.
    """
    expected = logits.shape[:-1]
    are_probabilities = jnp.issubdtype(labels.dtype, jnp.floating)
    if are_probabilities and labels.shape == logits.shape:
        return
    if not are_probabilities and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}: give integers, the numbers of the classes"
        )
    if are_probabilities or labels.shape != expected:
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)} for logits {list(logits.shape)}: give integers {list(expected)},"
            f" or the share of each class as floats {list(logits.shape)}"
        )
