"""Finds which layers of a network read the channels that a layer writes, by running the network with NaN in them."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

OUTPUT = ""  # stands for the network's output among the readers


def make_finder(
    net: nn.Module, variables: Mapping[str, Any], mixing: Collection[str], example: Any
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Builds a function that finds the readers of channels; it is compiled once for each set of layers.

    The function takes {layer: bool [output channels], True for the channels to follow}. It returns {layer: bool [input
    channels], True for those that come from them}, and under `OUTPUT` the same for the network's output. After layers that
    mix channels, NaN becomes zero, so it does not spread to all channels.

    Args:
      net: the network.
      variables: its variables.
      mixing: layers that mix the channels with others.
      example: shapes of the network's inputs.
    """

    @jax.jit
    def find(variables, x, followed):
        reached = {}

        def note(path, x):
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
                is_nan = jnp.isnan(x).any(tuple(range(x.ndim - 1)))
                known = reached.get(path)
                reached[path] = is_nan if known is None else known | is_nan

        def observe(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or not path:
                return call(*args, **kwargs)
            note(path, args[0] if args else None)
            y = call(*args, **kwargs)
            if path in mixing:
                y = jax.tree.map(jnp.nan_to_num, y)
            if path in followed:
                y = jnp.where(followed[path], jnp.nan, y)
            return y

        with nn.intercept_methods(observe):
            output = net.apply(variables, x, train=False)
        note(OUTPUT, output[0] if isinstance(output, tuple) else output)
        return reached

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example)

    def find_readers(followed):
        with jax.debug_nans(False):
            return jax.device_get(find(variables, zeros, dict(followed)))

    return find_readers
