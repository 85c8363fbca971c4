"""Finds the image positions that each output of a convolution or pooling reads, and the outputs that read each position.

Each output reads a window of the padded image. With stride s and dilation d, row o of the output reads, through row u of the
kernel,

    row q = s o + d u    of the padded image.

The same holds for columns. A convolution can be computed as a sum over the kernel positions (u, v). For each kernel position
this file provides two kinds of arrays:

    input_slices     for each output row o, the image row q that it reads; used to compute the outputs
    output_slices    for each image row q, the output row o that reads it; used for the gradient with respect to the image

Kernel row u reads only every s-th row of the padded image: the rows q whose remainder modulo s equals that of d u. All rows
with the same remainder are called a phase. With a stride of 1 there is one phase, the whole padded image. `output_slices`
returns arrays with one row for each row of such a phase. `image_from_slices` adds up these arrays for all kernel positions,
phase by phase, and interleaves the phases to an image.

Shapes: images are [b, h, w, c], and h' and w' are the height and width of the output.
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
      pads: numbers of positions (before, after) that padding adds along each axis: zeros for a convolution, `fill` for other
        uses.
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
    """Returns a function from a kernel position to the values that all outputs read through it.

    With stride s and dilation d, at(u, v)[:, o, p] is the padded image at row s o + d u and column s p + d v.

    The padded image has t rows and t' columns in each phase. It is divided into its phases by a reshape to
    [b, t, s, t', s, c], and the function takes a slice of one phase. A strided slice of the image would take two to three
    times as long.

    Args:
      g: geometry of the convolution or pooling.
      x: images [b, h, w, c].
      fill: value of the padding.

    Returns:
      The function `at`: (u, v) → [b, h', w', c].
    """
    x = pad_image(g, x, fill)
    if g.strides == (1, 1):
        phases = {(0, 0): lax.optimization_barrier(x)}
    else:
        (rows, columns), (down, right) = _read_phase_size(g), g.strides
        x = lax.optimization_barrier(x)
        x = x.reshape(x.shape[0], rows, down, columns, right, x.shape[-1])
        phases = {
            (m, n): x[:, :, m, :, n]
            for m, n in itertools.product(range(down), range(right))
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


def _read_phase_size(g: Geometry) -> list[int]:
    """Returns how many rows and columns each phase has, if the padded image ends where the last window does."""
    axes = zip(g.out, g.extent, g.strides, strict=True)
    return [o + (e - 1) // s for o, e, s in axes]


def pad_image(g: Geometry, x: jax.Array, fill: float = 0.0) -> jax.Array:
    """Adds padding to images, so that they contain all windows and their height and width are multiples of the strides.

    Rows and columns that no window reaches may be cropped at the end.

    Args:
      g: geometry of the convolution or pooling; its `pads` tell the padding.
      x: images [b, h, w, c].
      fill: value of the padding.

    Returns:
      [b, s t, s t', c] for stride s and phases of t rows and t' columns.
    """
    sizes = [n * s for n, s in zip(_read_phase_size(g), g.strides, strict=True)]
    frames = ((p[0], n) for p, n in zip(g.pads, sizes, strict=True))
    return pad(x, *frames, fill=fill)


def output_slices(
    g: Geometry, y: jax.Array, fill: float = 0.0
) -> Callable[[int, int], jax.Array]:
    """Returns a function from a kernel position to the outputs that read each position of one phase through it.

    Kernel row u reads every s-th row of the padded image: the rows q = s t + (d u mod s), for t = 0, 1, .... Row t of at(u, v)
    is the output row o that reads row q. From q = s o + d u follows o = t - floor(d u / s). So at(u, v) is `y`, shifted down
    by floor(d u / s) rows, and to the right by floor(d v / s) columns. Positions without such an output have the value `fill`.

    `image_from_slices` puts arrays of this layout together to an image.

    Args:
      g: geometry of the convolution or pooling.
      y: one value per output, such as the gradient with respect to the outputs, [b, h', w', c].
      fill: value for image positions that no output reads through (u, v).

    Returns:
      The function `at`: (u, v) → [b, t, t', c], for t rows and t' columns of a phase. The phases here contain the whole padded
      image, also rows and columns at its end that no window reads.
    """
    before, y = pad_output(g, y, fill)
    rows, columns = (n - i for n, i in zip(y.shape[1:3], before, strict=True))

    def at(u, v):
        i, j = (
            e - k * d // s
            for e, k, d, s in zip(before, (u, v), g.dilation, g.strides, strict=True)
        )
        return y[:, i : i + rows, j : j + columns]

    return at


def image_from_slices(g: Geometry, terms: dict[Pair, jax.Array]) -> jax.Array:
    """Sums the terms of all kernel positions into an image [b, h, w, c], and crops the padding.

    Each term is added to the image positions that its kernel position reads.

    Args:
      g: geometry of the convolution or pooling.
      terms: {kernel position (u, v): [b, t, t', c]}, in the layout that `output_slices` returns for (u, v).
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
    """Adds rows and columns around an array with one value per output, so that it contains all slices of `output_slices`.

    Padding has a second purpose on a CPU: XLA keeps a padded array in memory. It would compute an array without padding
    again in every pass that reads it, and a gradient with respect to outputs is the result of many operations. For this
    reason the gradient with respect to the kernel uses the padded array, too.

    Args:
      g: geometry of the convolution or pooling.
      y: one value per output, [b, h', w', c].
      fill: value of the padding.

    Returns:
      ([rows, columns] added at the beginning, the padded array [b, t + rows, t' + columns, c]), for t and t' as in
      `output_slices`.
    """
    before = [(e - 1) // s for e, s in zip(g.extent, g.strides, strict=True)]
    axes = zip(g.size, g.pads, g.strides, before, strict=True)
    frames = [(front, -(-(n + sum(p)) // s) + front) for n, p, s, front in axes]
    return before, lax.optimization_barrier(pad(y, *frames, fill=fill))


def _interleave(phases: dict[Pair, jax.Array], strides: Pair) -> jax.Array:
    """Returns the image in which phase (m, n) [b, t, t', c] has the rows m, m + s, ... and the columns n, n + s, ....

    Phases that are missing in the dict are zero.
    """
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
