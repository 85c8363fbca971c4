"""Blocks that several architectures share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv, Pair
from squeeze_jax.nn.dtypes import as_float, float_dtype
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean

Sides = Literal["symmetric", "same"]


class UnitOptions(NamedTuple):
    """How every `conv_norm` of a network pads and normalises; weights compute as published with the options of their training.

    Attributes:
      padding: "symmetric" adds half the extent of the dilated kernel on all sides, as PyTorch's networks do. "same" pads
        as TensorFlow does: where strides leave an odd number of zeros, one more after the image than before it.
      epsilon, momentum: of the normalisation, see `BatchNorm`.
    """

    padding: Sides = "symmetric"
    epsilon: float = 1e-5
    momentum: float = 0.9


UNIT = UnitOptions()


def conv_norm(
    x: jax.Array,
    features: int,
    kernel: int,
    strides: Pair = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    activation: Callable | None = None,
    options: UnitOptions = UNIT,
    train: bool,
    name: str,
) -> jax.Array:
    """Convolution without bias, batch normalisation, and an activation where one is given.

    Creates `name` and `name_norm` in the module that calls it. Kernels begin normal, with a variance of
    2 / (positions * features) (arXiv 1502.01852).

    Args:
      x: [b, h, w, c].
      features, kernel, strides, groups, dilation: of the convolution, see `Conv`.
      options: padding and normalisation.
      train: whether the normalisation uses the batch's statistics.

    Returns:
      [b, h', w', features].

    Raises:
      UserError: an epsilon that is not positive.
    """
    if options.epsilon <= 0:
        raise UserError(f"epsilon = {options.epsilon} should be positive")
    half = (dilation * (kernel - 1) + 1) // 2
    x = Conv(
        features,
        (kernel, kernel),
        strides,
        padding="SAME" if options.padding == "same" else half,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=False,
        dtype=float_dtype(x),
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )(x)
    x = batch_norm(x, options, train=train, name=f"{name}_norm")
    return activation(x) if activation else x


def batch_norm(
    x: jax.Array, options: UnitOptions = UNIT, *, train: bool, name: str
) -> jax.Array:
    """Batch normalisation in the dtype of x [..., c], with PyTorch's running variance; creates `name` in the module that calls it."""
    return BatchNorm(
        use_running_average=not train,
        momentum=options.momentum,
        epsilon=options.epsilon,
        dtype=float_dtype(x),
        unbiased=True,
        name=name,
    )(x)


def residual_sum(x: jax.Array, y: jax.Array, block: nn.Module, layer: str) -> jax.Array:
    """Returns x + y, which must have the same shape.

    Args:
      x: the block's input.
      y: the outputs of the block's last layer.
      block: the module, bound.
      layer: the name of that layer in it.

    Raises:
      UserError: the shapes differ; names the layer.
    """
    if x.shape != y.shape:
        name = "/".join((*block.path, layer))
        raise UserError(
            f"{name}: its {y.shape[-1]} features are added to {x.shape[-1]} of the block's input: give all layers whose"
            " outputs are summed the same width"
        )
    return x + y


def stage_strides(given: Sequence[int] | None, own: Sequence[int]) -> tuple[int, ...]:
    """The strides of each stage: those given to `make`, else the variant's own.

    Raises:
      UserError: not as many as there are stages.
    """
    strides = tuple(own if given is None else given)
    if len(strides) != len(own):
        raise UserError(f"strides = {strides}: {len(own)} stages need as many numbers")
    return strides


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
        """x: [b, h, w, c] → the same shape and dtype; integers become float32."""
        x = as_float(x)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        y = global_mean(x)[:, None, None].astype(x.dtype)
        conv = partial(Conv, kernel_size=(1, 1), kernel_init=init, dtype=x.dtype)
        y = conv(self.features, name="reduce")(y)
        y = self.activation(y)
        y = conv(x.shape[-1], fixed=True, name="expand")(y)
        return x * self.gate(y)
