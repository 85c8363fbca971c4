"""MobileNetV3: MobileNetV2's bottleneck in a searched network.

Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le, Adam 2019, arXiv 1905.02244. A search under a
latency budget chose the widths and the blocks with squeeze and excitation. The authors added by hand the piecewise linear
hard-swish in the deeper half, where feature maps are small, and a last stage that widens only after the global mean. Large and
Small are two searches. The minimalistic variants have no excitation, hard-swish or 5x5 kernels, for devices on which these are
slow. Images are NHWC.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.models import _timm
from squeeze_jax.nn.blocks import (
    UNIT,
    Sides,
    SqueezeExcite,
    UnitOptions,
    conv_norm,
    residual_sum,
    stage_strides,
)
from squeeze_jax.nn.conv import per_axis
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Positive, Rate, Strides
from squeeze_jax.weights import foreign

CLASSIFIER = ("classifier",)  # the layers that depend on the classes


class Stage(NamedTuple):
    """Consecutive lines of Tables 1 and 2 with equal output channels; only the first block of a stage has the strides.

    `expand`: the channels inside each block, the column "exp size".
    """

    features: int
    strides: int
    kernel: int
    expand: tuple[int, ...]
    excite: bool
    activation: Callable


class Row(NamedTuple):
    """A variant: width multiplier, features of the stem, of the last convolution and of the layer after the mean."""

    width: float
    stem: int
    head: int
    hidden: int
    activation: Callable
    stages: tuple[Stage, ...]


_RE, _HS = nn.relu, nn.hard_swish
_LARGE = (  # Table 1
    Stage(16, 1, 3, (16,), False, _RE),
    Stage(24, 2, 3, (64, 72), False, _RE),
    Stage(40, 2, 5, (72, 120, 120), True, _RE),
    Stage(80, 2, 3, (240, 200, 184, 184), False, _HS),
    Stage(112, 1, 3, (480, 672), True, _HS),
    Stage(160, 2, 5, (672, 960, 960), True, _HS),
)
_SMALL = (  # Table 2
    Stage(16, 2, 3, (16,), True, _RE),
    Stage(24, 2, 3, (72, 88), False, _RE),
    Stage(40, 2, 5, (96, 240, 240), True, _HS),
    Stage(48, 1, 5, (120, 144), True, _HS),
    Stage(96, 2, 5, (288, 576, 576), True, _HS),
)
_TINY = (
    Stage(16, 2, 5, (24,), True, _RE),
    Stage(16, 1, 3, (16,), True, _HS),
)


def _minimalistic(stages):
    simple = dict(kernel=3, excite=False, activation=_RE)
    return tuple(stage._replace(**simple) for stage in stages)


VARIANTS = {  # Tables 1 to 3, the last with the multiplier; minimalistic: the authors' README in tensorflow/models
    "large": Row(1.0, 16, 960, 1280, _HS, _LARGE),
    "large-0.75": Row(0.75, 16, 960, 1280, _HS, _LARGE),
    "large-minimalistic": Row(1.0, 16, 960, 1280, _RE, _minimalistic(_LARGE)),
    "small": Row(1.0, 16, 576, 1024, _HS, _SMALL),
    "small-0.75": Row(0.75, 16, 576, 1024, _HS, _SMALL),
    "small-minimalistic": Row(1.0, 16, 576, 1024, _RE, _minimalistic(_SMALL)),
    "tiny": Row(1.0, 8, 96, 40, _HS, _TINY),
}


class Bottleneck(nn.Module):
    """A bottleneck: expand, depthwise, squeeze and excite, project; Figure 4.

    `inputs`: the channels of the input according to the network's options. `residual`: whether the block adds its input.
    """

    inputs: int
    expand: int
    features: int
    kernel: int
    strides: int
    excite: bool
    activation: Callable
    residual: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = partial(
            conv_norm,
            activation=self.activation,
            options=self.options,
            train=train,
        )
        y = x
        if self.expand != self.inputs:
            y = unit(y, self.expand, 1, name="expand")
        wide = y.shape[-1]
        y = unit(y, wide, self.kernel, self.strides, groups=wide, name="depthwise")
        if self.excite:
            # A quarter of the channels inside the block, section 5.3.
            squeezed = scaled(self.expand, 0.25)
            y = SqueezeExcite(squeezed, gate=nn.hard_sigmoid, name="squeeze_excite")(y)
        y = unit(y, self.features, 1, activation=None, name="project")
        return residual_sum(x, y, self, "project") if self.residual else y


class MobileNetV3(nn.Module):
    """The MobileNetV3 network; attributes as in `make`.

    Endpoints: conv1, bottleneck1, … (the lines of Tables 1 and 2), head.
    """

    row: Row
    num_classes: int | None
    dropout: float
    stem_strides: tuple[int, int]
    options: UnitOptions = UNIT

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the features after the global mean, float32 [b, hidden], take the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row, endpoints = self.row, {}
        unit = partial(
            conv_norm,
            activation=row.activation,
            options=self.options,
            train=train,
        )
        y = unit(x, row.stem, 3, self.stem_strides, name="conv1")
        endpoints["conv1"], channels = y, row.stem
        for stage in row.stages:
            strides = stage.strides
            for expand in stage.expand:
                name = f"bottleneck{len(endpoints)}"
                y = Bottleneck(
                    channels,
                    expand,
                    stage.features,
                    stage.kernel,
                    strides,
                    stage.excite,
                    stage.activation,
                    residual=strides == 1 and channels == stage.features,
                    options=self.options,
                    name=name,
                )(y, train=train)
                endpoints[name], strides, channels = y, 1, stage.features
        y = endpoints["head"] = unit(y, row.head, 1, name="head")
        dense = partial(
            Dense, dtype=jnp.float32, kernel_init=nn.initializers.normal(0.01)
        )
        y = row.activation(dense(row.hidden, name="hidden")(global_mean(y)))
        if self.num_classes is None:
            return y, endpoints
        y = Dropout(self.dropout)(y, train=train)
        return dense(self.num_classes, fixed=True, name="classifier")(y), endpoints


def make(
    variant: str = "large",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier | None = None,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    dropout: Rate = 0.2,
    padding: Sides = "symmetric",
    epsilon: Positive = 1e-3,
) -> MobileNetV3:
    """Builds a MobileNetV3.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      width: width multiplier that replaces the variant's; it never narrows the layer after the global mean.
      strides: strides of each stage (blocks with equal output channels) that replace (1, 2, 2, 2, 1, 2) of Large or
        (2, 2, 2, 1, 2) of Small; smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier, 0 to 1; needs the rng "dropout" in training.
      padding, epsilon: see `UnitOptions`; Keras' weights need "same" and 1e-3, timm's "symmetric" and 1e-5.

    Raises:
      UserError: the variant is unknown, or `strides` does not have one value for each stage.
    """
    row = registry.row(VARIANTS, variant, "variant of mobilenet_v3")
    strides = stage_strides(strides, [s.strides for s in row.stages])
    width = row.width if width is None else width
    stages, before = [], row.stem
    for stage, s in zip(row.stages, strides, strict=True):
        # A block's input and output channels are scaled and rounded; its expansion ratio stays the same.
        inputs = (before, *[stage.features] * (len(stage.expand) - 1))
        expand = tuple(
            scaled(scaled(c, width), e / c)
            for c, e in zip(inputs, stage.expand, strict=True)
        )
        before = stage.features
        stages.append(
            stage._replace(features=scaled(before, width), strides=s, expand=expand)
        )
    row = row._replace(
        width=width,
        stem=scaled(row.stem, width),
        head=scaled(row.head, width),
        hidden=scaled(row.hidden, max(1.0, width)),
        stages=tuple(stages),
    )
    options = UnitOptions(padding, epsilon, momentum=0.99)
    return MobileNetV3(row, num_classes, dropout, per_axis(stem_strides), options)


def torchvision_names(net: MobileNetV3) -> dict[str, str]:
    """Returns {our layer: its name in torchvision's checkpoints}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-3)
    foreign.check_options("torchvision", net.options._asdict(), published)
    names = {"hidden": "classifier.0", "classifier": "classifier.3"}

    def add(ours, theirs):
        names.update({ours: f"{theirs}.0", f"{ours}_norm": f"{theirs}.1"})

    add("conv1", "features.0")
    number, inputs = 0, net.row.stem
    for stage in net.row.stages:
        for expand in stage.expand:
            number += 1
            units = ["expand"] if expand != inputs else []
            units += ["depthwise", "squeeze_excite"] if stage.excite else ["depthwise"]
            for index, unit in enumerate([*units, "project"]):
                ours = f"bottleneck{number}/{unit}"
                theirs = f"features.{number}.block.{index}"
                if unit == "squeeze_excite":
                    names[f"{ours}/reduce"] = f"{theirs}.fc1"
                    names[f"{ours}/expand"] = f"{theirs}.fc2"
                else:
                    add(ours, theirs)
            inputs = stage.features
    add("head", f"features.{number + 1}")
    return names


def timm_names(net: MobileNetV3) -> dict[str, str]:
    """Returns {our layer: its name in timm's checkpoints}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-5)
    converted = dict(padding="same", epsilon=1e-3)  # weights named tf_mobilenetv3
    foreign.check_options("timm", net.options._asdict(), published, converted)
    names, number, inputs = _timm.stem_and_head(), 0, net.row.stem
    last = len(net.row.stages)
    names |= {"head": f"blocks.{last}.0.conv", "head_norm": f"blocks.{last}.0.bn1"}
    names["hidden"] = "conv_head"
    for index, stage in enumerate(net.row.stages):
        for block, expand in enumerate(stage.expand):
            number += 1
            names |= _timm.bottleneck(
                f"bottleneck{number}",
                f"blocks.{index}.{block}",
                expand=expand != inputs,
                excite=stage.excite,
            )
            inputs = stage.features
    return names


def keras_names(net: MobileNetV3) -> dict[str, tuple[str, ...]]:
    """Returns {our layer: its names in the files of Keras 3 and of earlier versions}.

    Raises:
      UserError: another padding or epsilon.
    """
    published = dict(padding="same", epsilon=1e-3)
    foreign.check_options("keras", net.options._asdict(), published)
    names = {"hidden": ("conv_2", "Conv_2"), "classifier": ("logits", "Logits")}

    def add(ours, theirs, before):
        names[ours] = (theirs, before)
        names[f"{ours}_norm"] = (f"{theirs}_bn", f"{before}/BatchNorm")

    add("conv1", "conv", "Conv")
    number, inputs = 0, net.row.stem
    for stage in net.row.stages:
        for expand in stage.expand:
            ours = f"bottleneck{number + 1}"
            block = f"expanded_conv_{number}" if number else "expanded_conv"
            for unit in ["expand"] * (expand != inputs) + ["depthwise", "project"]:
                add(f"{ours}/{unit}", f"{block}_{unit}", f"{block}/{unit}")
            for unit, end in (("reduce", ""), ("expand", "_1")) if stage.excite else ():
                excite = (f"_squeeze_excite_conv{end}", f"/squeeze_excite/Conv{end}")
                names[f"{ours}/squeeze_excite/{unit}"] = tuple(
                    block + name for name in excite
                )
            number, inputs = number + 1, stage.features
    add("head", "conv_1", "Conv_1")
    return names
