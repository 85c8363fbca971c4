"""Chooses the floating-point dtype in which a layer computes.

A network of this library computes in the dtype of its inputs, whatever dtype its parameters have: bfloat16 images make it
compute in bfloat16. Inputs may also be integers or booleans, such as uint8 pixels. Layers convert them to float32 first, the
dtype to which JAX promotes them together with float32 parameters.
"""

import jax
import jax.numpy as jnp


def as_float(x: jax.Array) -> jax.Array:
    """Returns an array of integers or booleans as float32, and other arrays unchanged."""
    return x.astype(float_dtype(x))


def float_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of `as_float(x)`: the dtype of x if it is floating-point or complex, else float32."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
