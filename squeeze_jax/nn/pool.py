"""Max pooling, mean pooling and global mean pooling of images [b, h, w, c]."""

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
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.windows import (
    Geometry,
    image_from_slices,
    input_slices,
    kernel_positions,
    output_slices,
)


def max_pool(
    x: jax.Array,
    window: int,
    strides: int,
    padding: Padding = "VALID",
    *,
    ceil: bool = False,
) -> jax.Array:
    """Returns the largest value in each window of an image.

    Args:
      x: [b, h, w, c].
      window: size of a window along each axis.
      strides: distance between neighbouring windows along each axis.
      padding: see `conv`; padded positions are never the largest.
      ceil: whether to add a last window that reaches beyond the padded image, as Caffe and PyTorch's `ceil_mode` do.

    Returns:
      [b, h', w', c].

    Raises:
      UserError: x is not a batch of images, the padding is unknown, or the image is smaller than the window.
    """
    check_images(x, "max_pool")
    pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)
    if ceil:
        pads = tuple(
            (before, after + _ceil_padding(n, before, after, window, strides))
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
    return (_native_max_pool if native_is_forced() else _max_pool)(geometry, x)


def _lowest_value(x: jax.Array):
    """Returns the lowest value of x's dtype."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return -jnp.inf
    return False if x.dtype == bool else jnp.iinfo(x.dtype).min


def _native_max_pool(g: Geometry, x: jax.Array) -> jax.Array:
    """Computes the pooling by one operation of XLA."""
    pads = ((0, 0), *g.pads, (0, 0))
    window, strides = (1, *g.kernel, 1), (1, *g.strides, 1)
    # XLA knows the gradient of this operation only if the initial value is a constant.
    lowest = np.array(_lowest_value(x), x.dtype)
    return lax.reduce_window(x, lowest, lax.max, window, strides, pads)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _max_pool(g: Geometry, x: jax.Array) -> jax.Array:
    """Computes the pooling on a CPU as the maximum of shifted images, and elsewhere by XLA's operation.

    On a CPU, XLA's gradient of a window's maximum takes as long as convolutions.
    """
    return _maximum.bind(x, geometry=g)


@_max_pool.defjvp
def _max_pool_jvp(g, primals, tangents):
    """Computes the derivative of max pooling; of several largest values in a window the first counts, as in XLA and PyTorch."""
    (x,), (t,) = primals, tangents
    y = _max_pool(g, x)
    # The position of the maximum is locally constant, so its derivative is zero.
    first = _argmax.bind(*lax.stop_gradient((x, y)), geometry=g)
    return y, _gather.bind(first, x, t, geometry=g)


def _maximum_on_cpu(x, *, geometry):
    at = input_slices(geometry, x, _lowest_value(x))
    return reduce(jnp.maximum, (at(u, v) for u, v in kernel_positions(geometry)))


def _argmax_on_cpu(x, y, *, geometry):
    """Returns the index of the first window position with the maximum y, uint8 [b, h', w', c]; 255 if y is NaN."""
    at = input_slices(geometry, x, _lowest_value(x))
    first = jnp.full(y.shape, 255, jnp.uint8)
    # From the last position to the first, so that the first one remains.
    for i, (u, v) in reversed(list(enumerate(kernel_positions(geometry)))):
        first = jnp.where(at(u, v) == y, jnp.uint8(i), first)
    return first


def _gather_on_cpu(first, x, t, *, geometry):
    """Returns t [b, h, w, c] at the position `first` of each window, [b, h', w', c]."""
    at = input_slices(geometry, t)
    window = enumerate(kernel_positions(geometry))
    return sum(jnp.where(first == i, at(u, v), 0) for i, (u, v) in window)


def _spread_on_cpu(first, x, y, *, geometry):
    """Adds y [b, h', w', c] to the position `first` of each window, [b, h, w, c]; the transpose of `_gather_on_cpu`."""
    first_at = output_slices(geometry, first, fill=255)
    y_at = output_slices(geometry, y)
    return image_from_slices(
        geometry,
        {
            (u, v): jnp.where(first_at(u, v) == i, y_at(u, v), 0)
            for i, (u, v) in enumerate(kernel_positions(geometry))
        },
    )


# On other platforms XLA finds the position of the maximum in x itself, and `first` is not used.


def _no_argmax(x, y, *, geometry):
    return jnp.zeros_like(y, jnp.uint8)


def _native_gather(first, x, t, *, geometry):
    return jax.jvp(partial(_native_max_pool, geometry), (x,), (t,))[1]


def _native_spread(first, x, y, *, geometry):
    return jax.vjp(partial(_native_max_pool, geometry), x)[1](y)[0]


def _batch_rule(primitive, arrays, dims, *, geometry):
    """Applies `jax.vmap` to a primitive: the mapped axis joins the batch axis."""
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
    batching.primitive_batchers[primitive] = partial(_batch_rule, primitive)
    return primitive


def _selection(name: str, on_cpu, elsewhere, transposed: Callable) -> Primitive:
    """Makes a primitive that is linear in its last argument; `transposed()` returns the primitive that is its transpose."""
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
    "max_pool", _maximum_on_cpu, lambda x, *, geometry: _native_max_pool(geometry, x)
)
_argmax = _primitive("max_pool_first", _argmax_on_cpu, _no_argmax)
_gather = _selection("max_pool_gather", _gather_on_cpu, _native_gather, lambda: _spread)
_spread = _selection("max_pool_spread", _spread_on_cpu, _native_spread, lambda: _gather)


def _ceil_padding(n: int, before: int, after: int, window: int, strides: int) -> int:
    """Returns how much padding makes the last partial window count; 0 if it would start in the padding after the image."""
    missing = -(n + before + after - window) % strides
    start = n + before + after + missing - window
    return missing if start < n + before else 0


def mean_pool(
    x: jax.Array, window: int, strides: int, padding: Padding = "VALID"
) -> jax.Array:
    """Returns the mean of each window of an image; zeros of the padding count.

    Args:
      x: [b, h, w, c].
      window, strides, padding: see `max_pool`.

    Returns:
      [b, h', w', c] in the dtype of x, float32 for integers.

    Raises:
      UserError: x is not a batch of images, the padding is unknown, or the image is smaller than the window.
    """
    x = as_float(check_images(x, "mean_pool"))
    pads = explicit_padding(padding, x.shape[1:3], (window,) * 2, (strides,) * 2)

    def native_mean(x):
        return nn.avg_pool(x, (window, window), (strides, strides), padding=pads)

    def depthwise_conv(x):
        kernel = jnp.full((window, window, 1, x.shape[-1]), window**-2, x.dtype)
        return conv(x, kernel, strides=strides, padding=pads, groups=x.shape[-1])

    if native_is_forced():
        return native_mean(x)
    return lax.platform_dependent(x, cpu=depthwise_conv, default=native_mean)


def window_mean(x: jax.Array, strides: int) -> jax.Array:
    """Returns the means of windows that touch each other: [b, h, w, c] → [b, ⌈h / strides⌉, ⌈w / strides⌉, c].

    The last windows are smaller if the image does not divide into whole ones.
    """
    if strides == 1:
        return x
    window = (strides, strides)
    means = nn.avg_pool(x, window, window, "SAME", count_include_pad=False)
    return means.astype(x.dtype)


def global_mean(x: jax.Array) -> jax.Array:
    """Returns the mean over all positions of an image in float32, or a wider dtype of x: [b, h, w, c] → [b, c].

    Raises:
      UserError: x is not a batch of images.
    """
    check_images(x, "global_mean")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
