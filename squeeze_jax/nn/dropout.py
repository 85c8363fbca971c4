"""Dropout (Srivastava et al. 2014) at almost no cost: the mask is a hash of each number's index in the array.

Random bits from JAX's generator take a tenth of an encoder's training step on a CPU, and the mask takes memory until the
backward pass needs it again. Here the bits of the mask come from Murmur3's finalizer (Appleby 2011, public domain), applied
twice to index and seed. These are a dozen integer operations, which XLA fuses with the operations around them. The backward
pass computes them again, so no mask is kept. The hash is not a random generator for statistics. The tests measure what dropout
needs: equal shares and no correlation.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from squeeze_jax.errors import UserError
from squeeze_jax.nn import primitives
from squeeze_jax.nn.dtypes import as_float


class Dropout(nn.Module):
    """A dropout layer: in training it sets each number to 0 with probability `rate`, and divides the others by 1 - rate.

    Attributes:
      rate: dropout rate, 0 to 1; above 0 it needs the rng "dropout" in training.
      broadcast_dims: axes along which all numbers share one random decision, such as (1, 2, 3) to drop whole images.
    """

    rate: float
    broadcast_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies dropout to an array of any shape, if `train` is true; integers become float32 in training."""
        if not 0 <= self.rate <= 1:
            raise UserError(f"dropout = {self.rate} should lie in [0, 1]")
        if not train or self.rate == 0:
            return x
        x = as_float(x)
        if self.rate == 1:
            return jnp.zeros_like(x)
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        if self.broadcast_dims:
            shared = self.broadcast_dims
            shape = [1 if i in shared else n for i, n in enumerate(x.shape)]
            keep = _keep_mask(tuple(shape), seed, self.rate)
            return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
        return _dropout_primitive.bind(x, seed, rate=self.rate)


def _hash(h):
    """Applies Murmur3's finalizer to uint32 values."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _keep_mask(shape, seed, rate):
    """Returns a bool mask of a shape, True with probability 1 - rate; seed: uint32 [2]."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    bits = _hash(_hash(index ^ seed[0]) + seed[1])
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _dropout(x, seed, *, rate):
    keep = _keep_mask(x.shape, seed, rate)
    return jnp.where(keep, x * (1 / (1 - rate)), 0).astype(x.dtype)


def _batch_rule(arrays, dims, *, rate):
    """Applies `jax.vmap`: with one seed, all examples get the same mask, as they would from plain operations."""
    return jax.vmap(partial(_dropout, rate=rate), dims)(*arrays), 0


# The function is linear in x, and is its own transpose.
_dropout_primitive = primitives.make("dropout", _dropout, _dropout)
ad.defjvp(
    _dropout_primitive,
    lambda t, x, seed, rate: _dropout_primitive.bind(t, seed, rate=rate),
    None,
)
ad.primitive_transposes[_dropout_primitive] = lambda t, x, seed, rate: (
    _dropout_primitive.bind(t, seed, rate=rate),
    None,
)
batching.primitive_batchers[_dropout_primitive] = _batch_rule
