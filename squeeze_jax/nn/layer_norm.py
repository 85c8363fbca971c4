"""Layer normalisation (Ba, Kiros, Hinton 2016, arXiv 1607.06450)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn.dtypes import as_float

Normalization = Literal["layer_norm", "no_norm"]


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, mean and biased variance over the channels of a position.

    Parameters scale and bias [c] are named as in `flax.linen.LayerNorm`. Computed in float32.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., c] → the same shape and dtype; integers become float32."""
        x = as_float(x)
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        var = (centred * centred).mean(-1, keepdims=True)
        y = centred * lax.rsqrt(var + self.epsilon) * scale + bias
        return y.astype(x.dtype)


class NoNorm(nn.Module):
    """y = x * scale + bias for each channel: what stands for a normalisation in MobileBERT (arXiv 2004.02984, section 3.3).

    Without mean and variance it is quicker. Parameters are named as those of `LayerNorm`. Computed in float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., c] → the same shape and dtype; integers become float32."""
        x = as_float(x)
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        return (x * scale + bias).astype(x.dtype)


def norm(kind: Normalization, epsilon: float, *, name: str) -> nn.Module:
    """The module of that kind; the epsilon is of `LayerNorm` alone."""
    return NoNorm(name=name) if kind == "no_norm" else LayerNorm(epsilon, name=name)
