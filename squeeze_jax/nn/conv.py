"""Convolution in NHWC with the arithmetic chosen per backend.

XLA's convolution is the right one for accelerators and for exported files. On a CPU its grouped and depthwise forms,
and above all their gradients, are many times slower than the same sums written with other operations. A lowering is
one way to write a convolution; all of them give the same numbers and have derivatives of every order:

  native  `lax.conv_general_dilated`
  taps    depthwise: the sum over kernel positions of a shifted image times that position's weights
  matmul  pointwise (1x1, one group): one matrix product over all positions
  split   grouped: one convolution a group, concatenated

"auto" picks by shape on a CPU and is native elsewhere. `with lowering("native"):` decides for everything inside.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn import positions, varying

Lowering = Literal["auto", "native", "taps", "matmul", "split"]
Pair = int | tuple[int, int]
Padding = str | int | tuple[int, int] | Sequence[tuple[int, int]]

LOWERINGS = ("auto", "native", "taps", "matmul", "split")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Beyond this many kernel positions the sum of shifted images is longer to compile than it saves.
MOST_TAPS = 169

# A user context is part of jit's cache key, so that a function traced outside a `lowering` block is traced again in it.
_forced = jax.make_user_context(None)


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
) -> jax.Array:
    """Cross-correlation of images with kernels, without bias.

    y[b, i, j, o] = sum over u, v, c of x[b, i*s + u*d - p, j*s + v*d - p, c] * kernel[u, v, c, o]

    Args:
      x: [b, h, w, c].
      kernel: [kh, kw, c / groups, features], the dtype of x.
      strides: positions from one output to the next; one number or (vertical, horizontal).
      padding: "SAME" and "VALID" as in XLA; p or (p, p') zeros on both sides of an axis, as in PyTorch; or a pair
        (before, after) for each axis.
      groups: input and output channels fall into this many separate convolutions, in order.
      dilation: positions from one tap of the kernel to the next.
      lowering: how to compute it; "auto" is the fast way for the default backend.

    Returns:
      [b, h', w', features] in the dtype of x.

    Raises:
      UserError: shapes that do not fit, unknown padding, or a lowering that this convolution does not have.
    """
    strides, dilation = pair(strides), pair(dilation)
    _check_shapes(x.shape, kernel.shape, groups)
    pads = explicit_padding(padding, x.shape[1:3], kernel.shape[:2], strides, dilation)
    possible = _possible(x.shape, kernel.shape, pads, groups)
    wanted = _forced.value or _known(lowering)
    if wanted == "auto":
        wanted = _fastest(possible, kernel.shape)
    elif wanted not in possible:
        raise UserError(
            f"lowering {wanted!r} cannot do a convolution with kernel {kernel.shape} and groups {groups}"
            f"{nearest(wanted, possible)}"
        )
    return _LOWER[wanted](x, varying.like(kernel, x), strides, pads, groups, dilation)


class Conv(nn.Module):
    """A 2-D convolution with parameters as `flax.linen.Conv`: kernel [kh, kw, c / groups, features], bias [features].

    Computes in the dtype of its input; parameters are float32. See `conv` for the arguments.

    Attributes:
      features: output channels.
      kernel: positions of the kernel; one number or (vertical, horizontal).
      kernel_init: initializer of the kernel.
      lowering: how to compute it, see `conv`.
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [b, h, w, c] → [b, h', w', features]."""
        if x.shape[-1] % self.groups:
            raise UserError(
                f"{self.name or 'Conv'}: {x.shape[-1]} channels do not divide into groups={self.groups}"
            )
        shape = (*pair(self.kernel), x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = conv(
            x,
            kernel.astype(x.dtype),
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
            lowering=self.lowering,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype)
        return y


def explicit_padding(
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[tuple[int, int], ...]:
    """Returns ((before, after), ...) of each axis for every way of saying padding.

    Raises:
      UserError: unknown padding, or a padded image smaller than the window.
    """
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


def _known(name: str) -> str:
    if name not in LOWERINGS:
        raise UserError(f"unknown lowering {name!r}{nearest(name, LOWERINGS)}")
    return name


def pair(value: Pair) -> tuple[int, int]:
    """One number for both axes, or one for each, as (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _check_shapes(x: Sequence[int], kernel: Sequence[int], groups: int) -> None:
    if len(x) != 4 or len(kernel) != 4:
        raise UserError(
            f"a convolution needs images [b, h, w, c] and a kernel [kh, kw, c / groups, features], not {tuple(x)} and {tuple(kernel)}"
        )
    if x[-1] != kernel[2] * groups or kernel[3] % groups:
        raise UserError(
            f"a kernel {tuple(kernel)} with groups={groups} does not fit an input with {x[-1]} channels"
        )


def _possible(x, kernel, pads, groups) -> list[str]:
    found = ["native"]
    if groups == x[-1] and kernel[2] == 1:
        found.append("taps")
    if kernel[:2] == (1, 1) and groups == 1 and not any(map(any, pads)):
        found.append("matmul")
    if groups > 1:
        found.append("split")
    return found


def _fastest(possible: list[str], kernel: Sequence[int]) -> str:
    if jax.default_backend() != "cpu":
        return "native"
    if "taps" in possible and math.prod(kernel[:2]) <= MOST_TAPS:
        return "taps"
    # One convolution a channel would be thousands of operations: what is left is grouped with few groups.
    return next(
        (p for p in ("matmul", "split") if p in possible and "taps" not in possible),
        "native",
    )


def _native(x, kernel, strides, pads, groups, dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def _matmul(x, kernel, strides, pads, groups, dilation):
    # As a 4-D product the weight gradient is several times slower than over [positions, c].
    x = x[:, :: strides[0], :: strides[1]]
    y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _split(x, kernel, strides, pads, groups, dilation):
    xs = jnp.split(x, groups, axis=-1)
    kernels = jnp.split(kernel, groups, axis=-1)
    one = (
        "matmul"
        if "matmul" in _possible(xs[0].shape, kernels[0].shape, pads, 1)
        else "native"
    )
    lower = _LOWER[one]
    parts = [
        lower(a, k, strides, pads, 1, dilation)
        for a, k in zip(xs, kernels, strict=True)
    ]
    return jnp.concatenate(parts, axis=-1)


def _taps(x, kernel, strides, pads, groups, dilation):
    kh, kw, _, features = kernel.shape
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    if features > groups:
        x = jnp.repeat(x, features // groups, axis=-1)
    out = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, k, s, d in zip(
            x.shape[1:3], pads, (kh, kw), strides, dilation, strict=True
        )
    ]
    at = _phases(x, strides, pads, dilation, (kh, kw), out)
    y = 0
    # Three weight gradients a pass over the image is fastest: two and five or more were slower.
    where = list(itertools.product(range(kh), range(kw)))
    for some in (where[n : n + 3] for n in range(0, len(where), 3)):
        weights = [kernel[i, j, 0].astype(accumulate) for i, j in some]
        weights = positions.spread(*weights, shape=(x.shape[0], *out, features))
        for (i, j), weight in zip(some, weights, strict=True):
            tap = at(i * dilation[0], j * dilation[1])
            y = y + tap.astype(accumulate) * weight
    return y.astype(x.dtype)


def _phases(x, strides, pads, dilation, kernel, out):
    """Returns `at(u, v)`: the padded image from row u and column v on, every stride-th, [b, *out, c].

    A strided slice costs two to three times a plain one. Reshaped to [b, h/s, s, w/s, s, c], each phase is plain.
    """
    b, c = x.shape[0], x.shape[-1]
    rows, columns = (
        o + d * (k - 1) // s
        for o, k, s, d in zip(out, kernel, strides, dilation, strict=True)
    )
    size = (rows * strides[0], columns * strides[1])
    after = [n - m - p[0] for n, m, p in zip(size, x.shape[1:3], pads, strict=True)]
    config = [
        (0, 0, 0),
        *((p[0], a, 0) for p, a in zip(pads, after, strict=True)),
        (0, 0, 0),
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    if strides == (1, 1):
        return lambda u, v: x[:, u : u + out[0], v : v + out[1]]
    x = lax.optimization_barrier(x).reshape(b, rows, strides[0], columns, strides[1], c)
    phases = {
        (m, n): x[:, :, m, :, n] for m, n in itertools.product(*map(range, strides))
    }
    # Without the barriers XLA pads and takes phases anew for every tap.
    phases = lax.optimization_barrier(phases)

    def at(u, v):
        (p, m), (q, n) = divmod(u, strides[0]), divmod(v, strides[1])
        return phases[m, n][:, p : p + out[0], q : q + out[1]]

    return at


_LOWER = {"native": _native, "taps": _taps, "matmul": _matmul, "split": _split}
