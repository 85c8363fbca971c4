"""Reads the entries of a batch for losses and metrics, which are also called from Python, without a training step.

A batch is a dict of arrays [b, ...]. Without a "mask" all its examples count, and without a padding mask all its tokens do.
Any other entry that is missing is an error of one line.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError

# Names of the padding mask in a batch; the second one is its name in `transformers`.
_PADDING_MASKS = ("attended", "attention_mask")


class _Batch(dict):
    """A batch and who reads it; a missing entry is a UserError that names the reader, the entry and the entries there."""

    def __init__(self, batch: Mapping[str, Any], reader: str, advice: str):
        super().__init__(batch)
        self._reader, self._advice = reader, advice

    def __missing__(self, key: str):
        entries = ", ".join(map(str, self)) or "nothing"
        raise UserError(
            f"the batch has {entries} and no {key}, which {self._reader} reads: {self._advice}"
        )


def read(batch: Mapping[str, Any], reader: str, advice: str = "add it") -> _Batch:
    """Returns a batch in which a missing entry is an error that names its reader; a batch that has a reader keeps it.

    Args:
      batch: {name: array [b, ...]}.
      reader: the loss or metric, such as "losses.span".
      advice: the end of the error: what to do about a missing entry.

    Raises:
      UserError: the batch is no dict.
    """
    if isinstance(batch, _Batch):
        return batch
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{reader} reads a batch, and got a {type(batch).__name__}: give a dict of arrays, such as {{'label': …}}"
        )
    return _Batch(batch, reader, advice)


def mask_of(batch: Mapping[str, Any], rows: int) -> jax.Array:
    """Returns a batch's mask [b], true for the examples that count; all true if it has none.

    Raises:
      UserError: the mask has another shape.
    """
    mask = jnp.asarray(batch["mask"] if "mask" in batch else jnp.ones(rows, bool))
    if mask.shape != (rows,):
        padding = (
            ": the padding mask is 'attended' (or 'attention_mask'), [b, l]"
            if mask.ndim == 2 and mask.shape[1] > 1
            else ""
        )
        raise UserError(
            f"the batch's mask is {list(mask.shape)}: give one number or bool for each of {rows} examples{padding}"
        )
    return mask


def token_weights(batch: Mapping[str, Any], rows: int, length: int) -> jax.Array:
    """Returns the weights of tokens, float32 [rows, length]: 1 for real tokens of examples that count, else 0.

    Args:
      batch: may have a "mask" [b] and a padding mask, see `padding_mask`.
      rows: number of sequences, b or a multiple of it: in multiple choice, each example has one sequence per choice.
      length: number of tokens of a sequence.

    Raises:
      UserError: a mask has another size.
    """
    weights = example_weights(batch, rows)[:, None]
    is_real = padding_mask(batch)
    if is_real is None:
        return jnp.repeat(weights, length, 1)
    if is_real.size != rows * length:
        raise UserError(
            f"the batch's padding mask is {tuple(is_real.shape)}, the network's outputs are of {rows} sequences of {length}"
            " tokens: both should be equal"
        )
    return weights * is_real.reshape(rows, length).astype(jnp.float32)


def example_weights(batch: Mapping[str, Any], rows: int) -> jax.Array:
    """Returns the weights of rows, float32 [rows]: 1 for the rows of examples that count, else 0.

    Args:
      batch: may have a "mask" [b].
      rows: number of rows, b or a multiple of it, see `token_weights`.

    Raises:
      UserError: the mask has more than one axis, as a padding mask has.
    """
    if "mask" not in batch:
        return jnp.ones(rows, jnp.float32)
    mask = jnp.asarray(batch["mask"])
    examples = (
        mask.shape[0] if mask.ndim and rows % max(mask.shape[0], 1) == 0 else rows
    )
    return jnp.repeat(mask_of(batch, examples).astype(jnp.float32), rows // examples)


def padding_mask(batch: Mapping[str, Any]) -> jax.Array | None:
    """Returns the padding mask of a batch, bool [b, l] with True for real tokens; None if the batch has none.

    Args:
      batch: contains the mask as "attended", or as "attention_mask", its name in `transformers`.

    Raises:
      UserError: the batch has both, or has neither but an entry that looks like a padding mask under another name.
    """
    masks = [key for key in _PADDING_MASKS if key in batch]
    if len(masks) > 1:
        raise UserError(f"the batch has its padding mask twice, as {masks}: give one")
    if masks:
        return jnp.asarray(batch[masks[0]]) != 0
    for key in batch:
        if key != "mask" and ("mask" in key.split("_") or key.startswith("attend")):
            raise UserError(
                f"the batch has {key!r}: a padding mask, true for real tokens, is called"
                f" {' or '.join(map(repr, _PADDING_MASKS))}"
            )
    return None
