"""The weighted mean that losses and metrics share."""

import jax
import jax.numpy as jnp


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean over what counts, float32; 0 where nothing does.

    Args:
      values: float array.
      weights: bool or float array of the same shape: 0 for what does not count.
    """
    weights = weights.astype(jnp.float32)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)
