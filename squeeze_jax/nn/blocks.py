"""Blocks that several architectures share."""

from collections.abc import Callable

import flax.linen as nn
import jax

from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.pool import global_mean


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: each channel is scaled by what the means of all channels say about it.

    y = x * gate(W2 activation(W1 mean(x))), with biases; Hu, Shen, Sun 2017, arXiv 1709.01507, equations 2 to 4.

    Attributes:
      features: channels between the two layers.
      activation: after the first layer.
      gate: after the second layer, from the reals to [0, 1].
    """

    features: int
    activation: Callable = nn.relu
    gate: Callable = nn.sigmoid

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [b, h, w, c] → the same shape and dtype."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        y = global_mean(x)[:, None, None].astype(x.dtype)
        y = Conv(self.features, 1, kernel_init=init, name="reduce")(y)
        y = Conv(x.shape[-1], 1, kernel_init=init, name="expand")(self.activation(y))
        return x * self.gate(y)
