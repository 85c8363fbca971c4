"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) with statistics over the global batch."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, for each channel.

    Parameters scale, bias [c] and batch_stats mean, var [c] are named as in `flax.linen.BatchNorm`. In training mean
    and var are those of the batch, in float32 from one pass over x: the whole batch under `jax.jit`, and inside
    `jax.shard_map` that of all devices along the axes x varies over (which needs its default `check_vma=True`).
    The running variance is fed with the unbiased one, as PyTorch does and Flax does not.

    Attributes:
      momentum: share of the old running statistics kept in an update, 0 to 1; PyTorch's `momentum` is one minus this.
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
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, shape, jnp.float32)
        if not train:
            a, b = _affine(mean.value, var.value, scale, bias, self.epsilon)
            return (_wide(x) * a + b).astype(x.dtype)
        batch_mean, batch_var, count = moments(x)
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            keep = self.momentum
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            var.value = keep * var.value + (1 - keep) * unbiased
        a, b = _affine(batch_mean, batch_var, scale, bias, self.epsilon)
        a, b = varying.like(a, x), varying.like(b, x)
        return (_wide(x) * a + b).astype(x.dtype)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Returns mean [c], biased variance [c] and the number of positions of x [..., c], over all devices.

    var = mean(x^2) - mean(x)^2, never below zero, in float32.
    """
    axes = varying.axes(x)
    count = math.prod(x.shape[:-1])
    wide = _wide(x)
    over = tuple(range(x.ndim - 1))
    # Both read x alone, so that XLA makes one pass of them.
    mean, square = wide.sum(over) / count, (wide * wide).sum(over) / count
    if axes:
        mean, square = lax.pmean((mean, square), axes)
        count *= math.prod(map(lax.axis_size, axes))
    return mean, jnp.maximum(square - mean * mean, 0), count


def _affine(mean, var, scale, bias, epsilon):
    a = scale * lax.rsqrt(var + epsilon)
    return a, bias - mean * a


def _wide(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
