"""Convolutions of sequences [b, l, c], images [b, h, w, c] and volumes [b, d, h, w, c], fast on each platform.

A "lowering" is one way to compute a convolution with operations of XLA; `nn/lowerings.py` lists them. All lowerings return
the same numbers up to rounding, and have derivatives of every order (`nn/bilinear.py`). The lowering "native" is XLA's own
convolution. It is the right choice on accelerators and in exported files. On a CPU, XLA is many times slower than the other
lowerings for grouped and depthwise convolutions, for small images with large kernels, and above all for gradients.

`lowering="auto"` uses "native" on accelerators, and on a CPU the fastest lowering for the convolution's shape. The platform
that counts is the one a function is compiled for. So `jax.export` for a TPU writes XLA's convolutions, even on a machine
without a TPU. `with lowering("native"):` sets the lowering of all convolutions traced inside the context; exports and cost
counts do this themselves.
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
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.reshaped import features
from squeeze_jax.nn.windows import Geometry

Lowering = Literal[
    "auto", "native", "row", "taps", "matmul", "patches", "direct", "split", "flat"
]
PerAxis = int | tuple[int, ...]  # one number for all axes, or one number per axis
GroupArrays = tuple[jax.Array, ...]  # the channel groups of a sequence, in order
Padding = str | int | tuple[int, ...] | Sequence[tuple[int, int]]

LOWERINGS = typing.get_args(Lowering)
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")

# User contexts are part of jit's cache key. So a jitted function that was traced outside a `lowering` block is traced again
# when it is called inside one.
_forced_lowering = jax.make_user_context(None)
_groups_separated = jax.make_user_context(None)
MOST_SEPARATE_GROUPS = 16  # layers with more groups stay one grouped convolution
# Batches with fewer positions than this (sequences * length) are faster as one grouped convolution on a CPU.
FEWEST_SEPARATE_POSITIONS = 512


@contextmanager
def lowering(name: Lowering) -> Iterator[None]:
    """Sets the lowering of all convolutions traced inside this context, whatever their own `lowering` argument.

    With "native", pooling and normalisation use XLA's own operations, too. Exports and cost counts use `lowering("native")`.

    Raises:
      UserError: The lowering is unknown. Inside the context, `conv` raises if a convolution does not have this lowering.
    """
    with _forced_lowering(_check_lowering(name)):
        yield


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    dilation: PerAxis = 1,
    input_dilation: PerAxis = 1,
    lowering: Lowering = "auto",
    precision: Any = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns the convolution (cross-correlation, as in PyTorch and Flax) of sequences, images or volumes with a kernel.

    With stride s, dilation d and p zeros of padding in front, each group of channels computes, for images,

        y[b, i, j, o] = bias[o] + sum over u, v, c of x[b, i*s + u*d - p, j*s + v*d - p, c] * kernel[u, v, c, o]

    Args:
      x: [b, h, w, c], [b, l, c] or [b, d, h, w, c].
      kernel: [kh, kw, c / groups, features] for images; for sequences and volumes it has as many spatial axes as x.
      strides: distance between the windows of neighbouring outputs; one number, or one per axis.
      padding: "SAME", "SAME_LOWER" and "VALID" as in XLA; "CIRCULAR", "REFLECT" and, for sequences, "CAUSAL" as in
        Flax; a number p, or one number per axis, for as many zeros on both sides, as in PyTorch; or a pair
        (before, after) per axis. Strings may have capital or small letters.
      groups: number of groups. Input and output channels are divided, in order, into this many separate convolutions.
      dilation: distance between neighbouring kernel positions; one number, or one per axis.
      input_dilation: distance between neighbouring positions of x, with zeros inserted between them; one number, or one
        per axis.
      lowering: how to compute the convolution; "auto" chooses the fastest way on the platform it is compiled for. Volumes,
        an `input_dilation` other than 1 and a `precision` have only the lowering "native"; "auto" uses it for them on
        each platform.
      precision: see `jax.lax.Precision`; None for the default.
      bias: [features], cast to the dtype of the convolution; None for no bias.

    Returns:
      [b, h', w', features], or with the spatial axes of x, in the dtype to which x and kernel promote.

    Raises:
      UserError: The shapes do not fit; an argument does not have one number per axis; the padding is no such form, see
        `explicit_padding`; the padded input is smaller than a window; or this convolution does not have the chosen lowering.
    """
    check_shapes(x.shape, kernel.shape, groups)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), varying.like(kernel.astype(dtype), x)
    axes = x.ndim - 2
    chosen_lowering = _check_lowering(_forced_lowering.value or lowering)
    if isinstance(padding, str):  # XLA takes any case, and Flax hands it on
        padding = padding.upper()
    if padding in ("CIRCULAR", "REFLECT"):
        dilations = per_axis(dilation, axes)
        x = _pad_with_values(x, kernel.shape[:axes], dilations, padding)
        padding = "VALID"
    arguments = dict(strides=strides, padding=padding, dilation=dilation)
    if (
        axes == 3
        or precision is not None
        or per_axis(input_dilation, axes) != (1,) * axes
    ):
        kind = "of volumes" if axes == 3 else "with a precision or an input dilation"
        if chosen_lowering not in ("auto", "native"):
            raise UserError(
                f"lowering {chosen_lowering!r}: a convolution {kind} can only be computed by the lowering 'native'"
            )
        y = _native_conv(x, kernel, groups, input_dilation, precision, **arguments)
    else:
        g = geometry(x.shape, kernel.shape, groups=groups, **arguments)
        sequences = axes == 1
        if sequences:
            x, kernel = x[:, None], kernel[None]
        y = _conv_with_lowering(x, kernel, g, chosen_lowering)
        # Runtimes fuse a bias only if it follows the convolution directly, so it is added before the axis is removed.
        if bias is not None:
            y, bias = y + bias.astype(y.dtype), None
        y = y[:, 0] if sequences else y
    return y if bias is None else y + bias.astype(y.dtype)


def _native_conv(
    x, kernel, groups, input_dilation, precision, *, strides, padding, dilation
):
    """Calls XLA's convolution for the arguments that the other lowerings do not support; see `conv`."""
    axes = x.ndim - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    input_dilation = per_axis(input_dilation, axes)
    sizes = zip(x.shape[1:-1], input_dilation, strict=True)
    size = [(n - 1) * d + 1 for n, d in sizes]
    spatial = "DHW"[-axes:] if axes > 1 else "H"
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        explicit_padding(padding, size, kernel.shape[:axes], strides, dilation),
        lhs_dilation=input_dilation,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _pad_with_values(x, kernel, dilation, padding):
    """Pads x with its own values, for "CIRCULAR" and "REFLECT"; the widths are those of "SAME" with strides of 1."""
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = [(0, 0), *(((e - 1) // 2, e // 2) for e in extents), (0, 0)]
    return jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "reflect")


@contextmanager
def separate_groups() -> Iterator[None]:
    """Splits each grouped 1x1 `Conv` of sequences traced inside this context into one ungrouped convolution per group.

    This concerns layers on inputs [b, l, c] with kernel 1, stride 1, no precision, no input dilation, 2 to
    MOST_SEPARATE_GROUPS groups, and a padding that is a string or zero. Neither their own `lowering` nor an enclosing
    `lowering` context prevents the split. The function `conv` is not affected.

    Runtimes have their fastest matrix product for one group. If two consecutive layers have the same number of groups, the
    code that calls them can keep the groups as separate arrays between the layers, with `join_groups=False` of `Conv`.

    Float files for LiteRT are exported in this context; integer files keep LiteRT's grouped convolution.

    Outside the context such a layer separates its groups only if JAX's default backend is the CPU, whatever platform the
    function is compiled for. Its batch must have at least FEWEST_SEPARATE_POSITIONS positions (sequences times length), or a
    symbolic size. And neither the layer nor a context may set a lowering.
    """
    with _groups_separated(True):
        yield


def conv_each_group(
    x: jax.Array | GroupArrays, kernel: jax.Array, bias: jax.Array | None, groups: int
) -> GroupArrays:
    """Computes a grouped 1x1 convolution of sequences as one convolution per group.

    Args:
      x: [b, l, c], or a tuple of its groups, each [b, l, c / groups].
      kernel: [1, c / groups, features].
      bias: [features], or None for no bias.
      groups: number of groups.

    Returns:
      A tuple of the output's groups, each [b, l, features / groups].

    Raises:
      UserError: x is a tuple of another number of arrays than `groups`.
    """
    inputs = x if isinstance(x, tuple) else jnp.split(x, groups, -1)
    if len(inputs) != groups:
        raise UserError(
            f"the input is a tuple of {len(inputs)} arrays, the convolution has groups={groups}: give one array a group, or"
            " join them to one array"
        )
    # NumPy weights are split by NumPy: converters of exported programs take minutes to do it.
    split = np.split if isinstance(kernel, np.ndarray) else jnp.split
    kernels = split(kernel, groups, -1)
    biases = [None] * groups if bias is None else split(bias, groups)
    by_group = zip(inputs, kernels, biases, strict=True)
    return tuple(conv(array, k, bias=b) for array, k, b in by_group)


def geometry(
    x: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    dilation: PerAxis = 1,
) -> Geometry:
    """Returns the `Geometry` of a convolution of sequences or images, which describes it to `nn/lowerings.py`.

    A sequence becomes an image of one row.

    Args:
      x: shape of the input, [b, l, c] or [b, h, w, c].
      kernel: shape of the kernel, [k, c / groups, features] or [kh, kw, c / groups, features].
      strides, groups, dilation: see `conv`.
      padding: see `explicit_padding`, which does not take all forms of `conv`.

    Raises:
      UserError: The shapes do not fit, or an argument does not have one number per axis; or see `explicit_padding`.
    """
    check_shapes(x, kernel, groups)
    axes = len(x) - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    size, kernel_size = tuple(x[1:-1]), tuple(kernel[:-2])
    pads = explicit_padding(padding, size, kernel_size, strides, dilation)
    per_axis_values = [size, kernel_size, strides, pads, dilation]
    if axes == 1:
        one_row = (1, 1, 1, (0, 0), 1)
        per_axis_values = [
            (row, *value) for row, value in zip(one_row, per_axis_values, strict=True)
        ]
    size, kernel_size, strides, pads, dilation = per_axis_values
    return Geometry(
        size=size,
        channels=x[-1],
        kernel=kernel_size,
        features=kernel[-1],
        strides=strides,
        pads=pads,
        dilation=dilation,
        groups=groups,
    )


def _conv_with_lowering(x, kernel, geometry: Geometry, lowering: str) -> jax.Array:
    possible = ["auto", *lowerings.possible(geometry)]
    if lowering not in possible:
        raise UserError(
            f"lowering {lowering!r} cannot do a convolution with kernel {kernel.shape} and groups {geometry.groups}"
            f"{nearest(lowering, possible)}"
        )
    if lowering == "native":
        return lowerings.native(geometry, x, kernel)
    return bilinear.conv(x, kernel, geometry, lowering)


class Conv(nn.Module):
    """A convolution layer that takes the place of `flax.linen.Conv`: change the import, and a Flax model uses it.

    With the arguments of `flax.linen.Conv` it has the same parameters, initial values and dtypes, and up to rounding the same
    outputs and gradients. The parameters are kernel [kh, kw, c / groups, features] and bias [features]. These are the
    differences:

    - `lowering` and `fixed` are new attributes, and `join_groups` is a new argument of the call. Inputs may be a tuple.
    - `promote_dtype`, `conv_general_dilated` and `conv_general_dilated_cls` do not exist.
    - Three calls that Flax allows raise a UserError: an integer `kernel_size` for images, a `kernel_size` of more than three
      numbers, and a padded input that is smaller than a window of the kernel.
    - Inputs, kernel and outputs pass through taps, where other code can replace them; see `nn/intercept.py`.

    Attributes:
      features: number of output channels.
      kernel_size: kernel size along each spatial axis: (3, 3) for images, (3,) or 3 for sequences.
      strides, padding, input_dilation, precision: see `conv`.
      kernel_dilation: the argument `dilation` of `conv`.
      feature_group_count: the argument `groups` of `conv`.
      use_bias: whether the layer adds a bias.
      mask: array of the kernel's shape that multiplies the kernel, such as 0 for pruned weights; None for no mask.
      dtype: dtype of the computation; None for the dtype to which input and parameters promote.
      param_dtype: dtype of the parameters.
      kernel_init, bias_init: initializers of the parameters.
      lowering: how to compute the convolution, see `conv`.
      fixed: if True, an enclosing `Reshaped` that changes `features` raises an error; see `nn/reshaped.py`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerAxis | None = 1
    padding: Padding = "SAME"
    input_dilation: PerAxis | None = 1
    kernel_dilation: PerAxis | None = 1
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
    def __call__(self, inputs: jax.Array | GroupArrays, *, join_groups: bool = True):
        """Applies the layer: [b, h, w, c] → [b, h', w', features], or [b, l, c] → [b, l', features].

        The last axis of the input holds channels, and `kernel_size` tells how many axes before it are spatial. All axes
        before those are batch axes; there may be none or several.

        Args:
          inputs: an array, or a tuple of its channel groups as a layer with `join_groups=False` returns it. If this layer
            computes its groups separately, the tuple must have `feature_group_count` arrays.
          join_groups: whether the output is always one array. With False, the output is a tuple of its groups if the
            layer computes its groups separately; see `separate_groups`.

        Raises:
          UserError: The input has fewer axes than the kernel needs; `kernel_size` is an integer and the input has more than
            three axes, or it has more than three numbers; the groups do not divide the channels or the features; a tuple
            has another number of arrays than this layer has separate groups; `mask` does not have the shape of the kernel;
            or `conv` raises it.
        """
        arrays = inputs if isinstance(inputs, tuple) else (inputs,)
        first, groups = arrays[0], self.feature_group_count
        channels = sum(a.shape[-1] for a in arrays)
        outputs = features(self, self.features, fixed=self.fixed)
        self._check_groups(channels, outputs)
        kernel_size = self._checked_kernel_size(first.shape)
        shape = (*kernel_size, channels // groups, outputs)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            kernel = kernel * self._checked_mask(shape)
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, (outputs,), self.param_dtype)
        *arrays, kernel, bias = promote_dtype(*arrays, kernel, bias, dtype=self.dtype)
        kernel = tap(self, "kernel", kernel)
        x = tap(self, "inputs", tuple(arrays) if len(arrays) > 1 else arrays[0])
        strides = 1 if self.strides is None else self.strides
        separable = 1 < groups <= MOST_SEPARATE_GROUPS and first.ndim == 3
        if separable and self._is_dense(kernel_size) and self._separates_groups(first):
            y = conv_each_group(x, kernel, bias, groups)
            return tap(self, "outputs", jnp.concatenate(y, -1) if join_groups else y)
        if isinstance(x, tuple):
            x = jnp.concatenate(x, -1)
        batch_shape = x.shape[: x.ndim - len(kernel_size) - 1]
        if len(batch_shape) != 1:
            x = x.reshape(-1, *x.shape[len(batch_shape) :])
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
        if len(batch_shape) != 1:
            y = y.reshape(*batch_shape, *y.shape[1:])
        return tap(self, "outputs", y)

    def _is_dense(self, kernel_size: tuple[int, ...]) -> bool:
        """Returns whether the layer is a dense layer of each position: kernel 1, stride 1, no zeros, dilation or precision."""
        ones = (None, 1, (1,), [1])
        no_padding = isinstance(self.padding, str) or not np.any(self.padding)
        return (
            kernel_size == (1,)
            and self.strides in ones
            and self.input_dilation in ones
            and self.precision is None
            and no_padding
        )

    def _checked_kernel_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        size = self.kernel_size
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if isinstance(size, int) and len(shape) > 3:
            raise UserError(
                f"{self._name()}: kernel_size={size} has one axis of positions, and the input {tuple(shape)} has more: give"
                f" {(size,) * (len(shape) - 2)}, or ({size},) to convolve the last axis of positions alone"
            )
        if len(shape) < len(sizes) + 1:
            raise UserError(
                f"{self._name()}: kernel_size={sizes} needs inputs of {len(sizes)} axes of positions and one of channels,"
                f" not {tuple(shape)}"
            )
        if len(sizes) not in (1, 2, 3):
            raise UserError(
                f"{self._name()}: kernel_size={sizes} has {len(sizes)} axes: give one to three"
            )
        return sizes

    def _checked_mask(self, shape):
        if self.mask.shape != shape:
            raise UserError(
                f"{self._name()}: the mask is {self.mask.shape}, the kernel {shape}: give both the same shape"
            )
        return self.mask

    def _name(self) -> str:
        return "/".join(self.path) or "Conv"

    def _check_groups(self, channels: int, outputs: int) -> None:
        name, groups = self._name(), self.feature_group_count
        for what, number in ("feature_group_count", groups), ("features", outputs):
            if number < 1:
                raise UserError(f"{name}: {what}={number} should be at least 1")
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

    def _separates_groups(self, x) -> bool:
        """Returns whether the groups of this layer are computed separately for an input x; see `separate_groups`."""
        if _groups_separated.value is not None:
            return _groups_separated.value
        forced = _forced_lowering.value is not None or self.lowering != "auto"
        if forced or jax.default_backend() != "cpu":
            return False
        positions = x.shape[0] * x.shape[1]
        is_symbolic = not isinstance(positions, int)
        return is_symbolic or positions >= FEWEST_SEPARATE_POSITIONS


def explicit_padding(
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Converts the padding of a convolution or pooling to numbers: one pair (before, after) for each spatial axis.

    Args:
      padding: a form that `conv` accepts, strings in capital letters; not "CIRCULAR" and "REFLECT": for these `conv` pads
        before it calls this function.
      size: input positions along each spatial axis.
      kernel: kernel positions along each spatial axis.
      strides: stride of each spatial axis.
      dilation: dilation of each spatial axis; None for 1.

    Raises:
      UserError: The padding is an unknown string, "CIRCULAR" or "REFLECT", or it is "CAUSAL" and there are several spatial
        axes; it does not have one number or pair per axis; or the padded input is smaller than a window, so that there
        would be no output.
    """
    dilation = dilation or (1,) * len(kernel)
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    pads = _padding_pairs(padding, size, extent, strides)
    if any(n + sum(p) < e for n, p, e in zip(size, pads, extent, strict=True)):
        raise UserError(
            f"an image of {tuple(size)} positions, padded by {pads}, is smaller than a window of {extent}: "
            "use larger images or fewer strides"
        )
    return pads


def _padding_pairs(padding, size, extent, strides):
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
    pads = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    if len(pads) != len(extent) or any(len(p) != 2 for p in pads):
        raise UserError(
            f"padding {padding} does not fit {len(extent)} axes of positions: give one number, or one number or pair (before,"
            " after) for each axis"
        )
    return pads


def native_is_forced() -> bool:
    """Returns True inside `lowering("native")`, as in exports; pooling and normalisation then use XLA's own operations too."""
    return _forced_lowering.value == "native"


def _check_lowering(name: str) -> str:
    """Returns the name if there is such a lowering; otherwise raises a UserError."""
    if name not in LOWERINGS:
        raise UserError(f"unknown lowering {name!r}{nearest(name, LOWERINGS)}")
    return name


def per_axis(value: PerAxis, axes: int = 2) -> tuple[int, ...]:
    """Returns one number per spatial axis: repeats a single number, and keeps a tuple of `axes` numbers.

    Raises:
      UserError: A tuple does not have `axes` numbers, or a number is below 1.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise UserError(
            f"{value} has {len(values)} numbers for {axes} axes of positions: give one number, or one for each axis"
        )
    if min(values) < 1:
        raise UserError(f"strides or dilation {value} should be at least 1")
    return values


def check_shapes(x: Sequence[int], kernel: Sequence[int], groups: int) -> None:
    """Raises a UserError unless a kernel fits an input, in their numbers of axes and of channels.

    Args:
      x: shape of the input, [b, l, c], [b, h, w, c] or [b, d, h, w, c].
      kernel: shape of the kernel, [k, c / groups, features] for sequences, with more spatial axes for images and volumes.
      groups: number of groups; divides c and features.

    Raises:
      UserError: The numbers of axes differ, or the channels do not fit.
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
