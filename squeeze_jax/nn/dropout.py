"""Dropout (Srivastava et al. 2014) that costs next to nothing: a number's mask is a hash of where it stands.

Random bits from JAX's generator take a tenth of an encoder's training step on a CPU, and the mask that the gradient needs
again takes memory. Here the bit is Murmur3's finalizer (Appleby 2011, public domain), twice, of position and seed: a dozen
integer operations that XLA fuses into what is around them, done once more in the backward pass instead of kept. It is no
generator for statistics; what dropout wants of it, even shares and no correlation, the tests measure.
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
    """In training sets each number to 0 with probability `rate`, and divides the others by 1 - rate.

    Attributes:
      rate: 0 to 1; above 0 it needs the rng "dropout" in training.
      whole: axes along which numbers share their fate, such as (1, 2, 3) for whole images.
    """

    rate: float
    whole: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """x: any shape → the same; in training integers become float32."""
        if not 0 <= self.rate <= 1:
            raise UserError(f"dropout = {self.rate} should lie in [0, 1]")
        if not train or self.rate == 0:
            return x
        x = as_float(x)
        if self.rate == 1:
            return jnp.zeros_like(x)
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        if self.whole:
            shape = [1 if i in self.whole else n for i, n in enumerate(x.shape)]
            kept = _kept(tuple(shape), seed, self.rate)
            return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
        return _dropped_once.bind(x, seed, rate=self.rate)


def _mixed(h):
    """Murmur3's finalizer of uint32."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _kept(shape, seed, rate):
    """bool of a shape, True with probability 1 - rate; seed: uint32 [2]."""
    at = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        apart = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        at = at + lax.broadcasted_iota(jnp.uint32, shape, axis) * apart
    bits = _mixed(_mixed(at ^ seed[0]) + seed[1])
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _dropped(x, seed, *, rate):
    return jnp.where(_kept(x.shape, seed, rate), x * (1 / (1 - rate)), 0).astype(
        x.dtype
    )


def _batched(arrays, dims, *, rate):
    """`vmap`: with one seed all have the same mask, as operations would."""
    return jax.vmap(partial(_dropped, rate=rate), dims)(*arrays), 0


# Linear, and its own transpose.
_dropped_once = primitives.make("dropout", _dropped, _dropped)
ad.defjvp(
    _dropped_once, lambda t, x, seed, rate: _dropped_once.bind(t, seed, rate=rate), None
)
ad.primitive_transposes[_dropped_once] = lambda t, x, seed, rate: (
    _dropped_once.bind(t, seed, rate=rate),
    None,
)
batching.primitive_batchers[_dropped_once] = _batched
