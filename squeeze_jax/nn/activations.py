"""The activation functions that options name by strings. GELU becomes one operation of an exported LiteRT file."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax import lax

from squeeze_jax import registry
from squeeze_jax.nn.composite import exported_as


def _gelu(x):
    # jax.nn.gelu computes erfc. It has more exact digits far below zero, which PyTorch does not have either, but takes more
    # passes over memory on a CPU.
    return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))


gelu = exported_as("aten.gelu.default", _gelu, elementwise=True, approximate="none")
gelu.__doc__ = "Returns the exact GELU, x P(N(0, 1) < x), of each number; Hendrycks and Gimpel 2016, arXiv 1606.08415."


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Returns 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the older approximation of `gelu`.

    Some published networks were trained with it.
    """
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


def by_name(name: str) -> Callable:
    """Returns the activation function with a name in `ACTIVATIONS`.

    Raises:
      UserError: The name is unknown; the message suggests the most similar name.
    """
    return registry.row(ACTIVATIONS, name, "activation")
