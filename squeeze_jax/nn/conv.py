"""Convolutions of sequences [b, l, c], images [b, h, w, c] and volumes [b, d, h, w, c], with the arithmetic of each platform.

XLA's convolution is the right one on accelerators and in exported files. On a CPU its grouped and depthwise forms,
small images under large kernels, and above all the gradients are many times slower than the same sums written with other
operations. `lowerings` has those; all give the same numbers and have derivatives of every order (`bilinear`).

`lowering="auto"` is XLA's convolution, but on a CPU the fastest lowering for the shape. The platform is the one that a
function is compiled for, so `jax.export` for a TPU on a machine without one holds XLA's convolutions. `with
lowering("native"):` decides for everything traced inside; exports and cost counts do so themselves.
"""

import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn import bilinear, lowerings, varying
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.reshaped import features
from squeeze_jax.nn.windows import Geometry

Lowering = Literal[
    "auto", "native", "row", "taps", "matmul", "patches", "direct", "split", "flat"
]
Pair = int | tuple[int, ...]
Groups = tuple[jax.Array, ...]  # of one sequence's channels, in order
Padding = str | int | tuple[int, ...] | Sequence[tuple[int, int]]

LOWERINGS = typing.get_args(Lowering)
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")

# A user context is part of jit's cache key, so that a function traced outside a `lowering` block is traced again in it.
_forced = jax.make_user_context(None)
_apart = jax.make_user_context(None)
MOST_APART = 16  # groups that are still a convolution each
FEWEST_APART = 512  # positions, of all sequences: few are quicker in one operation


@contextmanager
def lowering(name: Lowering) -> Iterator[None]:
    """Forces one lowering for all convolutions traced inside; exports and cost counts use `lowering("native")`.

    Raises:
      UserError: unknown lowering.
    """
    with _forced(_known(name)):
        yield


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Pair = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    dilation: Pair = 1,
    input_dilation: Pair = 1,
    lowering: Lowering = "auto",
    precision: Any = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Cross-correlation of sequences, images or volumes with kernels.

    y[b, i, j, o] = bias[o] + sum over u, v, c of x[b, i*s + u*d - p, j*s + v*d - p, c] * kernel[u, v, c, o]

    Args:
      x: [b, h, w, c], or [b, l, c], or [b, d, h, w, c].
      kernel: [kh, kw, c / groups, features], or with as many axes of positions as x has. Both are computed in the dtype
        that they promote to.
      strides: positions from one output to the next; one number or one for each axis.
      padding: "SAME", "SAME_LOWER" and "VALID" as in XLA; "CIRCULAR", "REFLECT" and, for sequences, "CAUSAL" as in
        Flax; p or (p, p') zeros on both sides of an axis, as in PyTorch; or a pair (before, after) for each axis.
      groups: input and output channels fall into this many separate convolutions, in order.
      dilation: positions from one tap of the kernel to the next.
      input_dilation: positions from one of x to the next, with zeros between them.
      lowering: how to compute it; "auto" is the fastest way on the platform that this is compiled for.
      precision: of XLA's convolution, see `jax.lax.Precision`; anything but None takes the lowering "native".
      bias: [features], or None for none.

    Returns:
      [b, h', w', features] or as x.

    Raises:
      UserError: shapes that do not fit, unknown padding, or a lowering that this convolution does not have.
    """
    check_shapes(x.shape, kernel.shape, groups)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), varying.like(kernel.astype(dtype), x)
    axes, wanted = x.ndim - 2, _known(_forced.value or lowering)
    if padding in ("CIRCULAR", "REFLECT"):
        spread = per_axis(dilation, axes)
        x, padding = _extended(x, kernel.shape[:axes], spread, padding), "VALID"
    arguments = dict(strides=strides, padding=padding, dilation=dilation)
    if (
        axes == 3
        or precision is not None
        or per_axis(input_dilation, axes) != (1,) * axes
    ):
        only = "of volumes" if axes == 3 else "with a precision or an input dilation"
        if wanted not in ("auto", "native"):
            raise UserError(
                f"lowering {wanted!r}: a convolution {only} is native alone"
            )
        y = _general(x, kernel, groups, input_dilation, precision, **arguments)
    else:
        g = geometry(x.shape, kernel.shape, groups=groups, **arguments)
        sequences = axes == 1
        if sequences:
            x, kernel = x[:, None], kernel[None]
        y = _lowered(x, kernel, g, wanted)
        if bias is not None:  # before the axis goes: runtimes fuse what follows at once
            y, bias = y + bias.astype(y.dtype), None
        y = y[:, 0] if sequences else y
    return y if bias is None else y + bias.astype(y.dtype)


def _general(
    x, kernel, groups, input_dilation, precision, *, strides, padding, dilation
):
    axes = x.ndim - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    before = per_axis(input_dilation, axes)
    size = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], before, strict=True)]
    positions = "DHW"[-axes:] if axes > 1 else "H"
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        explicit_padding(padding, size, kernel.shape[:axes], strides, dilation),
        lhs_dilation=before,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{positions}C", f"{positions}IO", f"N{positions}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _extended(x, extent, dilation, padding):
    """Returns x with its own values around it: as many positions as "SAME" has zeros, whatever the strides."""
    spans = [(k - 1) * d + 1 for k, d in zip(extent, dilation, strict=True)]
    ends = [(0, 0), *(((n - 1) // 2, n // 2) for n in spans), (0, 0)]
    return jnp.pad(x, ends, mode="wrap" if padding == "CIRCULAR" else "reflect")


@contextmanager
def apart() -> Iterator[None]:
    """Makes one convolution for each group of the fully connected layers of sequences that `Conv`s are inside.

    A runtime has its quickest product for one group; the groups' channels stay apart from one layer to the next where
    both have the same. On a CPU it is so outside too for FEWEST_APART positions or more, unless a lowering is forced.
    Float files for LiteRT are made in it; integer ones have its grouped convolution.
    """
    with _apart(True):
        yield


def each_group(
    x: jax.Array | Groups, kernel: jax.Array, bias: jax.Array | None, groups: int
) -> Groups:
    """A grouped, fully connected layer, group by group.

    Args:
      x: [b, l, c], or its groups, [b, l, c / groups] each.
      kernel: [1, c / groups, features].
      bias: [features] or None.
      groups: how many.

    Returns:
      The groups of the result, [b, l, features / groups] each.
    """
    parts = x if isinstance(x, tuple) else jnp.split(x, groups, -1)
    # Weights on the host are cut there: converters take minutes to do it.
    cut = np.split if isinstance(kernel, np.ndarray) else jnp.split
    kernels = cut(kernel, groups, -1)
    biases = [None] * groups if bias is None else cut(bias, groups)
    each = zip(parts, kernels, biases, strict=True)
    return tuple(conv(part, k, bias=b) for part, k, b in each)


def geometry(
    x: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Pair = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    dilation: Pair = 1,
) -> Geometry:
    """What `lowerings` knows of a convolution: a sequence is an image of one row.

    Args:
      x, kernel: shapes, as of `conv`'s arrays; the others as in `conv`.

    Raises:
      UserError: shapes that do not fit, or unknown padding.
    """
    check_shapes(x, kernel, groups)
    axes = len(x) - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    size, extent = tuple(x[1:-1]), tuple(kernel[:-2])
    pads = explicit_padding(padding, size, extent, strides, dilation)
    along = [size, extent, strides, pads, dilation]
    if axes == 1:
        along = [(one, *v) for one, v in zip((1, 1, 1, (0, 0), 1), along, strict=True)]
    size, extent, strides, pads, dilation = along
    return Geometry(
        size=size,
        channels=x[-1],
        kernel=extent,
        features=kernel[-1],
        strides=strides,
        pads=pads,
        dilation=dilation,
        groups=groups,
    )


def _lowered(x, kernel, geometry: Geometry, wanted: str) -> jax.Array:
    possible = ["auto", *lowerings.possible(geometry)]
    if wanted not in possible:
        raise UserError(
            f"lowering {wanted!r} cannot do a convolution with kernel {kernel.shape} and groups {geometry.groups}"
            f"{nearest(wanted, possible)}"
        )
    if wanted == "native":
        return lowerings.native(geometry, x, kernel)
    return bilinear.conv(x, kernel, geometry, wanted)


class Conv(nn.Module):
    """A convolution with the arguments and the parameters of `flax.linen.Conv`: kernel [kh, kw, c / groups, features], bias.

    It replaces `flax.linen.Conv` by changing the import: outputs, gradients and dtypes are Flax's. Two calls that Flax
    allows are errors: an integer `kernel_size` on images, and images smaller than the kernel. Its inputs, its kernel and
    its outputs pass through taps; see `nn/intercept.py`.

    Attributes:
      features: output channels.
      kernel_size: positions of the kernel along each axis: (3, 3) for images, (3,) or 3 for sequences.
      strides, padding, input_dilation, kernel_dilation, precision: see `conv`, which calls the third dilation.
      feature_group_count: groups of channels, see `conv`.
      use_bias: whether there is a bias.
      mask: an array like the kernel that it is multiplied with, or None.
      dtype: of the computation; None for the type to which input and parameters promote.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers.
      lowering: how to compute it, see `conv`.
      fixed: whether it is an error to give it another width; see `nn/reshaped.py`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: Pair | None = 1
    padding: Padding = "SAME"
    input_dilation: Pair | None = 1
    kernel_dilation: Pair | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    lowering: Lowering = "auto"
    fixed: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array | Groups, *, whole: bool = True):
        """inputs: [b, h, w, c] → [b, h', w', features], or [b, l, c] → [b, l', features].

        The kernel's axes decide which axes are positions; those before them are of examples, as many as there are.
        Inside `apart` a layer with whole=False returns a tuple of its groups, and takes one of another layer's.

        Raises:
          UserError: fewer axes than the kernel needs, or an integer `kernel_size` for more than sequences.
        """
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        some, groups = parts[0], self.feature_group_count
        channels = sum(p.shape[-1] for p in parts)
        outputs = features(self, self.features, fixed=self.fixed)
        self._check_groups(channels, outputs)
        extent = self._extent(some.shape)
        shape = (*extent, channels // groups, outputs)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            kernel = kernel * self._fitting_mask(shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (outputs,), self.param_dtype)
        *parts, kernel, bias = promote_dtype(*parts, kernel, bias, dtype=self.dtype)
        kernel = tap(self, "kernel", kernel)
        x = tap(self, "inputs", tuple(parts) if len(parts) > 1 else parts[0])
        strides = 1 if self.strides is None else self.strides
        connected = extent == (1,) and per_axis(strides, 1) == (1,)
        if connected and 1 < groups <= MOST_APART and self._apart(some):
            parts = each_group(x, kernel, bias, groups)
            return tap(self, "outputs", jnp.concatenate(parts, -1) if whole else parts)
        examples = x.shape[: x.ndim - len(extent) - 1]
        if len(examples) != 1:
            x = x.reshape(-1, *x.shape[len(examples) :])
        y = conv(
            x,
            kernel,
            strides=strides,
            padding=self.padding,
            groups=groups,
            dilation=1 if self.kernel_dilation is None else self.kernel_dilation,
            input_dilation=1 if self.input_dilation is None else self.input_dilation,
            lowering=self.lowering,
            precision=self.precision,
            bias=bias,
        )
        if len(examples) != 1:
            y = y.reshape(*examples, *y.shape[1:])
        return tap(self, "outputs", y)

    def _extent(self, shape: Sequence[int]) -> tuple[int, ...]:
        size = self.kernel_size
        extent = (size,) if isinstance(size, int) else tuple(size)
        if isinstance(size, int) and len(shape) > 3:
            raise UserError(
                f"{self._name()}: kernel_size={size} has one axis of positions, and the input {tuple(shape)} has more: give"
                f" {(size,) * (len(shape) - 2)}, or ({size},) to convolve the last axis of positions alone"
            )
        if len(shape) < len(extent) + 1:
            raise UserError(
                f"{self._name()}: kernel_size={extent} needs inputs of {len(extent)} axes of positions and one of channels,"
                f" not {tuple(shape)}"
            )
        if len(extent) not in (1, 2, 3):
            raise UserError(
                f"{self._name()}: kernel_size={extent} has {len(extent)} axes: give one to three"
            )
        return extent

    def _fitting_mask(self, shape):
        if self.mask.shape != shape:
            raise UserError(
                f"{self._name()}: the mask is {self.mask.shape}, the kernel {shape}: give both the same shape"
            )
        return self.mask

    def _name(self) -> str:
        return "/".join(self.path) or "Conv"

    def _check_groups(self, channels: int, outputs: int) -> None:
        name, groups = self._name(), self.feature_group_count
        if channels % groups:
            raise UserError(
                f"{name}: {channels} channels do not divide into groups={groups}"
            )
        if outputs % groups:
            advice = "choose a multiple"
            if channels == groups:
                advice = "a depthwise convolution is as wide as the layer before it: change that one"
            raise UserError(
                f"{name}: {outputs} features do not divide into groups={groups}: {advice}"
            )

    def _apart(self, x) -> bool:
        if _apart.value is not None:
            return _apart.value
        forced = _forced.value is not None or self.lowering != "auto"
        if forced or jax.default_backend() != "cpu":
            return False
        positions = x.shape[0] * x.shape[1]
        unknown = not isinstance(positions, int)  # a symbolic batch
        return unknown or positions >= FEWEST_APART


def explicit_padding(
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Returns ((before, after), ...) of each axis for every way of saying padding.

    Raises:
      UserError: unknown padding, or a padded image smaller than the window.
    """
    dilation = dilation or (1,) * len(kernel)
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    pads = _pads(padding, size, extent, strides)
    if any(n + sum(p) < e for n, p, e in zip(size, pads, extent, strict=True)):
        raise UserError(
            f"an image of {tuple(size)} positions, padded by {pads}, is smaller than a window of {extent}: "
            "use larger images or fewer strides"
        )
    return pads


def _pads(padding, size, extent, strides):
    if padding == "CAUSAL" and len(extent) == 1:
        return ((extent[0] - 1, 0),)
    if isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            advice = nearest(padding.upper(), PADDINGS)
            if padding == "CAUSAL":
                advice = f": only sequences have an order, not {len(extent)} axes"
            elif padding in PADDINGS:
                advice = ": only convolutions have it"
            raise UserError(f"unknown padding {padding!r}{advice}")
        return tuple(map(tuple, lax.padtype_to_pads(size, extent, strides, padding)))
    if isinstance(padding, int):
        return ((padding, padding),) * len(extent)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def native_is_forced() -> bool:
    """Whether XLA's own operations are to be used on every platform, as where files are made."""
    return _forced.value == "native"


def _known(name: str) -> str:
    if name not in LOWERINGS:
        raise UserError(f"unknown lowering {name!r}{nearest(name, LOWERINGS)}")
    return name


def per_axis(value: Pair, axes: int = 2) -> tuple[int, ...]:
    """One number for all axes, or one for each, in the order of the axes of x.

    Raises:
      UserError: another count of numbers than axes.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise UserError(
            f"{value} has {len(values)} numbers for {axes} axes of positions: give one number, or one for each axis"
        )
    return values


def check_shapes(x: Sequence[int], kernel: Sequence[int], groups: int) -> None:
    """Checks that a kernel fits an input.

    Raises:
      UserError: another number of axes, or other channels.
    """
    if len(kernel) not in (3, 4, 5) or len(x) != len(kernel):
        raise UserError(
            "a convolution needs images [b, h, w, c] and a kernel [kh, kw, c / groups, features], or sequences [b, l, c]"
            f" and a kernel [k, c / groups, features], not {tuple(x)} and {tuple(kernel)}"
        )
    if x[-1] != kernel[-2] * groups or kernel[-1] % groups:
        raise UserError(
            f"a kernel {tuple(kernel)} with groups={groups} does not fit an input with {x[-1]} channels"
        )
