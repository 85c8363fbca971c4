"""Pooling."""

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn.conv import Padding, explicit_padding


def max_pool(
    x: jax.Array,
    window: int,
    strides: int,
    padding: Padding = "VALID",
    *,
    ceil: bool = False,
) -> jax.Array:
    """The largest value in each window.

    Args:
      x: [b, h, w, c].
      window: positions of a window along each axis.
      strides: positions from one window to the next.
      padding: as in `conv`; padded positions are never the largest.
      ceil: also count a last window that reaches beyond the padded image, as Caffe does and PyTorch's `ceil_mode`.

    Returns:
      [b, h', w', c].
    """
    pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)
    if ceil:
        pads = tuple(
            (before, after + _beyond(n, before, after, window, strides))
            for n, (before, after) in zip(x.shape[1:3], pads, strict=True)
        )
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, window, window, 1),
        (1, strides, strides, 1),
        ((0, 0), *pads, (0, 0)),
    )


def _beyond(n: int, before: int, after: int, window: int, strides: int) -> int:
    """Positions to add so that the last partial window counts, unless it would start in the padding after the image."""
    missing = -(n + before + after - window) % strides
    start = n + before + after + missing - window
    return missing if start < n + before else 0


def global_mean(x: jax.Array) -> jax.Array:
    """The mean over positions, in float32: [b, h, w, c] → [b, c]."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
