"""The windows of a convolution or a pooling: which image positions each output reads, and the way back.

A convolution puts a window on the image for each output. Along one axis, with stride s, dilation d and `before` zeros of
padding in front, output o reads through kernel position u the position

    q = s o + d u        of the padded image.

The lowerings of `nn/lowerings.py` compute a convolution as a loop over kernel positions (u, v). They need two kinds of arrays:

    forward     `input_slices`: for all outputs o, the padded image at q. The image is shifted by d u and has every s-th row.
    backward    `output_slices`: for all image positions q, the output o that reads q through u, if there is one.

Going backward, kernel position u only reaches the rows q whose remainder modulo s is d u modulo s. The rows with one remainder
are called a phase: there are s phases along an axis, and a stride of 1 has a single phase. `output_slices` has one row for
each row of the phase that (u, v) reaches. `image_from_slices` adds up the contributions to each phase and interleaves the
phases to an image.

Images are [b, h, w, c]; h' and w' are the sizes of the output.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """The sizes and options of a convolution or pooling of images; each pair is (vertical, horizontal).

    Attributes:
      size: height and width of the image.
      channels: number of channels of the image.
      kernel: height and width of the kernel.
      features: number of channels of the output.
      strides: distance between the windows of neighbouring outputs.
      pads: zeros (before, after) that are added along each axis.
      dilation: distance between neighbouring kernel positions.
      groups: number of groups into which channels and features are divided.
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
        """Height and width of the output."""
        axes = zip(self.size, self.pads, self.extent, self.strides, strict=True)
        return tuple((n + sum(p) - e) // s + 1 for n, p, e, s in axes)

    @property
    def extent(self) -> Pair:
        """Height and width of a window on the image, from its first to its last position: d (k - 1) + 1."""
        axes = zip(self.kernel, self.dilation, strict=True)
        return tuple(d * (k - 1) + 1 for k, d in axes)

    @property
    def depthwise(self) -> bool:
        """Whether each group has a single channel of the image."""
        return self.groups == self.channels

    @property
    def row(self) -> bool:
        """Whether this is a convolution of sequences: image and kernel have one row, with no padding above and below."""
        rows = self.size[0], self.kernel[0], self.pads[0]
        return rows == (1, 1, (0, 0))

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kernel array, [kh, kw, c / groups, features]."""
        return (*self.kernel, self.channels // self.groups, self.features)

    def one_group(self) -> "Geometry":
        """Returns the geometry of the ungrouped convolution that each group computes."""
        return self._replace(
            channels=self.channels // self.groups,
            features=self.features // self.groups,
            groups=1,
        )


def kernel_positions(g: Geometry) -> list[Pair]:
    """Returns all positions (row, column) of the kernel, row by row."""
    return list(itertools.product(*map(range, g.kernel)))


def input_slices(
    g: Geometry, x: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns a function `at(u, v)` that returns what each output reads through kernel position (u, v), [b, h', w', c].

    at(u, v)[:, o, p] is the padded image at row s o + d u and column s p + d v, for strides s and dilations d.

    The image is divided into its phases first: reshaped to [b, h/s, s, w/s, s, c], it gives each phase as a plain slice,
    and a strided slice takes two to three times as long.

    Args:
      g: the convolution or pooling.
      x: image [b, h, w, c].
      fill: value of the padding.
    """
    step_counts = _step_counts(g)
    x = pad_image(g, x, fill)
    if g.strides == (1, 1):
        phases = {(0, 0): lax.optimization_barrier(x)}
    else:
        (h, w), (s, t) = step_counts, g.strides
        x = lax.optimization_barrier(x).reshape(x.shape[0], h, s, w, t, x.shape[-1])
        phases = {
            (m, n): x[:, :, m, :, n] for m, n in itertools.product(range(s), range(t))
        }
        # Without the barriers XLA pads the image and slices the phases again for every kernel position.
        phases = lax.optimization_barrier(phases)

    def at(u, v):
        (i, m), (j, n) = (
            divmod(k * d, s)
            for k, d, s in zip((u, v), g.dilation, g.strides, strict=True)
        )
        return phases[m, n][:, i : i + g.out[0], j : j + g.out[1]]

    return at


def _step_counts(g):
    """Returns how many steps of the stride all windows together span, for each axis."""
    axes = zip(g.out, g.extent, g.strides, strict=True)
    return [o + (e - 1) // s for o, e, s in axes]


def pad_image(g: Geometry, x: jax.Array, fill: float = 0.0) -> jax.Array:
    """Adds the padding of `g` to an image [b, h, w, c], and extends or crops its end to a whole number of strides.

    The result covers all windows. Positions behind the last window are cropped.
    """
    sizes = [n * s for n, s in zip(_step_counts(g), g.strides, strict=True)]
    frames = ((p[0], n) for p, n in zip(g.pads, sizes, strict=True))
    return pad(x, *frames, fill=fill)


def output_slices(
    g: Geometry, y: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns a function `at(u, v)` that returns, for image positions, the output that reads them through (u, v).

    Kernel row u reaches every s-th row of the padded image: the rows q = s t + (d u modulo s), for t = 0, 1, .... Row t of
    at(u, v) is the row o of `y` with q = s o + d u, which is o = t - (d u div s). Where `y` has no such row, it is `fill`.
    So at(u, v) is `y` shifted by (d u) div s; columns are shifted likewise. `image_from_slices` takes arrays of this layout.

    Args:
      g: the convolution or pooling.
      y: array with the positions of the output, [b, h', w', c].
      fill: value where no output reads the image position.

    Returns:
      (u, v) → [b, t, t', c], where t and t' count the steps of the strides along the padded image.
    """
    before, y = pad_output(g, y, fill)
    step_counts = [n - i for n, i in zip(y.shape[1:3], before, strict=True)]

    def at(u, v):
        i, j = (
            e - k * d // s
            for e, k, d, s in zip(before, (u, v), g.dilation, g.strides, strict=True)
        )
        return y[:, i : i + step_counts[0], j : j + step_counts[1]]

    return at


def image_from_slices(g: Geometry, terms: dict[Pair, jax.Array]) -> jax.Array:
    """Returns the image [b, h, w, c] that is the sum of the terms, each placed at the positions its kernel position reaches.

    Args:
      g: the convolution or pooling.
      terms: {kernel position (u, v): [b, t, t', c]} in the layout of `output_slices(g, ...)`.
    """
    phases = {}
    for (u, v), term in terms.items():
        phase = (u * g.dilation[0] % g.strides[0], v * g.dilation[1] % g.strides[1])
        phases[phase] = phases[phase] + term if phase in phases else term
    x = _interleave(phases, g.strides)
    return pad(x, *((-p[0], n) for p, n in zip(g.pads, g.size, strict=True)))


def pad_output(
    g: Geometry, y: jax.Array, fill: float = 0.0
) -> tuple[list[int], jax.Array]:
    """Pads an array with the positions of the output, so that the slices of `output_slices` lie inside it.

    XLA keeps a padded array in memory. On a CPU, it computes an array that is not padded again in every pass that reads it,
    and an output's gradient is the result of many operations. So the gradient for the kernel reads the padded array, too.

    Args:
      g: the convolution or pooling.
      y: [b, h', w', c].
      fill: value of the padding.

    Returns:
      The number of rows and the number of columns that were added before the first, and the padded array.
    """
    before = [(e - 1) // s for e, s in zip(g.extent, g.strides, strict=True)]
    axes = zip(g.size, g.pads, g.strides, before, strict=True)
    frames = [(front, -(-(n + sum(p)) // s) + front) for n, p, s, front in axes]
    return before, lax.optimization_barrier(pad(y, *frames, fill=fill))


def _interleave(phases: dict[Pair, jax.Array], strides: Pair) -> jax.Array:
    """Returns the image whose rows m, m + s, ... and columns n, n + s, ... are phase (m, n), [b, t, t', c]; others are 0."""
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
    x: jax.Array, *frames: Pair, spacing: Pair = (1, 1), fill: float = 0.0
) -> jax.Array:
    """Places an image within a larger frame, or crops it to a smaller one.

    Args:
      x: image [b, h, w, c].
      *frames: (before, total) for the rows and for the columns: the number of positions in front of the image, negative
        to crop there, and the size of the result.
      spacing: distance between neighbouring positions of x in the result.
      fill: value of all other positions, also of those between the positions of x.

    Returns:
      [b, total rows, total columns, c].
    """
    config = [(0, 0, 0)]
    for n, (before, total), step in zip(x.shape[1:3], frames, spacing, strict=True):
        config.append((before, total - before - (n - 1) * step - 1, step - 1))
    fill = varying.like(jnp.array(fill, x.dtype), x)
    return lax.pad(x, fill, [*config, (0, 0, 0)])
