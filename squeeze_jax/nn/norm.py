"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) with statistics over the global batch.

What it costs on a CPU is passes over memory. Two linear maps do all of its work, each the transpose of the other:

    scaled   (x, [a, b]) → x a + b
    sums     (x, y) → [sum of x y, sum of y]

The statistics are sums(x, x), the gradients of scale and bias sums(x, ȳ). As primitives both sums are one pass, where
XLA makes two of what differentiating the operations gives it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from squeeze_jax.nn import primitives, varying
from squeeze_jax.nn.conv import native_is_best
from squeeze_jax.nn.reshaped import norm_momentum
from squeeze_jax.nn.sums import totals

# The collection that counts the batches in running statistics: {layer: {"share": []}}. See `BatchNorm`.
SHARES = "batch_shares"


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, for each channel.

    Parameters scale, bias [c] and batch_stats mean, var [c] are named as in `flax.linen.BatchNorm`. In training mean
    and var are those of the batch, in float32 from one pass over x: the whole batch under `jax.jit`, and inside
    `jax.shard_map` that of all devices along the axes x varies over (which needs its default `check_vma=True`).
    The running variance is fed with the unbiased one, as PyTorch does and Flax does not.

    Where the collection `SHARES` holds the share of batches in the running statistics, 1 - momentum^k after k updates,
    mean and var are corrected for their initial values 0 and 1, as Adam corrects its averages (arXiv 1412.6980, section
    3): they are the weighted mean of the batches' statistics alone. Without it they are PyTorch's.

    Attributes:
      momentum: share of the old running statistics kept in an update, 0 to 1, unless an enclosing `Reshaped` has
        another; PyTorch's `momentum` is one minus this.
      epsilon: added to the variance; PyTorch's default.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Callable = nn.initializers.ones_init()
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """x: [..., c] → the same shape and dtype; in training updates batch_stats where they are mutable."""
        shape = x.shape[-1:]
        momentum = norm_momentum(self, self.momentum)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, shape, jnp.float32)
        if not train:
            ab = _affine(mean.value, var.value, scale, bias, self.epsilon)
            return _scaled(x, ab)
        batch_mean, batch_var, count = moments(x)
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            keep = self._kept(momentum)
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            var.value = keep * var.value + (1 - keep) * unbiased
        ab = _affine(batch_mean, batch_var, scale, bias, self.epsilon)
        ab = varying.like(jnp.stack(ab), x)
        return _scaled(x, ab) if native_is_best() else _scaled_once.bind(x, ab)

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


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Returns mean [c], biased variance [c] and the number of positions of x [..., c], over all devices.

    var = mean(x^2) - mean(x)^2, never below zero, in float32.
    """
    axes = varying.axes(x)
    count = math.prod(x.shape[:-1])
    square, mean = (_sums(x, x) if native_is_best() else _powers(x)) / count
    if axes:
        mean, square = lax.pmean((mean, square), axes)
        count *= math.prod(map(lax.axis_size, axes))
    return mean, jnp.maximum(square - mean * mean, 0), count


def _affine(mean, var, scale, bias, epsilon):
    a = scale * lax.rsqrt(var + epsilon)
    return a, bias - mean * a


def _wide(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _scaled(x, ab):
    return (_wide(x) * ab[0] + ab[1]).astype(x.dtype)


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
