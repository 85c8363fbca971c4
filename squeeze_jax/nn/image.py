"""Checks the input of networks and layers that read images."""

from collections.abc import Mapping
from typing import Any

from squeeze_jax.errors import UserError


def check_images(x: Any, reader: str) -> Any:
    """Returns `x` if it is a batch of images [b, h, w, c].

    Args:
      x: the input to check.
      reader: name of the network or layer in error messages.

    Raises:
      UserError: `x` is not an array, or does not have four axes.
    """
    if isinstance(x, Mapping):
        keys = ", ".join(map(repr, x)) or "nothing"
        raise UserError(
            f"{reader} is called with an array of images [b, h, w, c], not with a mapping of {keys}: give the array alone"
        )
    shape = getattr(x, "shape", None)
    if shape is None:
        raise UserError(
            f"{reader} is called with an array of images [b, h, w, c], not with {type(x).__name__}"
        )
    if len(shape) != 4:
        raise UserError(
            f"{reader} is called with images [b, h, w, c], their shape is {tuple(shape)}"
            + (": write image[None] for one of them" if len(shape) == 3 else "")
        )
    return x
