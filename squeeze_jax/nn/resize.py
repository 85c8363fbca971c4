"""Resizing of feature maps; the bilinear one is one operation of a TFLite file.

A position of the output takes its value from a place between the positions of the input. Two conventions say which:
with half-pixel centres, output i lies at (i + 1/2) n / m - 1/2 of n input and m output positions; with aligned corners
it lies at i (n - 1) / (m - 1). Neither smooths before it shrinks. Both are those of `torch.nn.functional.interpolate`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.composite import exported_as
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.image import images


def bilinear(
    x: jax.Array, size: tuple[int, int], *, align_corners: bool = False
) -> jax.Array:
    """Resizes by linear interpolation between the two nearest positions along each axis.

    Args:
      x: [b, h, w, c].
      size: (h', w').
      align_corners: whether the corners of input and output coincide; otherwise the centres of pixels are half a pixel
        inside.

    Returns:
      [b, h', w', c] in the dtype of `x`, float32 for integers.

    Raises:
      UserError: a size that is not positive, or x is no batch of images.
    """
    size, x = _checked(size), as_float(images(x, "bilinear"))
    if tuple(x.shape[1:3]) == size:
        return x
    plain = partial(_bilinear, size=size, align_corners=align_corners)
    # LiteRT's converter crashes on any other set of attributes.
    return exported_as(
        "odml.upsample_bilinear2d",
        plain,
        size=np.array(size, np.int64),
        align_corners=align_corners,
        is_nchw_op=False,
    )(x)


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Repeats or skips positions: output i is input floor(i n / m), as PyTorch's mode "nearest".

    LiteRT's converter makes no RESIZE_NEAREST_NEIGHBOR of it but gathers.

    Args:
      x: [b, h, w, c].
      size: (h', w').

    Returns:
      [b, h', w', c].

    Raises:
      UserError: a size that is not positive, or x is no batch of images.
    """
    size, x = _checked(size), images(x, "nearest")
    for axis, length in enumerate(size, 1):
        n = x.shape[axis]
        if length != n:
            x = jnp.take(x, np.arange(length) * n // length, axis=axis)
    return x


def _bilinear(x, *, size, align_corners):
    for axis, length in enumerate(size, 1):
        n = x.shape[axis]
        if length == n:
            continue
        low, share = _places(n, length, align_corners)
        share = jnp.expand_dims(share, range(1, x.ndim - axis)).astype(x.dtype)
        first = jnp.take(x, low, axis=axis)
        second = jnp.take(x, jnp.minimum(low + 1, n - 1), axis=axis)
        x = first + share * (second - first)
    return x


def _places(n: int, length: int, align_corners: bool):
    """The first of the two input positions of each output position, and the share of the second, int and float [length].

    Computed in the program: the converter does not know the composite of a function that has constant arrays.
    """
    output = jnp.arange(length)
    if align_corners:
        place, unit = output * (n - 1), max(length - 1, 1)
    else:
        place, unit = jnp.maximum((2 * output + 1) * n - length, 0), 2 * length
    # None is negative, and truncation is one operation where // is six.
    return lax.div(place, unit), lax.rem(place, unit) / unit


def _checked(size) -> tuple[int, int]:
    size = tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size = {size} should be two positive numbers, (h, w)")
    return size
