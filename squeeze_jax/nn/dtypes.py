"""The dtype that a layer computes in: the networks of this library take that of their inputs, whatever their parameters have."""

import jax
import jax.numpy as jnp


def as_float(x: jax.Array) -> jax.Array:
    """Returns integers and booleans as float32, the type to which they promote with float32 parameters; floats as they are."""
    return x.astype(float_dtype(x))


def float_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of `as_float(x)`."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
