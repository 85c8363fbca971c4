"""How the three maps of a convolution are computed: each lowering in plain operations of XLA.

A convolution y = x * k is linear in the image and in the kernel, and has three maps, each the derivative of the others:

    forward   y  [b, h', w', f]         from x and k
    image     x̄  [b, h, w, c]           from ȳ and k: the gradient with respect to the image
    kernel    k̄  [kh, kw, c / g, f]     from x and ȳ: the gradient with respect to the kernel

A lowering has a function for each; `fastest` says which is taken on a CPU, from measurements of one.

  native   `lax.conv_general_dilated` and what JAX makes of its transposes
  taps     depthwise: a sum over kernel positions of a shifted image times that position's weights
  matmul   pointwise (1x1, one group, no padding): one matrix product over all positions
  patches  one group: the window of each output written out as a row, then a matrix product
  direct   one group of few channels, as those of a colour image: a sum over kernel positions and channels; the gradients
           are those of patches
  split    grouped: one convolution a group, side by side
  flat     grouped and pointwise: XLA's convolution of one axis, along all positions; the gradients are split

Sums of narrow types are kept in float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import primitives, varying

Pair = tuple[int, int]
Map = Literal["forward", "image", "kernel"]
MAPS = ("forward", "image", "kernel")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Beyond this many kernel positions the sum of shifted images is longer to compile than it saves.
MOST_TAPS = 169
WIDE = 128  # channels with which matrix products run at full speed


class Geometry(NamedTuple):
    """What a convolution is beside its arrays; each pair is (vertical, horizontal).

    Attributes:
      size: positions of the image.
      channels: of the image.
      kernel: positions of the kernel.
      features: of the output.
      strides, dilation: as in `conv`.
      pads: zeros (before, after) on each axis.
      groups: of channels and features.
    """

    size: Pair
    channels: int
    kernel: Pair
    features: int
    strides: Pair
    pads: tuple[Pair, Pair]
    dilation: Pair
    groups: int

    @property
    def out(self) -> Pair:
        """Positions of the output."""
        axes = zip(self.size, self.pads, self.extent, self.strides, strict=True)
        return tuple((n + sum(p) - e) // s + 1 for n, p, e, s in axes)

    @property
    def extent(self) -> Pair:
        """Positions that a window spans."""
        axes = zip(self.kernel, self.dilation, strict=True)
        return tuple(d * (k - 1) + 1 for k, d in axes)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        return (*self.kernel, self.channels // self.groups, self.features)

    def one_group(self) -> "Geometry":
        """The convolution that each group is."""
        return self._replace(
            channels=self.channels // self.groups,
            features=self.features // self.groups,
            groups=1,
        )


def possible(g: Geometry) -> list[str]:
    """The lowerings that a convolution has."""
    found = ["native"]
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


def fastest(which: Map, g: Geometry) -> str:
    """The lowering that a CPU is quickest with.

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
        if which == "kernel" and g.channels >= WIDE and g.dilation == (1, 1):
            return "patches"
        few = math.prod(g.kernel) * g.channels <= 32  # the first layer, of an image
        if which == "forward" and few and g.features < 64:
            return "direct"
    return "native"


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
    name = fastest(which, g) if lowering == "auto" else lowering
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


def _native_image(g, y, k):
    x = varying.like(jnp.zeros((y.shape[0], *g.size, g.channels), y.dtype), y)
    return jax.vjp(lambda x: native(g, x, k), x)[1](y)[0]


def _native_kernel(g, x, y):
    k = varying.like(jnp.zeros(g.kernel_shape, x.dtype), x)
    return jax.vjp(lambda k: native(g, x, k), k)[1](y)[0]


def _matmul(g, x, k):
    # As a 4-D product the gradients are several times slower than over [positions, c].
    x = x[:, :: g.strides[0], :: g.strides[1]]
    return (_rows(x) @ k[0, 0]).reshape(*x.shape[:-1], g.features)


def _matmul_image(g, y, k):
    x = (_rows(y) @ k[0, 0].T).reshape(*y.shape[:-1], g.channels)
    if g.strides == (1, 1):
        return x
    return _pad(x, *((0, n) for n in g.size), between=g.strides)


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
    return _patches(turned, _pad(y, *ends, between=g.strides), _turned(k))


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
    before, padded = _padded(g, y)
    y = padded[:, before[0] :, before[1] :][:, : g.out[0], : g.out[1]].astype(wide)
    together = 3 if _share(x.shape[0]) > 3 else 9
    where, sums = positions(g), []
    for some in (where[n : n + together] for n in range(0, len(where), together)):
        terms = [at(u, v).astype(wide) * y for u, v in some]
        sums.append(totals(terms) if at_once else jnp.stack(list(map(_total, terms))))
    return jnp.concatenate(sums).reshape(g.kernel_shape).astype(x.dtype)


def _share(batch: int) -> int:
    """The largest divisor of the batch up to 16; 1 for a batch that is only known later."""
    if not isinstance(batch, int):
        return 1
    return next(n for n in range(16, 0, -1) if batch % n == 0)


def totals(terms: Sequence[jax.Array]) -> jax.Array:
    """Sums of several arrays [b, ..., c] over all but channels, [n, c], in one pass over what they are computed from.

    A pass adds up images `share` apart, or, where the batch has no such parts, positions: with the whole batch in one
    sum the strides through memory are so long that it takes three times as long or more.
    """
    first = terms[0]
    # XLA cannot shard a reduction of several arrays: it would gather them on every device. Inside `jax.shard_map` it
    # need not, and one device has nothing to gather.
    if jax.device_count() > 1 and not varying.axes(first):
        return jnp.stack(list(map(_total, terms)))
    share, axes = _share(first.shape[0]), tuple(range(1, first.ndim - 1))
    if share > 3:
        terms = [t.reshape(-1, share, *t.shape[1:]) for t in terms]
        axes = (1,)
    zero = varying.like(jnp.zeros((), first.dtype), first)
    parts = lax.reduce(tuple(terms), (zero,) * len(terms), _add, axes)
    return jnp.stack(parts).sum(range(1, parts[0].ndim))


def _total(x: jax.Array) -> jax.Array:
    return x.sum(range(x.ndim - 1))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _direct(g, x, k):
    x, wide = lax.optimization_barrier(_framed(g, x)), _wide(x)
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
    "native": (native, _native_image, _native_kernel),
    "taps": (_taps, _taps_image, _taps_kernel),
    "matmul": (_matmul, _matmul_image, _matmul_kernel),
    "patches": (_patches, _patches_image, _patches_kernel),
    "split": tuple(map(_split, MAPS)),
    "direct": (_direct, _patches_image, _patches_kernel),
    "flat": (_flat, _split("image"), _split("kernel")),
}


def positions(g: Geometry) -> list[Pair]:
    return list(itertools.product(*map(range, g.kernel)))


def shifted(
    g: Geometry, x: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns `at(u, v)`: what the kernel's position (u, v) sees of the image padded with `fill`, [b, h', w', c].

    A strided slice costs two to three times a plain one. Reshaped to [b, h/s, s, w/s, s, c], each phase is plain.
    """
    counts = _counts(g)
    x = _framed(g, x, fill)
    if g.strides == (1, 1):
        phases = {(0, 0): lax.optimization_barrier(x)}
    else:
        (h, w), (s, t) = counts, g.strides
        x = lax.optimization_barrier(x).reshape(x.shape[0], h, s, w, t, x.shape[-1])
        phases = {
            (m, n): x[:, :, m, :, n] for m, n in itertools.product(range(s), range(t))
        }
        # Without the barriers XLA pads and takes phases anew for every tap.
        phases = lax.optimization_barrier(phases)

    def at(u, v):
        (i, m), (j, n) = (
            divmod(k * d, s)
            for k, d, s in zip((u, v), g.dilation, g.strides, strict=True)
        )
        return phases[m, n][:, i : i + g.out[0], j : j + g.out[1]]

    return at


def _counts(g):
    """Steps of the strides that the windows span."""
    axes = zip(g.out, g.extent, g.strides, strict=True)
    return [o + (e - 1) // s for o, e, s in axes]


def _framed(g, x, fill=0.0):
    """The image padded, or cropped, to whole steps of the strides."""
    sizes = [n * s for n, s in zip(_counts(g), g.strides, strict=True)]
    ends = ((p[0], n) for p, n in zip(g.pads, sizes, strict=True))
    return _pad(x, *ends, fill=fill)


def reaching(
    g: Geometry, y: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns `at(u, v)`: for the rows and columns of the image, in steps of the strides, what reaches them by (u, v).

    Row q of the padded image meets row o of the output through kernel row u where q = s o + d u. The rows with the same
    q modulo s share their kernel rows: `at` has one row for each t = q div s, a shifted part of the padded y.
    """
    before, y = _padded(g, y, fill)
    count = [n - i for n, i in zip(y.shape[1:3], before, strict=True)]

    def at(u, v):
        i, j = (
            e - k * d // s
            for e, k, d, s in zip(before, (u, v), g.dilation, g.strides, strict=True)
        )
        return y[:, i : i + count[0], j : j + count[1]]

    return at


def joined(g: Geometry, terms: dict[Pair, jax.Array]) -> jax.Array:
    """Adds up terms with the rows of `reaching(g, ...)`, by kernel position, to the image [b, h, w, c]."""
    phases = {}
    for (u, v), term in terms.items():
        where = (u * g.dilation[0] % g.strides[0], v * g.dilation[1] % g.strides[1])
        phases[where] = phases[where] + term if where in phases else term
    x = _interleaved(phases, g.strides)
    return _pad(x, *((-p[0], n) for p, n in zip(g.pads, g.size, strict=True)))


def _padded(g, y, fill=0.0):
    """y with the rows and columns before it, which are told, that `reaching` reaches back to.

    XLA keeps a padded array. What is not padded it computes anew, on a CPU, in every pass that reads it, and a gradient
    comes out of many operations; so the gradient for the kernel reads this array too.
    """
    before = [(e - 1) // s for e, s in zip(g.extent, g.strides, strict=True)]
    axes = zip(g.size, g.pads, g.strides, before, strict=True)
    ends = [(e, -(-(n + sum(p)) // s) + e) for n, p, s, e in axes]
    return before, lax.optimization_barrier(_pad(y, *ends, fill=fill))


def _interleaved(phases: dict[Pair, jax.Array], strides: Pair) -> jax.Array:
    """Puts [b, t, t', c] of each phase (m, n) at every s-th row from m on and column from n on."""
    if strides == (1, 1):
        return phases[0, 0]
    b, h, w, c = next(iter(phases.values())).shape
    zero = jnp.zeros_like(next(iter(phases.values())))
    rows = [
        jnp.stack([phases.get((m, n), zero) for n in range(strides[1])], 3)
        for m in range(strides[0])
    ]
    return jnp.stack(rows, 2).reshape(b, h * strides[0], w * strides[1], c)


def _pad(
    x: jax.Array, *ends: Pair, between: Pair = (1, 1), fill: float = 0.0
) -> jax.Array:
    """Gives each axis of positions (positions before it, positions in all); less than there are crops.

    Positions lie `between` apart, with zeros between them.
    """
    config = [(0, 0, 0)]
    for n, (before, total), apart in zip(x.shape[1:3], ends, between, strict=True):
        config.append((before, total - before - (n - 1) * apart - 1, apart - 1))
    fill = varying.like(jnp.array(fill, x.dtype), x)
    return lax.pad(x, fill, [*config, (0, 0, 0)])


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
