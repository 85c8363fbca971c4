"""Pooling."""

from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from squeeze_jax.nn import primitives
from squeeze_jax.nn.conv import Padding, conv, explicit_padding, native_is_forced
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.image import images
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

    Raises:
      UserError: x is no batch of images, unknown padding, or an image smaller than the window.
    """
    images(x, "max_pool")
    pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)
    if ceil:
        pads = tuple(
            (before, after + _beyond(n, before, after, window, strides))
            for n, (before, after) in zip(x.shape[1:3], pads, strict=True)
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
    return (_whole if native_is_forced() else _largest)(geometry, x)


def _lowest(x: jax.Array):
    """The value that is never the largest."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return -jnp.inf
    return False if x.dtype == bool else jnp.iinfo(x.dtype).min


def _whole(g: Geometry, x: jax.Array) -> jax.Array:
    """One operation of XLA."""
    around = ((0, 0), *g.pads, (0, 0))
    window, strides = (1, *g.kernel, 1), (1, *g.strides, 1)
    fill = np.array(_lowest(x), x.dtype)  # a constant, which tells XLA the gradient
    return lax.reduce_window(x, fill, lax.max, window, strides, around)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _largest(g: Geometry, x: jax.Array) -> jax.Array:
    """On a CPU the largest of shifted images: there XLA's gradient of a window's maximum takes as long as convolutions."""
    return _maximum.bind(x, geometry=g)


@_largest.defjvp
def _largest_jvp(g, primals, tangents):
    """The derivative follows the first of equally large values, as XLA's and PyTorch's do."""
    (x,), (t,) = primals, tangents
    y = _largest(g, x)
    # A position does not change with the values.
    first = _where_first.bind(*lax.stop_gradient((x, y)), geometry=g)
    return y, _gather.bind(first, x, t, geometry=g)


def _shifted_maximum(x, *, geometry):
    at = shifted(geometry, x, _lowest(x))
    return reduce(jnp.maximum, (at(u, v) for u, v in positions(geometry)))


def _first(x, y, *, geometry):
    """uint8 [b, h', w', c]: the first position of each window that has its largest value; 255: none, where it is no number."""
    at = shifted(geometry, x, _lowest(x))
    first = jnp.full(y.shape, 255, jnp.uint8)
    # From the last to the first, so that the first stays.
    for i, (u, v) in reversed(list(enumerate(positions(geometry)))):
        first = jnp.where(at(u, v) == y, jnp.uint8(i), first)
    return first


def _gathered(first, x, t, *, geometry):
    """[b, h, w, c] → [b, h', w', c]: of each window of t the position `first`."""
    at = shifted(geometry, t)
    taps = enumerate(positions(geometry))
    return sum(jnp.where(first == i, at(u, v), 0) for i, (u, v) in taps)


def _spread_out(first, x, y, *, geometry):
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


# On other platforms XLA finds the position itself, in x.


def _unneeded_first(x, y, *, geometry):
    return jnp.zeros_like(y, jnp.uint8)


def _whole_gathered(first, x, t, *, geometry):
    return jax.jvp(partial(_whole, geometry), (x,), (t,))[1]


def _whole_spread_out(first, x, y, *, geometry):
    return jax.vjp(partial(_whole, geometry), x)[1](y)[0]


def _batched(primitive, arrays, dims, *, geometry):
    """`vmap`: the axis joins the batch."""
    n = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)
    arrays = [
        jnp.broadcast_to(a, (n, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(arrays, dims, strict=True)
    ]
    out = primitive.bind(
        *(a.reshape(-1, *a.shape[2:]) for a in arrays), geometry=geometry
    )
    return out.reshape(n, -1, *out.shape[1:]), 0


def _primitive(name: str, on_cpu, elsewhere) -> Primitive:
    primitive = primitives.make(name, on_cpu, elsewhere)
    batching.primitive_batchers[primitive] = partial(_batched, primitive)
    return primitive


def _selection(name: str, on_cpu, elsewhere, transposed: Callable) -> Primitive:
    """A primitive that is linear in its last argument, for which `transposed()` is its transpose."""
    primitive = _primitive(name, on_cpu, elsewhere)
    ad.defjvp(
        primitive,
        None,
        None,
        lambda t, first, x, _, **p: primitive.bind(first, x, t, **p),
    )
    ad.primitive_transposes[primitive] = lambda t, first, x, _, **p: (
        None,
        None,
        transposed().bind(first, x, t, **p),
    )
    return primitive


_maximum = _primitive(
    "max_pool", _shifted_maximum, lambda x, *, geometry: _whole(geometry, x)
)
_where_first = _primitive("max_pool_first", _first, _unneeded_first)
_gather = _selection("max_pool_gather", _gathered, _whole_gathered, lambda: _spread)
_spread = _selection("max_pool_spread", _spread_out, _whole_spread_out, lambda: _gather)


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
      [b, h', w', c]; of integers float32.
    """
    x = as_float(images(x, "mean_pool"))
    pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)

    def whole(x):
        return nn.avg_pool(x, (window, window), (strides, strides), padding=pads)

    def shifted_sum(x):
        kernel = jnp.full((window, window, 1, x.shape[-1]), window**-2, x.dtype)
        return conv(x, kernel, strides=strides, padding=pads, groups=x.shape[-1])

    if native_is_forced():
        return whole(x)
    return lax.platform_dependent(x, cpu=shifted_sum, default=whole)


def global_mean(x: jax.Array) -> jax.Array:
    """The mean over positions, in float32: [b, h, w, c] → [b, c]."""
    images(x, "global_mean")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
