"""The plain gradient exchange: the mean over devices, sent as float32 or bfloat16."""

from collections.abc import Callable
from typing import Literal

import jax

from squeeze_jax.registry import checked


@checked
def make(dtype: Literal["float32", "bfloat16"] = "float32") -> Callable:
    """Returns `exchange(key, grads, axis_names) → grads`, which averages gradients over the devices of these mesh axes.

    Args:
      dtype: dtype in which devices send gradients. bfloat16 halves the number of bytes and rounds each device's gradient to
        8 bits of mantissa.
    """

    def exchange(key, grads, axis_names):
        del key
        return jax.tree.map(
            lambda g: jax.lax.pmean(g.astype(dtype), axis_names).astype(g.dtype), grads
        )

    return exchange
