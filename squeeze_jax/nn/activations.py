"""Activations by name, each one operation for LiteRT's converter inside `composite.whole`."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax import lax

from squeeze_jax import registry
from squeeze_jax.nn.composite import exported_as


def _gelu(x):
    # jax.nn.gelu goes by erfc: more digits far below zero, which PyTorch has not either, and more passes on a CPU.
    return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))


gelu = exported_as("aten.gelu.default", _gelu, elementwise=True, approximate="none")
gelu.__doc__ = "x P(N(0, 1) < x), exactly; Hendrycks and Gimpel 2016, arXiv 1606.08415. x: any shape → the same."


def gelu_tanh(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): the older approximation of `gelu`, which some were trained with."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


def named(name: str) -> Callable:
    """The activation of that name.

    Raises:
      UserError: there is none; names the nearest.
    """
    return registry.row(ACTIVATIONS, name, "activation")
