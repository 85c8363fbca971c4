"""SqueezeNet: AlexNet's accuracy with 50 times fewer parameters.

Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer 2016, arXiv 1602.07360. A fire module squeezes its input to few channels
by 1x1 filters and expands them by 1x1 and 3x3 filters side by side, so that the costly 3x3 filters see few channels;
downsampling comes late, so that activation maps stay large. A 1x1 convolution and a global mean replace the dense layers.

1.1 (github.com/forresti/SqueezeNet) has a smaller stem and earlier pooling: 2.4 times less computation. `bypass` adds
the paper's section 6: "simple" joins fire modules with as many output as input channels by a residual sum, "complex"
also joins the others, through a 1x1 convolution. Images are NHWC.
"""

from functools import partial
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.blocks import batch_norm, residual_sum
from squeeze_jax.nn.conv import Conv, per_axis
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import float_dtype
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean, max_pool
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Range, Rate, Strides

Bypass = Literal["none", "simple", "complex"]

CLASSIFIER = ("conv10",)  # the layers that depend on the classes


class Row(NamedTuple):
    """A variant: conv1's features and kernel, the layers followed by pooling, (squeeze, expand) of fire2, fire3, …

    A fire module has `expand` 1x1 filters and as many 3x3 filters.
    """

    stem: int
    kernel: int
    pools: tuple[str, ...]
    fires: tuple[tuple[int, int], ...]


_FIRES = (  # Table 1, columns s1x1 and e1x1 = e3x3
    (16, 64),
    (16, 64),
    (32, 128),
    (32, 128),
    (48, 192),
    (48, 192),
    (64, 256),
    (64, 256),
)

VARIANTS = {
    "1.0": Row(96, 7, ("conv1", "fire4", "fire8"), _FIRES),  # Table 1
    "1.1": Row(64, 3, ("conv1", "fire3", "fire5"), _FIRES),  # SqueezeNet_v1.1/README
    "tiny": Row(8, 3, ("conv1",), ((4, 8), (4, 8))),
}


class Fire(nn.Module):
    """A fire module: squeezes by 1x1 and expands by 1x1 and 3x3 side by side; Figure 1.

    `residual`: whether the module adds its input.
    """

    squeeze: int
    expand: int
    bypass: Bypass
    norm: bool
    residual: bool

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = partial(_unit, norm=self.norm, train=train)
        s = unit(x, self.squeeze, 1, name="squeeze1x1")
        left = unit(s, self.expand, 1, name="expand1x1")
        right = unit(s, self.expand, 3, padding=1, name="expand3x3")
        y = jnp.concatenate([left, right], axis=-1)
        if self.residual:
            return residual_sum(x, y, self, "expand1x1 and expand3x3")
        if self.bypass == "complex":
            x = Conv(y.shape[-1], (1, 1), dtype=y.dtype, fixed=True, name="bypass1x1")(
                x
            )
            return x + y
        return y


class SqueezeNet(nn.Module):
    """The SqueezeNet network; attributes as in `make`.

    Endpoints: conv1, fire2, fire3, … (before pooling), conv10 (a map of scores).
    """

    row: Row
    num_classes: int | None
    bypass: Bypass
    dropout: float
    norm: bool
    stem_strides: tuple[int, int]
    conv10_padding: int
    conv10_relu: bool

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the mean of the last feature map, float32 [b, d], takes the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row, endpoints = self.row, {}

        def stage(name, y):
            endpoints[name] = y
            return max_pool(y, 3, 2, ceil=True) if name in row.pools else y

        unit = partial(_unit, norm=self.norm, train=train)
        y = unit(x, row.stem, row.kernel, self.stem_strides, name="conv1")
        y, channels = stage("conv1", y), row.stem
        for number, (squeeze, expand) in enumerate(row.fires, 2):
            name = f"fire{number}"
            residual = self.bypass != "none" and channels == 2 * expand
            fire = Fire(squeeze, expand, self.bypass, self.norm, residual, name=name)
            y = stage(name, fire(y, train=train))
            channels = 2 * expand
        if self.num_classes is None:
            return global_mean(y), endpoints
        y = Dropout(self.dropout)(y, train=train)
        y = Conv(
            self.num_classes,
            (1, 1),
            padding=self.conv10_padding,
            dtype=y.dtype,
            kernel_init=nn.initializers.normal(0.01),
            fixed=True,
            name="conv10",
        )(y)
        endpoints["conv10"] = nn.relu(y) if self.conv10_relu else y
        return global_mean(endpoints["conv10"]), endpoints


def _unit(x, features, kernel, strides=1, *, padding=0, norm, train, name):
    """Applies a convolution, batch normalisation if `norm` is set, and ReLU; creates them in the calling module."""
    x = Conv(
        features,
        (kernel, kernel),
        strides,
        padding=padding,
        use_bias=not norm,
        dtype=float_dtype(x),
        kernel_init=nn.initializers.he_uniform(),
        name=name,
    )(x)
    return nn.relu(batch_norm(x, train=train, name=f"{name}_norm") if norm else x)


def make(
    variant: str = "1.1",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier = 1.0,
    bypass: Bypass = "none",
    norm: bool = False,
    dropout: Rate = 0.5,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    pools: tuple[str, ...] | None = None,
    conv10_padding: Annotated[int, Range(0, 16)] = 0,
    conv10_relu: bool = True,
) -> SqueezeNet:
    """Builds a SqueezeNet.

    Args:
      variant: a row of VARIANTS.
      num_classes: channels of conv10; None for no conv10.
      width: multiplies all channel counts except the number of classes.
      bypass: residual connections around the fire modules.
      norm: whether batch normalisation follows every convolution except conv10. The paper has none; it stabilises training on
        small images.
      dropout: dropout rate before conv10, 0 to 1; needs the rng "dropout" in training.
      stem_strides: strides of conv1; 1 for small images.
      pools: the layers followed by 3x3 max pooling of strides 2; None for the variant's.
      conv10_padding: zeros around conv10's input; the released Caffe model of 1.0 has 1.
      conv10_relu: whether ReLU acts on the scores before they are averaged, as in the paper. A class whose scores are all
        below zero then gets no gradient any more. This happens with few classes and images; False avoids it.

    Raises:
      UserError: the variant or a layer in `pools` is unknown.
    """
    row = registry.row(VARIANTS, variant, "variant of squeezenet")
    layers = ["conv1", *(f"fire{n}" for n in range(2, len(row.fires) + 2))]
    pools = row.pools if pools is None else tuple(pools)
    for name in pools:
        if name not in layers:
            raise UserError(f"unknown layer {name!r} in pools{nearest(name, layers)}")
    fires = tuple((scaled(s, width, 4), scaled(e, width, 4)) for s, e in row.fires)
    row = row._replace(stem=scaled(row.stem, width, 4), pools=pools, fires=fires)
    return SqueezeNet(
        row,
        num_classes,
        bypass,
        dropout,
        norm,
        per_axis(stem_strides),
        conv10_padding,
        conv10_relu,
    )


def torchvision_names(net: SqueezeNet) -> dict[str, str]:
    """Returns {our layer: its name in torchvision's checkpoints}; their indices count ReLU and pooling layers."""
    names, index = {"conv1": "features.0", "conv10": "classifier.1"}, 2
    index += "conv1" in net.row.pools
    for number in range(2, len(net.row.fires) + 2):
        fire = f"fire{number}"
        names[f"{fire}/squeeze1x1"] = f"features.{index}.squeeze"
        names[f"{fire}/expand1x1"] = f"features.{index}.expand1x1"
        names[f"{fire}/expand3x3"] = f"features.{index}.expand3x3"
        index += 1 + (fire in net.row.pools)
    return names


def caffe_names(net: SqueezeNet) -> dict[str, str]:
    """Returns {our layer: its name in the Caffe weights of SqueezeNet-Deep-Compression}."""
    names = {"conv1": "conv1", "conv10": "conv10"}
    for number in range(2, len(net.row.fires) + 2):
        fire = f"fire{number}"
        names[f"{fire}/squeeze1x1"] = f"{fire}/conv1x1_1"
        names[f"{fire}/expand1x1"] = f"{fire}/conv1x1_2"
        names[f"{fire}/expand3x3"] = f"{fire}/conv3x3_2"
    return names
