"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) with statistics over the global batch.

On a CPU its time is the number of passes over memory. Two linear functions do all of its work, and each is the transpose of
the other:

    scaled   (x, [a, b]) → x a + b
    sums     (x, y) → [sum of x y, sum of y]

The batch's statistics come from sums(x, x), and the gradients of scale and bias from sums(x, ȳ). Both functions are
primitives, so that the two sums take one pass over memory. If JAX differentiates the plain operations, XLA needs two.
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
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.reshaped import norm_momentum
from squeeze_jax.nn.sums import totals

# The collection of variables {layer: {"share": float32 []}}: the total weight of batches in the layer's running statistics.
# See `BatchNorm`.
SHARES = "batch_shares"


class BatchNorm(nn.Module):
    """A batch normalisation layer that replaces `flax.linen.BatchNorm`: same arguments and defaults, same variables.

    For each channel, y = (x - mean) / sqrt(var + epsilon) * scale + bias. The parameters are scale and bias [c]; the
    collection batch_stats holds the running statistics mean and var [c]. In training, mean and var are the statistics of the
    batch in float32. Under `jax.jit` they cover the whole batch. Inside `jax.shard_map` they cover the batches of all devices
    along the mesh axes that x varies over (which needs the default `check_vma=True` of `jax.shard_map`).

    If the variables contain the collection `SHARES`, the running statistics are corrected for their initial values 0 and 1, as
    Adam corrects its averages (arXiv 1412.6980, section 3): they are the weighted mean of the batches' statistics alone. A
    share is the total weight of all batches in the uncorrected running statistics, 1 - momentum^k after k updates. Without
    this collection the running statistics are those of Flax.

    Attributes:
      use_running_average: whether to normalise with the running statistics, as in evaluation, or with the batch's.
      axis: index of the channel axis.
      momentum: share of the old running statistics that an update keeps, 0 to 1. PyTorch's `momentum` is 1 minus this. An
        enclosing `Reshaped` can replace it.
      epsilon: added to the variance; the default is PyTorch's, too.
      dtype: dtype of the result; None for the dtype to which input and parameters promote.
      param_dtype: dtype of the parameters.
      use_bias, use_scale: whether the layer has these parameters.
      bias_init, scale_init: initializers of the parameters.
      axis_name: axes of `jax.vmap` or `jax.shard_map` whose batches share their statistics, or None.
      axis_index_groups: parts of that axis whose batches share their statistics, see `jax.lax.psum`; None for the whole axis.
      use_fast_variance: whether to compute var = mean(x^2) - mean(x)^2 in one pass over x; otherwise var is the mean of
        (x - mean)^2.
      unbiased: whether the running variance is divided by the number of positions minus one, as in PyTorch.
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
        """Normalises x; in training, it also updates the collection batch_stats, which must be mutable.

        Args:
          x: [..., c].
          use_running_average: see the attribute; set exactly one of the two.
          mask: bool, broadcastable to x: True for positions that count in the batch's statistics. Over several devices every
            position has the same weight; in Flax every device has the same weight.

        Returns:
          An array of the shape of x.

        Raises:
          UserError: Training runs without `mutable=["batch_stats"]`, or x does not have the axis or is complex, or the momentum
            lies outside of [0, 1].
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if not isinstance(self.axis, int) or not -x.ndim <= self.axis < x.ndim:
            raise UserError(
                f"{self._name()}: axis = {self.axis!r} should be one axis of the input {x.shape}"
            )
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise UserError(
                f"{self._name()}: the input is {x.dtype}: normalise its real and imaginary parts by layers of their own, or use"
                " flax.linen.BatchNorm"
            )
        axis_is_last = self.axis % x.ndim == x.ndim - 1
        if not axis_is_last:
            x = jnp.moveaxis(x, self.axis, -1)
            mask = (
                mask
                if mask is None or mask.ndim < 2
                else jnp.moveaxis(mask, self.axis, -1)
            )
        shape = x.shape[-1:]
        momentum = norm_momentum(self, self.momentum)
        if not 0 <= momentum <= 1:
            raise UserError(
                f"{self._name()}: momentum = {momentum} should lie in [0, 1]: it is the share of the old statistics that an"
                " update keeps"
            )
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = bias = None
        if self.use_scale:
            scale = parameter(self, "scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, shape, self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = as_float(x)
        affine = partial(_affine, scale=scale, bias=bias, epsilon=self.epsilon)
        if evaluate:
            y = _scaled(x, affine(mean.value, var.value), dtype)
        else:
            batch_mean, batch_var, count = self._moments(x, mask)
            if not self.is_initializing():
                self._check_mutable()
                keep = self._update_weight(momentum)
                if self.unbiased:
                    new_var = batch_var * (count / jnp.maximum(count - 1, 1))
                else:
                    new_var = batch_var
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                var.value = keep * var.value + (1 - keep) * new_var
            ab = varying.like(jnp.stack(affine(batch_mean, batch_var)), x)
            # The primitive returns the dtype of x. Its gradients need fewer passes over memory.
            plain = native_is_forced() or x.dtype != dtype
            y = _scaled(x, ab, dtype) if plain else _scaled_primitive.bind(x, ab)
        return y if axis_is_last else jnp.moveaxis(y, -1, self.axis)

    @nn.nowrap  # keeps this method out of the names of operations
    def _moments(self, x, mask):
        names, index_groups = self.axis_name, self.axis_index_groups
        names = () if names is None or self.is_initializing() else names
        if mask is None and self.use_fast_variance:
            return moments(x, names, index_groups)
        fast = self.use_fast_variance
        return masked_moments(x, mask, names, index_groups, fast=fast)

    def _check_mutable(self) -> None:
        if not self.is_mutable_collection("batch_stats"):
            raise UserError(
                f"{self._name()}: training updates the running statistics: pass mutable=['batch_stats'] to apply and keep"
                " what it returns, or use_running_average=True to evaluate"
            )

    def _name(self) -> str:
        return "/".join(self.path) or "BatchNorm"

    def _update_weight(self, momentum: float):
        """Returns the weight of the stored statistics in an update, and updates the layer's share in `SHARES`."""
        if momentum == 1 or not self.has_variable(SHARES, "share"):
            return momentum
        before = self.get_variable(SHARES, "share")
        share = momentum * before + (1 - momentum)
        self.put_variable(SHARES, "share", share)
        # The stored value is corrected: sum / before. It becomes (momentum * sum + (1 - momentum) * batch) / share.
        return momentum * before / share


def shares(
    stats: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the collection `SHARES` for a network's running statistics: 1 for layers with known statistics, else 0.

    Args:
      stats: the collection batch_stats.
      known: those statistics in it that are not initial values, such as pretrained ones; None for none.
    """
    known, result = known or {}, {}
    for name, value in stats.items():
        if not isinstance(value, Mapping):
            continue
        if {"mean", "var"} <= value.keys():
            share = 1.0 if "mean" in known.get(name, {}) else 0.0
            result[name] = {"share": jnp.full((), share, jnp.float32)}
        elif nested := shares(value, known.get(name)):
            result[name] = nested
    return result


def moments(
    x: jax.Array, names: str | Sequence[str] = (), index_groups: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns mean [c], biased variance [c] and number of positions of x over all devices, in float32.

    The variance is mean(x^2) - mean(x)^2, but never below zero.

    Args:
      x: [..., c].
      names: axes of `jax.vmap` or `jax.shard_map` to average over, in addition to those that x varies over.
      index_groups: parts of these axes to average over, see `jax.lax.pmean`.
    """
    count = float(math.prod(x.shape[:-1]))  # may be too large for an int32
    sums = _sums(x, x) if native_is_forced() else _sums_of_powers(x)
    square, mean = sums / count
    mean, square, count = _mean_over_devices(
        x, names, index_groups, mean, square, count
    )
    return mean, jnp.maximum(square - mean * mean, 0), count


def masked_moments(x, mask, names=(), index_groups=None, *, fast: bool = False):
    """Returns what `moments` returns, for the positions where a mask is true.

    Args:
      x: [..., c].
      mask: bool, broadcastable to x; None for all positions.
      names, index_groups: see `moments`.
      fast: whether the variance is mean(x^2) - mean(x)^2; otherwise it is mean((x - mean)^2).
    """
    wide = _as_wide(x)
    axes = tuple(range(x.ndim - 1))
    mask = jnp.ones((), bool) if mask is None else mask.astype(bool)
    mask = jnp.broadcast_to(mask, x.shape)
    counts = mask.sum(axes).astype(jnp.float32)

    def masked_mean(values):
        total = jnp.where(mask, values, 0).sum(axes)
        total, count, _ = _mean_over_devices(x, names, index_groups, total, counts, 1)
        return total / count

    mean = masked_mean(wide)
    if fast:
        var = jnp.maximum(masked_mean(wide * wide) - mean * mean, 0)
    else:
        var = masked_mean(jnp.square(wide - mean))
    *_, devices = _mean_over_devices(x, names, index_groups, counts, counts, 1)
    return mean, var, counts * devices


def _mean_over_devices(x, names, index_groups, a, b, count):
    """Averages two arrays over the devices and mapped axes that share statistics; multiplies `count` by their number."""
    names = (names,) if isinstance(names, str) else tuple(names)
    axes = (*varying.axes(x), *(n for n in names if n not in varying.axes(x)))
    if axes:
        a, b = lax.pmean((a, b), axes, axis_index_groups=index_groups)
        size = math.prod(map(lax.axis_size, axes))
        count *= len(index_groups[0]) if index_groups else size
    return a, b, count


def _affine(mean, var, scale, bias, epsilon):
    """Returns a and b of the normalisation y = x a + b."""
    a = lax.rsqrt(var + epsilon)
    a = a if scale is None else a * scale
    return a, -mean * a if bias is None else bias - mean * a


def _as_wide(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _scaled(x, ab, dtype=None):
    return (_as_wide(x) * ab[0] + ab[1]).astype(dtype or x.dtype)


def _sums(x, y):
    x, y, axes = _as_wide(x), _as_wide(y), tuple(range(x.ndim - 1))
    return jnp.stack([(x * y).sum(axes), y.sum(axes)])


@primitives.compiled_alone
def _sums_in_one_pass(x, y):
    x, y = _as_wide(x), _as_wide(y)
    return totals([x * y, y])


@jax.custom_jvp
def _sums_of_powers(x):
    """Returns the sums of x^2 and of x over all positions, [2, c]."""
    return _sums_primitive.bind(x, x)


@_sums_of_powers.defjvp
def _sums_of_powers_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    product, plain = _sums_primitive.bind(x, t)
    return _sums_of_powers(x), jnp.stack([2 * product, plain])


def _batch_rule(plain, arrays, dims):
    """Applies `jax.vmap` to the plain operations, because JAX has rules for them."""
    return jax.vmap(plain, dims)(*arrays), 0


_scaled_primitive = primitives.make("batch_norm_scaled", _scaled, _scaled)
_sums_primitive = primitives.make("batch_norm_sums", _sums_in_one_pass, _sums)
ad.defjvp(
    _scaled_primitive,
    lambda t, x, ab: (_as_wide(t) * ab[0]).astype(x.dtype),
    lambda t, x, ab: _scaled_primitive.bind(x, t),
)
ad.defjvp(
    _sums_primitive,
    lambda t, x, y: _sums(t, y).at[1].set(0),
    lambda t, x, y: _sums_primitive.bind(x, t),
)
ad.primitive_transposes[_scaled_primitive] = lambda t, x, ab: (
    None,
    _sums_primitive.bind(x, t),
)
ad.primitive_transposes[_sums_primitive] = lambda t, x, y: (
    None,
    _scaled_primitive.bind(x, t),
)
batching.primitive_batchers[_scaled_primitive] = partial(_batch_rule, _scaled)
batching.primitive_batchers[_sums_primitive] = partial(_batch_rule, _sums)
