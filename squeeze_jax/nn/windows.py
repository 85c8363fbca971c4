"""The windows of a convolution or a pooling: what each kernel position sees of an image, and the way back."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying

Pair = tuple[int, int]


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
    def row(self) -> bool:
        """Whether it is a convolution of sequences: there is one row of positions, without padding above and below."""
        rows = self.size[0], self.kernel[0], self.pads[0]
        return rows == (1, 1, (0, 0))

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


def positions(g: Geometry) -> list[Pair]:
    """The kernel's (u, v), in order."""
    return list(itertools.product(*map(range, g.kernel)))


def shifted(
    g: Geometry, x: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns `at(u, v)`: what the kernel's position (u, v) sees of the image padded with `fill`, [b, h', w', c].

    A strided slice costs two to three times a plain one. Reshaped to [b, h/s, s, w/s, s, c], each phase is plain.
    """
    counts = _counts(g)
    x = framed(g, x, fill)
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


def framed(g, x, fill=0.0):
    """The image padded, or cropped, to whole steps of the strides."""
    sizes = [n * s for n, s in zip(_counts(g), g.strides, strict=True)]
    ends = ((p[0], n) for p, n in zip(g.pads, sizes, strict=True))
    return pad(x, *ends, fill=fill)


def reaching(
    g: Geometry, y: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns `at(u, v)`: for the rows and columns of the image, in steps of the strides, what reaches them by (u, v).

    Row q of the padded image meets row o of the output through kernel row u where q = s o + d u. The rows with the same
    q modulo s share their kernel rows: `at` has one row for each t = q div s, a shifted part of the padded y.
    """
    before, y = padded(g, y, fill)
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
    return pad(x, *((-p[0], n) for p, n in zip(g.pads, g.size, strict=True)))


def padded(g, y, fill=0.0):
    """y with the rows and columns before it, which are told, that `reaching` reaches back to.

    XLA keeps a padded array. What is not padded it computes anew, on a CPU, in every pass that reads it, and a gradient
    comes out of many operations; so the gradient for the kernel reads this array too.
    """
    before = [(e - 1) // s for e, s in zip(g.extent, g.strides, strict=True)]
    axes = zip(g.size, g.pads, g.strides, before, strict=True)
    ends = [(e, -(-(n + sum(p)) // s) + e) for n, p, s, e in axes]
    return before, lax.optimization_barrier(pad(y, *ends, fill=fill))


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


def pad(
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
