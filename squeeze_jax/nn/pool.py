"""Pooling."""

from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from squeeze_jax.nn import primitives
from squeeze_jax.nn.conv import Padding, conv, explicit_padding, native_is_best
from squeeze_jax.nn.windows import Geometry, joined, positions, reaching, shifted


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
    if native_is_best():
        return lax.reduce_window(
            x,
            -jnp.inf,
            lax.max,
            (1, window, window, 1),
            (1, strides, strides, 1),
            ((0, 0), *pads, (0, 0)),
        )
    geometry = Geometry(
        size=x.shape[1:3],
        channels=x.shape[-1],
        kernel=(window, window),
        features=x.shape[-1],
        strides=(strides, strides),
        pads=pads,
        dilation=(1, 1),
        groups=x.shape[-1],
    )
    return _largest(geometry, x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _largest(g: Geometry, x: jax.Array) -> jax.Array:
    """The largest of shifted images: on a CPU XLA's own gradient of a window's maximum takes as long as convolutions."""
    at = shifted(g, x, -jnp.inf)
    return reduce(jnp.maximum, (at(u, v) for u, v in positions(g)))


@_largest.defjvp
def _largest_jvp(g, primals, tangents):
    """The derivative follows the first of equally large values, as XLA's and PyTorch's do."""
    (x,), (t,) = primals, tangents
    y = _largest(g, x)
    at = shifted(g, x, -jnp.inf)
    # From the last to the first, so that the first stays; 255: none, where a value is no number.
    first = jnp.full(y.shape, 255, jnp.uint8)
    for i, (u, v) in reversed(list(enumerate(positions(g)))):
        first = jnp.where(at(u, v) == y, jnp.uint8(i), first)
    return y, _gather.bind(first, t, geometry=g)


def _gathered(first, x, *, geometry):
    """[b, h, w, c] → [b, h', w', c]: of each window the position `first`."""
    at = shifted(geometry, x)
    taps = enumerate(positions(geometry))
    return sum(jnp.where(first == i, at(u, v), 0) for i, (u, v) in taps)


def _spread_out(first, y, *, geometry):
    """The transpose: [b, h', w', c] → [b, h, w, c]: each to the position `first` of its window."""
    at = reaching(geometry, first, fill=255)
    back = reaching(geometry, y)
    return joined(
        geometry,
        {
            (u, v): jnp.where(at(u, v) == i, back(u, v), 0)
            for i, (u, v) in enumerate(positions(geometry))
        },
    )


def _batched(primitive, arrays, dims, *, geometry):
    """`vmap`: the axis joins the batch."""
    n = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)
    arrays = [
        jnp.broadcast_to(a, (n, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(arrays, dims, strict=True)
    ]
    first, x = (a.reshape(-1, *a.shape[2:]) for a in arrays)
    out = primitive.bind(first, x, geometry=geometry)
    return out.reshape(n, -1, *out.shape[1:]), 0


def _selection(name: str, run, transposed: Callable[[], Primitive]) -> Primitive:
    """A primitive that is linear in its second argument, for which `transposed()` is its transpose."""
    primitive = primitives.make(name, run, run)
    ad.defjvp(primitive, None, lambda t, first, x, **p: primitive.bind(first, t, **p))
    ad.primitive_transposes[primitive] = lambda t, first, x, **p: (
        None,
        transposed().bind(first, t, **p),
    )
    batching.primitive_batchers[primitive] = partial(_batched, primitive)
    return primitive


_gather = _selection("max_pool_gather", _gathered, lambda: _spread)
_spread = _selection("max_pool_spread", _spread_out, lambda: _gather)


def _beyond(n: int, before: int, after: int, window: int, strides: int) -> int:
    """Positions to add so that the last partial window counts, unless it would start in the padding after the image."""
    missing = -(n + before + after - window) % strides
    start = n + before + after + missing - window
    return missing if start < n + before else 0


def mean_pool(
    x: jax.Array, window: int, strides: int, padding: Padding = "VALID"
) -> jax.Array:
    """The mean of each window, padded zeros counted.

    Args:
      x: [b, h, w, c].
      window, strides, padding: as of `max_pool`.

    Returns:
      [b, h', w', c].
    """
    if native_is_best():
        pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)
        return nn.avg_pool(x, (window, window), (strides, strides), padding=pads)
    kernel = jnp.full((window, window, 1, x.shape[-1]), window**-2, x.dtype)
    return conv(x, kernel, strides=strides, padding=padding, groups=x.shape[-1])


def global_mean(x: jax.Array) -> jax.Array:
    """The mean over positions, in float32: [b, h, w, c] → [b, c]."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
