"""Building blocks that several networks of images share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv, PerAxis
from squeeze_jax.nn.dtypes import as_float, float_dtype
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean

Sides = Literal["symmetric", "same"]


class UnitOptions(NamedTuple):
    """Options of padding and normalisation that all `conv_norm` units of a network share.

    Published weights give the published results only with the options they were trained with.

    Attributes:
      padding: "symmetric" adds half the extent of the dilated kernel on all sides, as PyTorch's networks do. "same" pads
        as TensorFlow does: if the number of zeros is odd, there is one more after the image than before it.
      epsilon: see `BatchNorm`.
      momentum: see `BatchNorm`.
    """

    padding: Sides = "symmetric"
    epsilon: float = 1e-5
    momentum: float = 0.9


UNIT = UnitOptions()


def conv_norm(
    x: jax.Array,
    features: int,
    kernel: int,
    strides: PerAxis = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    activation: Callable | None = None,
    options: UnitOptions = UNIT,
    train: bool,
    name: str,
) -> jax.Array:
    """Applies a convolution without bias, batch normalisation and an optional activation.

    Call it inside a module's `nn.compact` method; it creates the layers `<name>` and `<name>_norm` there. Kernels are
    initialised from a normal distribution with variance 2 / (kernel positions * features) (arXiv 1502.01852).

    Args:
      x: [b, h, w, c].
      features: number of output channels.
      kernel: kernel size along both axes.
      strides, groups, dilation: see `conv`.
      activation: function applied after the normalisation, or None.
      options: options of padding and normalisation.
      train: whether to normalise with the batch's statistics.
      name: name of the convolution.

    Returns:
      [b, h', w', features].

    Raises:
      UserError: The epsilon is not positive.
    """
    if options.epsilon <= 0:
        raise UserError(f"epsilon = {options.epsilon} should be positive")
    half_extent = (dilation * (kernel - 1) + 1) // 2
    x = Conv(
        features,
        (kernel, kernel),
        strides,
        padding="SAME" if options.padding == "same" else half_extent,
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
    """Applies batch normalisation to x [..., c] in the dtype of x, with PyTorch's (unbiased) running variance.

    Call it inside a module's `nn.compact` method; it creates the layer `<name>` there.
    """
    return BatchNorm(
        use_running_average=not train,
        momentum=options.momentum,
        epsilon=options.epsilon,
        dtype=float_dtype(x),
        unbiased=True,
        name=name,
    )(x)


def residual_sum(x: jax.Array, y: jax.Array, block: nn.Module, layer: str) -> jax.Array:
    """Returns x + y, the output of a residual block.

    Args:
      x: input of the block.
      y: output of the block's last layer, of the same shape.
      block: the block's module, bound.
      layer: name of the last layer in the block, for the error message.

    Raises:
      UserError: The shapes differ; the message names the layer.
    """
    if x.shape != y.shape:
        name = "/".join((*block.path, layer))
        raise UserError(
            f"{name}: its {y.shape[-1]} features are added to {x.shape[-1]} of the block's input: give all layers whose"
            " outputs are summed the same width"
        )
    return x + y


def stage_strides(
    strides: Sequence[int] | None, default: Sequence[int]
) -> tuple[int, ...]:
    """Returns the strides of each stage: the user's strides, or the variant's if they are None.

    Raises:
      UserError: There is not one number per stage.
    """
    strides = tuple(default if strides is None else strides)
    if len(strides) != len(default):
        raise UserError(
            f"strides = {strides}: {len(default)} stages need as many numbers"
        )
    return strides


class SqueezeExcite(nn.Module):
    """A squeeze-and-excitation block: it scales each channel by a factor that depends on the means of all channels.

    y = x * gate(W2 activation(W1 mean(x))), with biases; Hu, Shen, Sun 2017, arXiv 1709.01507, equations 2 to 4.

    Attributes:
      features: number of channels between the two layers.
      activation: function after the first layer.
      gate: function after the second layer, from the reals to [0, 1].
    """

    features: int
    activation: Callable = nn.relu
    gate: Callable = nn.sigmoid

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the channels of x [b, h, w, c]; returns the same shape and dtype, float32 for integers."""
        x = as_float(x)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        y = global_mean(x)[:, None, None].astype(x.dtype)
        conv = partial(Conv, kernel_size=(1, 1), kernel_init=init, dtype=x.dtype)
        y = conv(self.features, name="reduce")(y)
        y = self.activation(y)
        y = conv(x.shape[-1], fixed=True, name="expand")(y)
        return x * self.gate(y)
