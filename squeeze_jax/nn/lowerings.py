"""How the three maps of a convolution are computed: each lowering in plain operations of XLA.

A convolution y = x * k is linear in the image and in the kernel, and has three maps, each the derivative of the others:

    forward   y  [b, h', w', f]         from x and k
    image     x̄  [b, h, w, c]           from ȳ and k: the gradient with respect to the image
    kernel    k̄  [kh, kw, c / g, f]     from x and ȳ: the gradient with respect to the kernel

A lowering has a function for each; `fastest` says which is taken on a CPU, from measurements of one.

  native   `lax.conv_general_dilated` and what JAX makes of its transposes
  row      sequences: the same with one axis of positions
  taps     depthwise: a sum over kernel positions of a shifted image times that position's weights
  matmul   pointwise (1x1, one group, no padding): one matrix product over all positions
  patches  one group: the window of each output written out as a row, then a matrix product
  direct   one group of few channels, as those of a colour image: a sum over kernel positions and channels; the gradients
           are those of patches
  split    grouped: one convolution a group, side by side
  flat     grouped and pointwise: XLA's convolution of one axis, along all positions; the gradients are split

Sums of narrow types are kept in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import primitives, varying
from squeeze_jax.nn.sums import share, total, totals
from squeeze_jax.nn.windows import (
    Geometry,
    framed,
    joined,
    pad,
    padded,
    positions,
    reaching,
    shifted,
)

Map = Literal["forward", "image", "kernel"]
MAPS = ("forward", "image", "kernel")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Beyond this many kernel positions the sum of shifted images is longer to compile than it saves.
MOST_TAPS = 169
# Sequences of a batch, and positions of fewer, from which on XLA's convolution of one axis is quicker than that of two.
FEWEST_ROWS, LONG = 4, 4000
WIDE = 128  # channels with which matrix products run at full speed


def possible(g: Geometry) -> list[str]:
    """The lowerings that a convolution has."""
    found = ["native", "row"] if g.row else ["native"]
    if g.depthwise and g.groups > 1:
        found.append("taps")
    pointwise = g.kernel == (1, 1) and not any(map(any, g.pads))
    if g.groups == 1:
        found += ["patches", "matmul"] if pointwise else ["patches"]
        if math.prod(g.kernel) * g.channels <= MOST_TAPS:
            found.append("direct")
    else:
        found += ["split", "flat"] if pointwise else ["split"]
    return found


def fastest(which: Map, g: Geometry, batch: int | None = None) -> str:
    """The lowering that a CPU is quickest with, for a batch of so many examples; None for many.

    XLA hands a convolution to an optimized routine only where the image, without its padding, is as large as the
    kernel; else it runs a plain loop, up to a hundred times slower. In the gradient for the image the output's gradient
    takes the image's place.
    """
    there = possible(g)
    if "taps" in there and math.prod(g.kernel) <= MOST_TAPS:
        return "taps"
    if "matmul" in there:
        return "matmul"
    wide = min(g.one_group().channels, g.one_group().features) >= WIDE
    if "flat" in there and which == "forward" and wide:
        return "flat"
    if "split" in there and "taps" not in there:
        return "split"  # one convolution a channel would be thousands of operations
    if "patches" in there:
        place = {"forward": g.size, "image": g.out, "kernel": g.extent}[which]
        if any(n < k for n, k in zip(place, g.kernel, strict=True)):
            return "patches"
        few = math.prod(g.kernel) * g.channels <= 32  # the first layer, of an image
        if which == "forward" and few and g.features < 64:
            return "direct"
    return "row" if "row" in there and _row_is_best(which, g, batch) else "native"


def _row_is_best(which: Map, g: Geometry, batch: Any) -> bool:
    """Whether XLA divides the work among cores better with one axis of positions, as it does between examples."""
    if isinstance(batch, int) and batch < FEWEST_ROWS:
        return batch > 1 and batch * g.size[1] >= LONG
    return which != "image" or g.features <= g.channels or g.kernel[1] < 9


def run(
    which: Map,
    lowering: str,
    g: Geometry,
    a: jax.Array,
    b: jax.Array,
    *,
    plain: bool = False,
) -> jax.Array:
    """Computes one of the maps of two arrays, in the order that the table at the top gives them.

    `plain` is for `vmap`: of operations that stay quick under it and have derivatives of their own.
    """
    name = fastest(which, g, a.shape[0]) if lowering == "auto" else lowering
    if plain and (name, which) == ("taps", "kernel"):
        return _taps_kernel(g, a, b, at_once=False)
    return _LOWERINGS[name][MAPS.index(which)](g, a, b)


def native(g: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        k,
        g.strides,
        g.pads,
        rhs_dilation=g.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=g.groups,
    )


def _row(g, x, k):
    y = lax.conv_general_dilated(
        x[:, 0],
        k[0],
        g.strides[1:],
        g.pads[1:],
        rhs_dilation=g.dilation[1:],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=g.groups,
    )
    return y[:, None]


def _image_of(forward: Callable) -> Callable:
    def image(g, y, k):
        x = varying.like(jnp.zeros((y.shape[0], *g.size, g.channels), y.dtype), y)
        return jax.vjp(lambda x: forward(g, x, k), x)[1](y)[0]

    return image


def _kernel_of(forward: Callable) -> Callable:
    def kernel(g, x, y):
        k = varying.like(jnp.zeros(g.kernel_shape, x.dtype), x)
        return jax.vjp(lambda k: forward(g, x, k), k)[1](y)[0]

    return kernel


def _matmul(g, x, k):
    # As a 4-D product the gradients are several times slower than over [positions, c].
    x = x[:, :: g.strides[0], :: g.strides[1]]
    return (_rows(x) @ k[0, 0]).reshape(*x.shape[:-1], g.features)


def _matmul_image(g, y, k):
    x = (_rows(y) @ k[0, 0].T).reshape(*y.shape[:-1], g.channels)
    if g.strides == (1, 1):
        return x
    return pad(x, *((0, n) for n in g.size), between=g.strides)


def _matmul_kernel(g, x, y):
    x = x[:, :: g.strides[0], :: g.strides[1]]
    return _inner(_rows(x), _rows(y)).reshape(g.kernel_shape)


def _inner(a, b):
    """[n, c], [n, f] → [c, f]; XLA first copies what is written as `a.T @ b`."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _patches(g, x, k):
    at = shifted(g, x)
    window = [at(u, v) for u, v in positions(g)]
    rows = jnp.concatenate(window, -1).reshape(-1, math.prod(g.kernel) * g.channels)
    return (rows @ _rows(k)).reshape(x.shape[0], *g.out, g.features)


def _patches_image(g, y, k):
    """The forward map of ȳ, with zeros between its positions, and the kernel turned around."""
    turned = g._replace(
        size=tuple(n + e - 1 for n, e in zip(g.size, g.extent, strict=True)),
        channels=g.features,
        features=g.channels,
        strides=(1, 1),
        pads=((0, 0), (0, 0)),
    )
    axes = zip(g.extent, g.pads, turned.size, strict=True)
    ends = [(e - 1 - p[0], n) for e, p, n in axes]
    return _patches(turned, pad(y, *ends, between=g.strides), _turned(k))


@partial(primitives.apart, static=(0,))
def _patches_kernel(g, x, y):
    at, y = shifted(g, x), _rows(y)
    parts = []
    for u in range(g.kernel[0]):
        window = [at(u, v) for v in range(g.kernel[1])]
        rows = jnp.concatenate(window, -1).reshape(-1, g.kernel[1] * g.channels)
        parts.append(_inner(rows, y))
    return jnp.stack(parts).reshape(g.kernel_shape)


def _taps(g, x, k):
    at, wide = shifted(g, _repeated(g, x)), _wide(x)
    y = 0
    for u, v in positions(g):
        y = y + at(u, v).astype(wide) * k[u, v, 0].astype(wide)
    return y.astype(x.dtype)


def _taps_image(g, y, k):
    at, wide = reaching(g, y), _wide(y)
    terms = {
        (u, v): at(u, v).astype(wide) * k[u, v, 0].astype(wide) for u, v in positions(g)
    }
    x = _summed(g, joined(g, terms))
    return lax.optimization_barrier(x.astype(y.dtype))


def _taps_kernel(g, x, y, at_once=True):
    at, wide = shifted(g, _repeated(g, x)), _wide(x)
    before, y = padded(g, y)
    y = y[:, before[0] :, before[1] :][:, : g.out[0], : g.out[1]].astype(wide)
    together = 3 if share(x.shape[0]) > 3 else 9
    where, sums = positions(g), []
    for some in (where[n : n + together] for n in range(0, len(where), together)):
        terms = [at(u, v).astype(wide) * y for u, v in some]
        sums.append(totals(terms) if at_once else jnp.stack(list(map(total, terms))))
    return jnp.concatenate(sums).reshape(g.kernel_shape).astype(x.dtype)


def _direct(g, x, k):
    x, wide = lax.optimization_barrier(framed(g, x)), _wide(x)
    y = 0
    for u, v in positions(g):
        i, j = (n * d for n, d in zip((u, v), g.dilation, strict=True))
        seen = x[:, i :: g.strides[0], j :: g.strides[1]].astype(wide)
        seen = seen[:, : g.out[0], : g.out[1]]
        for c in range(g.channels):
            # One number of the image, all features: strides cost nothing here.
            y = y + seen[..., c : c + 1] * k[u, v, c].astype(wide)
    return y.astype(x.dtype)


def _split(which: Map):
    def run_each(g, a, b):
        one = g.one_group()
        pairs = zip(jnp.split(a, g.groups, -1), jnp.split(b, g.groups, -1), strict=True)
        return jnp.concatenate([run(which, "auto", one, *pair) for pair in pairs], -1)

    return run_each


def _flat(g, x, k):
    x = x[:, :: g.strides[0], :: g.strides[1]]
    y = lax.conv_general_dilated(
        x.reshape(1, -1, g.channels),
        k[0],
        (1,),
        ((0, 0),),
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=g.groups,
    )
    return y.reshape(*x.shape[:-1], g.features)


_LOWERINGS: dict[str, tuple[Callable, Callable, Callable]] = {
    "native": (native, _image_of(native), _kernel_of(native)),
    "row": (_row, _image_of(_row), _kernel_of(_row)),
    "taps": (_taps, _taps_image, _taps_kernel),
    "matmul": (_matmul, _matmul_image, _matmul_kernel),
    "patches": (_patches, _patches_image, _patches_kernel),
    "split": tuple(map(_split, MAPS)),
    "direct": (_direct, _patches_image, _patches_kernel),
    "flat": (_flat, _split("image"), _split("kernel")),
}


def _turned(k: jax.Array) -> jax.Array:
    return k[::-1, ::-1].transpose(0, 1, 3, 2)


def _repeated(g: Geometry, x: jax.Array) -> jax.Array:
    """Each channel as often as it has outputs, depthwise."""
    times = g.features // g.channels
    return x if times == 1 else jnp.repeat(x, times, -1)


def _summed(g: Geometry, x: jax.Array) -> jax.Array:
    """The transpose of `_repeated`."""
    times = g.features // g.channels
    return x if times == 1 else x.reshape(*x.shape[:-1], -1, times).sum(-1)


def _wide(x: jax.Array):
    return jnp.promote_types(x.dtype, jnp.float32)
