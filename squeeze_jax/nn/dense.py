"""The dense (fully connected) layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.reshaped import features


class Dense(nn.Module):
    """A dense layer, y = x W + b over the last axis.

    The parameters are those of `flax.linen.Dense`: kernel [c, features] and bias [features]. Inputs, kernel and outputs pass
    through taps, where other code can replace them; see `nn/intercept.py`.

    Attributes:
      features: number of output channels.
      use_bias: whether the layer adds a bias.
      dtype: dtype of the computation; None for the dtype to which input and parameters promote.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      output_dtype: dtype of the product, such as float32 for a bfloat16 computation; None for `dtype`.
      param_dtype: dtype of the parameters.
      precision: see `jax.lax.Precision`.
      fixed: if True, an enclosing `Reshaped` that changes `features` raises an error; see `nn/reshaped.py`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    output_dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    fixed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer: [..., c] → [..., features]; raises a UserError if `features` is below 1."""
        outputs = features(self, self.features, fixed=self.fixed)
        if outputs < 1:
            name = "/".join(self.path) or "Dense"
            raise UserError(f"{name}: features={outputs} should be at least 1")
        shape = (x.shape[-1], outputs)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, (outputs,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        x, kernel = tap(self, "inputs", x), tap(self, "kernel", kernel)
        contraction = (((x.ndim - 1,), (0,)), ((), ()))
        y = lax.dot_general(
            x,
            kernel,
            contraction,
            precision=self.precision,
            preferred_element_type=self.output_dtype,
        )
        if bias is not None:
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return tap(self, "outputs", y)
