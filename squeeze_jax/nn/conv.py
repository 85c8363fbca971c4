"""Convolutions of images [b, h, w, c] and of sequences [b, l, c], with the arithmetic chosen per backend.

XLA's convolution is the right one for accelerators and for exported files. On a CPU its grouped and depthwise forms,
small images under large kernels, and above all the gradients are many times slower than the same sums written with other
operations. `lowerings` has those; all give the same numbers and have derivatives of every order (`bilinear`).

`lowering="auto"` picks by shape on a CPU and is native elsewhere. `with lowering("native"):` decides for everything
inside; exports and cost counts are made in it.
"""

import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn import bilinear, lowerings, varying
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.reshaped import features
from squeeze_jax.nn.windows import Geometry

Lowering = Literal[
    "auto", "native", "taps", "matmul", "patches", "direct", "split", "flat"
]
Pair = int | tuple[int, ...]
Groups = tuple[jax.Array, ...]  # of one sequence's channels, in order
Padding = str | int | tuple[int, ...] | Sequence[tuple[int, int]]

LOWERINGS = typing.get_args(Lowering)

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
    lowering: Lowering = "auto",
    bias: jax.Array | None = None,
) -> jax.Array:
    """Cross-correlation of images or sequences with kernels.

    y[b, i, j, o] = bias[o] + sum over u, v, c of x[b, i*s + u*d - p, j*s + v*d - p, c] * kernel[u, v, c, o]

    Args:
      x: [b, h, w, c], or [b, l, c].
      kernel: [kh, kw, c / groups, features], or [k, c / groups, features], in the dtype of x.
      strides: positions from one output to the next; one number or one for each axis.
      padding: "SAME" and "VALID" as in XLA; p or (p, p') zeros on both sides of an axis, as in PyTorch; or a pair
        (before, after) for each axis.
      groups: input and output channels fall into this many separate convolutions, in order.
      dilation: positions from one tap of the kernel to the next.
      lowering: how to compute it; "auto" is the fast way for the default backend.
      bias: [features], or None for none.

    Returns:
      [b, h', w', features] or [b, l', features] in the dtype of x.

    Raises:
      UserError: shapes that do not fit, unknown padding, or a lowering that this convolution does not have.
    """
    g = geometry(
        x.shape,
        kernel.shape,
        strides=strides,
        padding=padding,
        groups=groups,
        dilation=dilation,
    )
    images = x.ndim == 4
    if not images:
        x, kernel = x[:, None], kernel[None]
    y = _lowered(x, varying.like(kernel, x), g, _forced.value or lowering)
    if bias is not None:  # before the axis goes: runtimes fuse what follows at once
        y = y + bias.astype(y.dtype)
    return y if images else y[:, 0]


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
    _check_shapes(x, kernel, groups)
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
    if _known(wanted) not in possible:
        raise UserError(
            f"lowering {wanted!r} cannot do a convolution with kernel {kernel.shape} and groups {geometry.groups}"
            f"{nearest(wanted, possible)}"
        )
    if wanted == "native" or (wanted == "auto" and native_is_best()):
        return lowerings.native(geometry, x, kernel)
    return bilinear.conv(x, kernel, geometry, wanted)


class Conv(nn.Module):
    """A convolution with parameters as `flax.linen.Conv`: kernel [kh, kw, c / groups, features], bias [features].

    Computes in the dtype of its input; parameters are float32. See `conv` for the arguments. Its inputs, its kernel and
    its outputs pass through taps; see `nn/intercept.py`.

    Attributes:
      features: output channels.
      kernel: positions of the kernel; one number or one for each axis.
      kernel_init: initializer of the kernel.
      lowering: how to compute it, see `conv`.
      fixed: whether it is an error to give it another width; see `nn/reshaped.py`.
    """

    features: int
    kernel: Pair
    strides: Pair = 1
    groups: int = 1
    dilation: Pair = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    lowering: Lowering = "auto"
    fixed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | Groups, *, whole: bool = True):
        """x: [b, h, w, c] → [b, h', w', features], or [b, l, c] → [b, l', features].

        Inside `apart` a layer with whole=False returns a tuple of its groups, and takes one of another layer's.
        """
        channels = sum(p.shape[-1] for p in x) if isinstance(x, tuple) else x.shape[-1]
        some = x[0] if isinstance(x, tuple) else x
        outputs = features(self, self.features, fixed=self.fixed)
        self._check_groups(channels, outputs)
        extent = per_axis(self.kernel, some.ndim - 2)
        shape = (*extent, channels // self.groups, outputs)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        kernel, bias = tap(self, "kernel", kernel.astype(some.dtype)), None
        x = tap(self, "inputs", x)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (outputs,), jnp.float32)
        connected = extent == (1,) and per_axis(self.strides, 1) == (1,)
        if connected and 1 < self.groups <= MOST_APART and self._apart(some):
            parts = each_group(x, kernel, bias, self.groups)
            return tap(self, "outputs", jnp.concatenate(parts, -1) if whole else parts)
        y = conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
            lowering=self.lowering,
            bias=bias,
        )
        return tap(self, "outputs", y)

    def _check_groups(self, channels: int, outputs: int) -> None:
        name = "/".join(self.path) or "Conv"
        if channels % self.groups:
            raise UserError(
                f"{name}: {channels} channels do not divide into groups={self.groups}"
            )
        if outputs % self.groups:
            advice = "choose a multiple"
            if channels == self.groups:
                advice = "a depthwise convolution is as wide as the layer before it: change that one"
            raise UserError(
                f"{name}: {outputs} features do not divide into groups={self.groups}: {advice}"
            )

    def _apart(self, x) -> bool:
        if _apart.value is not None:
            return _apart.value
        forced = _forced.value is not None or self.lowering != "auto"
        if forced or native_is_best():
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
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise UserError(
                f"unknown padding {padding!r}{nearest(padding.upper(), ('SAME', 'VALID'))}"
            )
        return tuple(map(tuple, lax.padtype_to_pads(size, extent, strides, padding)))
    if isinstance(padding, int):
        return ((padding, padding),) * len(extent)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def native_is_best() -> bool:
    """Whether XLA's own operation is to be used where nobody names another: on accelerators and in exported files."""
    return _forced.value == "native" or jax.default_backend() != "cpu"


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


def _check_shapes(x: Sequence[int], kernel: Sequence[int], groups: int) -> None:
    if len(x) not in (3, 4) or len(kernel) != len(x):
        raise UserError(
            "a convolution needs images [b, h, w, c] and a kernel [kh, kw, c / groups, features], or sequences [b, l, c]"
            f" and a kernel [k, c / groups, features], not {tuple(x)} and {tuple(kernel)}"
        )
    if x[-1] != kernel[-2] * groups or kernel[-1] % groups:
        raise UserError(
            f"a kernel {tuple(kernel)} with groups={groups} does not fit an input with {x[-1]} channels"
        )
