"""Layer normalisation (Ba, Kiros, Hinton 2016, arXiv 1607.06450), and MobileBERT's replacement for it."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.parameter import parameter

Normalization = Literal["layer_norm", "no_norm"]


class LayerNorm(nn.Module):
    """A layer that normalises the channels of each position: y = (x - mean) / sqrt(var + epsilon) * scale + bias.

    Mean and biased variance are those of the channels of one position. The parameters scale and bias [c] are named as in
    `flax.linen.LayerNorm`. The layer computes in float32.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., c]; returns the same shape and dtype, float32 for integers."""
        x = as_float(x)
        shape = x.shape[-1:]
        scale = parameter(
            self, "scale", nn.initializers.ones_init(), shape, jnp.float32
        )
        bias = parameter(self, "bias", nn.initializers.zeros_init(), shape, jnp.float32)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        var = (centred * centred).mean(-1, keepdims=True)
        y = centred * lax.rsqrt(var + self.epsilon) * scale + bias
        return y.astype(x.dtype)


class NoNorm(nn.Module):
    """A layer that scales and shifts each channel: y = x * scale + bias.

    It replaces normalisations in MobileBERT (arXiv 2004.02984, section 3.3) and is faster, because it needs no mean and no
    variance. The parameters are named as those of `LayerNorm`. The layer computes in float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales and shifts x [..., c]; returns the same shape and dtype, float32 for integers."""
        x = as_float(x)
        shape = x.shape[-1:]
        scale = parameter(
            self, "scale", nn.initializers.ones_init(), shape, jnp.float32
        )
        bias = parameter(self, "bias", nn.initializers.zeros_init(), shape, jnp.float32)
        return (x * scale + bias).astype(x.dtype)


def norm(kind: Normalization, epsilon: float, *, name: str) -> nn.Module:
    """Returns the normalisation module of a kind; only `LayerNorm` uses the epsilon."""
    return NoNorm(name=name) if kind == "no_norm" else LayerNorm(epsilon, name=name)
