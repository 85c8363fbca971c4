"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) with statistics over the global batch.

What it costs on a CPU is passes over memory. Two linear maps do all of its work, each the transpose of the other:

    scaled   (x, [a, b]) → x a + b
    sums     (x, y) → [sum of x y, sum of y]

The statistics are sums(x, x), the gradients of scale and bias sums(x, ȳ). As primitives both sums are one pass, where
XLA makes two of what differentiating the operations gives it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.interpreters import ad, batching

from squeeze_jax.errors import UserError
from squeeze_jax.nn import primitives, varying
from squeeze_jax.nn.conv import native_is_forced
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.reshaped import norm_momentum
from squeeze_jax.nn.sums import totals

# The collection that counts the batches in running statistics: {layer: {"share": []}}. See `BatchNorm`.
SHARES = "batch_shares"


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, for each channel, as `flax.linen.BatchNorm` and in its place.

    Parameters scale, bias [c], batch_stats mean, var [c], arguments and their defaults are Flax's. In training mean and
    var are those of the batch, in float32: the whole batch under `jax.jit`, and inside `jax.shard_map` that of all
    devices along the axes x varies over (which needs its default `check_vma=True`).

    Where the collection `SHARES` holds the share of batches in the running statistics, 1 - momentum^k after k updates,
    mean and var are corrected for their initial values 0 and 1, as Adam corrects its averages (arXiv 1412.6980, section
    3): they are the weighted mean of the batches' statistics alone. Without it they are Flax's.

    Attributes:
      use_running_average: whether the running statistics are used, as in evaluation, or those of the batch.
      axis: the axis of the channels.
      momentum: share of the old running statistics kept in an update, 0 to 1, unless an enclosing `Reshaped` has
        another; PyTorch's `momentum` is one minus this.
      epsilon: added to the variance; PyTorch's default too.
      dtype: of the result; None for the type to which input and parameters promote.
      param_dtype: of the parameters.
      use_bias, use_scale: whether there are these parameters.
      bias_init, scale_init: initializers.
      axis_name: axes of `jax.vmap` or `jax.shard_map` over which batches are one, or None.
      axis_index_groups: parts of that axis whose batches are one, see `jax.lax.psum`; None for all.
      use_fast_variance: var = mean(x^2) - mean(x)^2 in one pass over x, else the mean of the squared distances.
      unbiased: whether the running variance divides by one position less, as PyTorch's does.
    """

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros_init()
    scale_init: Callable = nn.initializers.ones_init()
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    unbiased: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """x: [..., c] → the same shape; in training updates batch_stats, which have to be mutable.

        Args:
          x: [..., c].
          use_running_average: as the attribute; one of both is needed.
          mask: bool, broadcastable to x: which positions count in the statistics of the batch. Over several devices every
            position has the same weight, where Flax gives it to every device.

        Raises:
          UserError: training without `mutable=["batch_stats"]`, or an axis that x does not have.
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if not isinstance(self.axis, int) or not -x.ndim <= self.axis < x.ndim:
            raise UserError(
                f"{self._name()}: axis = {self.axis!r} should be one axis of the input {x.shape}"
            )
        last = self.axis % x.ndim == x.ndim - 1
        if not last:
            x = jnp.moveaxis(x, self.axis, -1)
            mask = (
                mask
                if mask is None or mask.ndim < 2
                else jnp.moveaxis(mask, self.axis, -1)
            )
        shape = x.shape[-1:]
        momentum = norm_momentum(self, self.momentum)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = as_float(x)
        affine = partial(_affine, scale=scale, bias=bias, epsilon=self.epsilon)
        if evaluate:
            y = _scaled(x, affine(mean.value, var.value), dtype)
        else:
            batch_mean, batch_var, count = self._moments(x, mask)
            if not self.is_initializing():
                self._check_mutable()
                keep = self._kept(momentum)
                if self.unbiased:
                    kept_var = batch_var * (count / jnp.maximum(count - 1, 1))
                else:
                    kept_var = batch_var
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                var.value = keep * var.value + (1 - keep) * kept_var
            ab = varying.like(jnp.stack(affine(batch_mean, batch_var)), x)
            # The primitive keeps the dtype of x; gradients in it cost fewer passes.
            direct = native_is_forced() or x.dtype != dtype
            y = _scaled(x, ab, dtype) if direct else _scaled_once.bind(x, ab)
        return y if last else jnp.moveaxis(y, -1, self.axis)

    @nn.nowrap  # no layer of its own in the names of operations
    def _moments(self, x, mask):
        names, parts = self.axis_name, self.axis_index_groups
        names = () if names is None or self.is_initializing() else names
        if mask is None and self.use_fast_variance:
            return moments(x, names, parts)
        return exact_moments(x, mask, names, parts, fast=self.use_fast_variance)

    def _check_mutable(self) -> None:
        if not self.is_mutable_collection("batch_stats"):
            raise UserError(
                f"{self._name()}: training updates the running statistics: pass mutable=['batch_stats'] to apply and keep"
                " what it returns, or use_running_average=True to evaluate"
            )

    def _name(self) -> str:
        return "/".join(self.path) or "BatchNorm"

    def _kept(self, momentum: float):
        """Returns the share of the stored statistics that an update keeps, and counts the update."""
        if momentum == 1 or not self.has_variable(SHARES, "share"):
            return momentum
        before = self.get_variable(SHARES, "share")
        share = momentum * before + (1 - momentum)
        self.put_variable(SHARES, "share", share)
        # What is stored is corrected: sum / before, which becomes (momentum * sum + (1 - momentum) * batch) / share.
        return momentum * before / share


def shares(
    stats: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the collection `SHARES` for a network's statistics: 1 for a layer whose statistics are known, else 0.

    Args:
      stats: the collection batch_stats.
      known: the part of it that does not begin at the initial values, such as pretrained statistics.
    """
    known, result = known or {}, {}
    for name, value in stats.items():
        if not isinstance(value, Mapping):
            continue
        if {"mean", "var"} <= value.keys():
            share = 1.0 if "mean" in known.get(name, {}) else 0.0
            result[name] = {"share": jnp.full((), share, jnp.float32)}
        elif below := shares(value, known.get(name)):
            result[name] = below
    return result


def moments(
    x: jax.Array, names: str | Sequence[str] = (), index_groups: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns mean [c], biased variance [c] and the number of positions of x [..., c], over all devices.

    var = mean(x^2) - mean(x)^2, never below zero, in float32.

    Args:
      x: [..., c].
      names: axes of `jax.vmap` or `jax.shard_map` to average over, beside those that x varies over.
      index_groups: parts of these axes, see `jax.lax.pmean`.
    """
    count = math.prod(x.shape[:-1])
    square, mean = (_sums(x, x) if native_is_forced() else _powers(x)) / count
    mean, square, count = _over_devices(x, names, index_groups, mean, square, count)
    return mean, jnp.maximum(square - mean * mean, 0), count


def exact_moments(x, mask, names=(), index_groups=None, *, fast: bool = False):
    """As `moments`, of the positions where a mask is true, and var = mean((x - mean)^2) unless it is to be fast."""
    wide = _wide(x)
    over = tuple(range(x.ndim - 1))
    mask = jnp.ones((), bool) if mask is None else mask.astype(bool)
    weight = jnp.broadcast_to(mask, x.shape)
    counts = weight.sum(over).astype(jnp.float32)

    def averaged(values):
        total = jnp.where(weight, values, 0).sum(over)
        total, number, _ = _over_devices(x, names, index_groups, total, counts, 1)
        return total / number

    mean = averaged(wide)
    if fast:
        var = jnp.maximum(averaged(wide * wide) - mean * mean, 0)
    else:
        var = averaged(jnp.square(wide - mean))
    *_, devices = _over_devices(x, names, index_groups, counts, counts, 1)
    return mean, var, counts * devices


def _over_devices(x, names, index_groups, a, b, count):
    """Returns the means of two arrays over the devices or mapped axes whose batches are one, and the count of all."""
    names = (names,) if isinstance(names, str) else tuple(names)
    axes = (*varying.axes(x), *(n for n in names if n not in varying.axes(x)))
    if axes:
        a, b = lax.pmean((a, b), axes, axis_index_groups=index_groups)
        each = math.prod(map(lax.axis_size, axes))
        count *= len(index_groups[0]) if index_groups else each
    return a, b, count


def _affine(mean, var, scale, bias, epsilon):
    a = lax.rsqrt(var + epsilon)
    a = a if scale is None else a * scale
    return a, -mean * a if bias is None else bias - mean * a


def _wide(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _scaled(x, ab, dtype=None):
    return (_wide(x) * ab[0] + ab[1]).astype(dtype or x.dtype)


def _sums(x, y):
    x, y, over = _wide(x), _wide(y), tuple(range(x.ndim - 1))
    return jnp.stack([(x * y).sum(over), y.sum(over)])


@primitives.apart
def _sums_at_once(x, y):
    x, y = _wide(x), _wide(y)
    return totals([x * y, y])


@jax.custom_jvp
def _powers(x):
    """The sums of x^2 and of x, [2, c]."""
    return _sums_once.bind(x, x)


@_powers.defjvp
def _powers_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    product, plain = _sums_once.bind(x, t)
    return _powers(x), jnp.stack([2 * product, plain])


def _batched(plain, arrays, dims):
    """`vmap`: of operations that have rules of their own."""
    return jax.vmap(plain, dims)(*arrays), 0


_scaled_once = primitives.make("batch_norm_scaled", _scaled, _scaled)
_sums_once = primitives.make("batch_norm_sums", _sums_at_once, _sums)
ad.defjvp(
    _scaled_once,
    lambda t, x, ab: (_wide(t) * ab[0]).astype(x.dtype),
    lambda t, x, ab: _scaled_once.bind(x, t),
)
ad.defjvp(
    _sums_once,
    lambda t, x, y: _sums(t, y).at[1].set(0),
    lambda t, x, y: _sums_once.bind(x, t),
)
ad.primitive_transposes[_scaled_once] = lambda t, x, ab: (None, _sums_once.bind(x, t))
ad.primitive_transposes[_sums_once] = lambda t, x, y: (None, _scaled_once.bind(x, t))
batching.primitive_batchers[_scaled_once] = partial(_batched, _scaled)
batching.primitive_batchers[_sums_once] = partial(_batched, _sums)
