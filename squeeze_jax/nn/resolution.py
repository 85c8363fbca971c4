"""The image size as an elastic option: a first piece without parameters resizes the images.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.1 (elastic resolution). The size is a part of the network, so that
its costs, its sub-networks and its exported files include it like any other option. An image that has the size already stays
as it is.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.chain import Piece
from squeeze_jax.nn.resize import bilinear


class Resize(nn.Module):
    """Resizes images to a square: [b, h, w, c] → [b, size, size, c]; without smoothing, see `nn/resize.py`."""

    size: int

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the resized images."""
        del train
        return bilinear(x, (self.size, self.size))


def resolution_choices(
    resolutions: Sequence[int], resolution: Any = None
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the elastic option of the image size, {"resolution": (sizes,)}; {} if images keep their size.

    Args:
      resolutions: the sizes in ascending order; () if images keep their size.
      resolution: the network's option of this name, which needs `resolutions`.

    Raises:
      UserError: the sizes are not ascending, or a size is chosen although there are none.
    """
    if list(resolutions) != sorted(set(resolutions)):
        raise UserError(
            f"resolutions = {tuple(resolutions)} should be ascending, each size once"
        )
    if resolutions:
        return {"resolution": (tuple(resolutions),)}
    if resolution is not None:
        raise UserError(
            f"resolution = {resolution} has no choices: set resolutions, such as resolutions = (128, 160)"
        )
    return {}


def resize_pieces(resolution: Sequence[int]) -> list[Piece]:
    """Returns the pieces before the network's stem: one that resizes images, or none if `resolution` is empty."""
    return [Piece("resize", Resize(size)) for size in resolution]
