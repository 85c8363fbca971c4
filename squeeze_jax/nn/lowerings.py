"""The lowerings: several ways to compute a convolution and its gradients with operations of XLA.

XLA's own convolution is fast on accelerators. On a CPU it is slow for many shapes, and the same sums are faster as matrix
products or as sums of shifted images. Each such way to compute a convolution is called a lowering. `fastest` chooses the
lowering for a shape on a CPU, from measurements on one.

A training step needs three functions, called the maps of a convolution y = x * k. Each is linear in both of its arguments,
and its derivative with respect to either of them is one of the other two maps. A lowering has a function for each map:

    forward   y  [b, h', w', f]         from x and k
    image     x̄  [b, h, w, c]           from ȳ and k: the gradient with respect to the image
    kernel    k̄  [kh, kw, c / g, f]     from x and ȳ: the gradient with respect to the kernel

Here ȳ is the gradient with respect to the output, and g the number of groups. The lowerings, and the convolutions that have
them:

    native   all             `lax.conv_general_dilated`, and the gradients that JAX derives from it
    row      sequences       the same, with one spatial axis instead of two
    taps     depthwise       sum over kernel positions: shifted image times the weights of that position
    matmul   pointwise       one matrix product over all positions; pointwise means kernel 1x1 without padding, here with
                             one group
    patches  one group       im2col: writes out the window of each output as a row, then one matrix product
    direct   one group,      sum over kernel positions and channels, for few channels such as those of a colour image; its
             small kernel    gradients are those of patches
    split    grouped         one convolution per group, side by side
    flat     grouped         XLA's convolution with one spatial axis, along the positions of all images; its gradients are
             pointwise       those of split

Lowerings that add up products themselves do so in float32 for narrower types, such as bfloat16.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import primitives, varying
from squeeze_jax.nn.sums import examples_per_sum, total, totals
from squeeze_jax.nn.windows import (
    Geometry,
    image_from_slices,
    input_slices,
    kernel_positions,
    output_slices,
    pad,
    pad_image,
    pad_output,
)

Map = Literal["forward", "image", "kernel"]
MAPS = ("forward", "image", "kernel")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# With more kernel positions than this, compiling the sum of shifted images takes longer than it saves.
MOST_TERMS = 169
# XLA's convolution is faster with one spatial axis than with two from 4 sequences in a batch on. Batches of 2 and 3 sequences
# need 4000 positions together.
FEWEST_SEQUENCES, FEWEST_POSITIONS = 4, 4000
WIDE = 128  # channels with which matrix products run at full speed


def possible(g: Geometry) -> list[str]:
    """Returns the names of the lowerings that a convolution has."""
    names = ["native", "row"] if g.row else ["native"]
    if g.depthwise and g.groups > 1:
        names.append("taps")
    pointwise = g.kernel == (1, 1) and not any(map(any, g.pads))
    if g.groups == 1:
        names += ["patches", "matmul"] if pointwise else ["patches"]
        if math.prod(g.kernel) * g.channels <= MOST_TERMS:
            names.append("direct")
    else:
        names += ["split", "flat"] if pointwise else ["split"]
    return names


def fastest(which: Map, g: Geometry, batch: int | None = None) -> str:
    """Returns the name of the fastest lowering on a CPU.

    XLA uses an optimized routine for a convolution only if the image, without its padding, is at least as large as the kernel.
    Otherwise it runs a plain loop, which is up to a hundred times slower. In the map "image", the gradient with respect to the
    output takes the image's place.

    Args:
      which: the map to compute.
      g: geometry of the convolution.
      batch: number of examples in the batch; None, or a symbolic size, is treated as a large batch.
    """
    names = possible(g)
    if "taps" in names and math.prod(g.kernel) <= MOST_TERMS:
        return "taps"
    if "matmul" in names:
        return "matmul"
    wide = min(g.one_group().channels, g.one_group().features) >= WIDE
    if "flat" in names and which == "forward" and wide:
        return "flat"
    # Not for depthwise convolutions: one convolution per channel would be thousands of operations.
    if "split" in names and "taps" not in names:
        return "split"
    if "patches" in names:
        image_size = {"forward": g.size, "image": g.out, "kernel": g.extent}[which]
        if any(n < k for n, k in zip(image_size, g.kernel, strict=True)):
            return "patches"
        # Few terms: the first layer of a network of images.
        few_terms = math.prod(g.kernel) * g.channels <= 32
        if which == "forward" and few_terms and g.features < 64:
            return "direct"
    return "row" if "row" in names and _row_is_faster(which, g, batch) else "native"


def _row_is_faster(which: Map, g: Geometry, batch: Any) -> bool:
    """Returns whether "row" is faster than "native".

    With one spatial axis, XLA divides the work better among cores, by examples.
    """
    if isinstance(batch, int) and batch < FEWEST_SEQUENCES:
        return batch > 1 and batch * g.size[1] >= FEWEST_POSITIONS
    return which != "image" or g.features <= g.channels or g.kernel[1] < 9


def run(
    which: Map,
    lowering: str,
    g: Geometry,
    a: jax.Array,
    b: jax.Array,
    *,
    for_vmap: bool = False,
) -> jax.Array:
    """Computes one map of a convolution with a lowering.

    Args:
      which: the map.
      lowering: a name of `possible(g)`; "auto" for the fastest on a CPU.
      g: geometry of the convolution.
      a, b: the map's arguments, in the order of the module's first table: x and k, ȳ and k, or x and ȳ.
      for_vmap: whether to use only operations that are fast under `jax.vmap` and that JAX can differentiate.
    """
    name = fastest(which, g, a.shape[0]) if lowering == "auto" else lowering
    if for_vmap and (name, which) == ("taps", "kernel"):
        return _taps_kernel(g, a, b, at_once=False)
    return _LOWERINGS[name][MAPS.index(which)](g, a, b)


def native(g: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
    """Returns XLA's convolution [b, h', w', f] of x [b, h, w, c] with k [kh, kw, c / groups, f]."""
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


def _image_map_of(forward: Callable) -> Callable:
    def image(g, y, k):
        x = varying.like(jnp.zeros((y.shape[0], *g.size, g.channels), y.dtype), y)
        return jax.vjp(lambda x: forward(g, x, k), x)[1](y)[0]

    return image


def _kernel_map_of(forward: Callable) -> Callable:
    def kernel(g, x, y):
        k = varying.like(jnp.zeros(g.kernel_shape, x.dtype), x)
        return jax.vjp(lambda k: forward(g, x, k), k)[1](y)[0]

    return kernel


def _matmul(g, x, k):
    # Gradients of a product of 4-D arrays are several times slower than those of a product over [positions, c].
    x = x[:, :: g.strides[0], :: g.strides[1]]
    return (_rows(x) @ k[0, 0]).reshape(*x.shape[:-1], g.features)


def _matmul_image(g, y, k):
    x = (_rows(y) @ k[0, 0].T).reshape(*y.shape[:-1], g.channels)
    if g.strides == (1, 1):
        return x
    return pad(x, *((0, n) for n in g.size), spacing=g.strides)


def _matmul_kernel(g, x, y):
    x = x[:, :: g.strides[0], :: g.strides[1]]
    return _transposed_product(_rows(x), _rows(y)).reshape(g.kernel_shape)


def _transposed_product(a, b):
    """Returns a.T @ b of [n, c] and [n, f] without the copy of `a` that XLA makes for `a.T @ b`."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _patches(g, x, k):
    at = input_slices(g, x)
    window = [at(u, v) for u, v in kernel_positions(g)]
    rows = jnp.concatenate(window, -1).reshape(-1, math.prod(g.kernel) * g.channels)
    return (rows @ _rows(k)).reshape(x.shape[0], *g.out, g.features)


def _patches_image(g, y, k):
    """Convolves ȳ, with zeros between its positions for the strides, with the kernel rotated by 180 degrees."""
    rotated = g._replace(
        size=tuple(n + e - 1 for n, e in zip(g.size, g.extent, strict=True)),
        channels=g.features,
        features=g.channels,
        strides=(1, 1),
        pads=((0, 0), (0, 0)),
    )
    axes = zip(g.extent, g.pads, rotated.size, strict=True)
    frames = [(e - 1 - p[0], n) for e, p, n in axes]
    return _patches(rotated, pad(y, *frames, spacing=g.strides), _rotate(k))


@partial(primitives.compiled_alone, static=(0,))
def _patches_kernel(g, x, y):
    at, y = input_slices(g, x), _rows(y)
    kernel_rows = []
    for u in range(g.kernel[0]):
        window = [at(u, v) for v in range(g.kernel[1])]
        rows = jnp.concatenate(window, -1).reshape(-1, g.kernel[1] * g.channels)
        kernel_rows.append(_transposed_product(rows, y))
    return jnp.stack(kernel_rows).reshape(g.kernel_shape)


def _taps(g, x, k):
    at, wide = input_slices(g, _repeat_channels(g, x)), _accumulation_dtype(x)
    y = 0
    for u, v in kernel_positions(g):
        y = y + at(u, v).astype(wide) * k[u, v, 0].astype(wide)
    return y.astype(x.dtype)


def _taps_image(g, y, k):
    at, wide = output_slices(g, y), _accumulation_dtype(y)
    terms = {
        (u, v): at(u, v).astype(wide) * k[u, v, 0].astype(wide)
        for u, v in kernel_positions(g)
    }
    x = _sum_repeated_channels(g, image_from_slices(g, terms))
    return lax.optimization_barrier(x.astype(y.dtype))


def _taps_kernel(g, x, y, at_once=True):
    at, wide = input_slices(g, _repeat_channels(g, x)), _accumulation_dtype(x)
    before, y = pad_output(g, y)
    y = y[:, before[0] :, before[1] :][:, : g.out[0], : g.out[1]].astype(wide)
    count = 3 if examples_per_sum(x.shape[0]) > 3 else 9
    all_positions, sums = kernel_positions(g), []
    for start in range(0, len(all_positions), count):
        positions = all_positions[start : start + count]
        terms = [at(u, v).astype(wide) * y for u, v in positions]
        sums.append(totals(terms) if at_once else jnp.stack(list(map(total, terms))))
    return jnp.concatenate(sums).reshape(g.kernel_shape).astype(x.dtype)


def _direct(g, x, k):
    x, wide = lax.optimization_barrier(pad_image(g, x)), _accumulation_dtype(x)
    y = 0
    for u, v in kernel_positions(g):
        i, j = (n * d for n, d in zip((u, v), g.dilation, strict=True))
        inputs = x[:, i :: g.strides[0], j :: g.strides[1]].astype(wide)
        inputs = inputs[:, : g.out[0], : g.out[1]]
        for c in range(g.channels):
            # Each number of the image multiplies all features, so the strided slice costs nothing here.
            y = y + inputs[..., c : c + 1] * k[u, v, c].astype(wide)
    return y.astype(x.dtype)


def _split(which: Map):
    def run_each_group(g, a, b):
        group = g.one_group()
        pairs = zip(jnp.split(a, g.groups, -1), jnp.split(b, g.groups, -1), strict=True)
        return jnp.concatenate([run(which, "auto", group, *pair) for pair in pairs], -1)

    return run_each_group


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
    "native": (native, _image_map_of(native), _kernel_map_of(native)),
    "row": (_row, _image_map_of(_row), _kernel_map_of(_row)),
    "taps": (_taps, _taps_image, _taps_kernel),
    "matmul": (_matmul, _matmul_image, _matmul_kernel),
    "patches": (_patches, _patches_image, _patches_kernel),
    "split": tuple(map(_split, MAPS)),
    "direct": (_direct, _patches_image, _patches_kernel),
    "flat": (_flat, _split("image"), _split("kernel")),
}


def _rotate(k: jax.Array) -> jax.Array:
    """Rotates a kernel by 180 degrees and swaps its channels and features."""
    return k[::-1, ::-1].transpose(0, 1, 3, 2)


def _repeat_channels(g: Geometry, x: jax.Array) -> jax.Array:
    """Repeats each channel of a depthwise convolution's image for every feature computed from it."""
    times = g.features // g.channels
    return x if times == 1 else jnp.repeat(x, times, -1)


def _sum_repeated_channels(g: Geometry, x: jax.Array) -> jax.Array:
    """Adds up the copies of each channel that `_repeat_channels` makes; its transpose."""
    times = g.features // g.channels
    return x if times == 1 else x.reshape(*x.shape[:-1], -1, times).sum(-1)


def _accumulation_dtype(x: jax.Array):
    return jnp.promote_types(x.dtype, jnp.float32)
