"""Resizes feature maps; bilinear resizing becomes one operation in a TFLite file.

Each output position reads the input at a coordinate between the input positions. There are two conventions for this coordinate.
For n input and m output positions, output i reads the input at

    half-pixel centres    (i + 1/2) n / m - 1/2
    aligned corners       i (n - 1) / (m - 1)

Neither convention smooths the image before it shrinks. Both are those of `torch.nn.functional.interpolate`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.composite import exported_as
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.image import check_images


def bilinear(
    x: jax.Array, size: tuple[int, int], *, align_corners: bool = False
) -> jax.Array:
    """Resizes images by linear interpolation between the two nearest positions along each axis.

    Args:
      x: [b, h, w, c].
      size: (h', w').
      align_corners: True for aligned corners, False for half-pixel centres; see the top of this file.

    Returns:
      [b, h', w', c] in the dtype of `x`, float32 for integers.

    Raises:
      UserError: A size is not positive, or x is not a batch of images.
    """
    size, x = _checked_size(size), as_float(check_images(x, "bilinear"))
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
    """Resizes images by repeating or skipping positions: output i is input floor(i n / m), as PyTorch's mode "nearest".

    LiteRT's converter turns it into gather operations, not into RESIZE_NEAREST_NEIGHBOR.

    Args:
      x: [b, h, w, c].
      size: (h', w').

    Returns:
      [b, h', w', c] in the dtype of `x`.

    Raises:
      UserError: A size is not positive, or x is not a batch of images.
    """
    size, x = _checked_size(size), check_images(x, "nearest")
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
        low, weight = _neighbours(n, length, align_corners)
        weight = jnp.expand_dims(weight, range(1, x.ndim - axis)).astype(x.dtype)
        first = jnp.take(x, low, axis=axis)
        second = jnp.take(x, jnp.minimum(low + 1, n - 1), axis=axis)
        x = first + weight * (second - first)
    return x


def _neighbours(n: int, length: int, align_corners: bool):
    """Returns the first of the two input positions of each output, int [length], and the weight of the second, float [length].

    The program computes both itself. If they were constant arrays, the converter would not recognise the composite.
    """
    output = jnp.arange(length)
    if align_corners:
        numerator, denominator = output * (n - 1), max(length - 1, 1)
    else:
        numerator = jnp.maximum((2 * output + 1) * n - length, 0)
        denominator = 2 * length
    # No numerator is negative, so truncation is right; it is one operation, and // is six.
    low = lax.div(numerator, denominator)
    return low, lax.rem(numerator, denominator) / denominator


def _checked_size(size) -> tuple[int, int]:
    size = tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size = {size} should be two positive numbers, (h, w)")
    return size
