"""The dtype that a layer computes in."""

import jax
import jax.numpy as jnp


def as_float(x: jax.Array) -> jax.Array:
    """Returns integers and booleans as float32, the type to which they promote with float32 parameters; floats as they are."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
