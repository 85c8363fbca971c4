"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler, Howard, Zhu, Zhmoginov, Chen 2018, arXiv 1801.04381. A bottleneck expands its few input channels by a 1x1
convolution, filters each channel by a 3x3 depthwise convolution, and projects back to few channels without a
non-linearity, which would destroy information there. The residual sum joins the narrow ends. Variants differ only in the
width multiplier. Images are NHWC.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.models import _timm
from squeeze_jax.nn.blocks import (
    UNIT,
    Sides,
    UnitOptions,
    conv_norm,
    residual_sum,
    stage_strides,
)
from squeeze_jax.nn.conv import PerAxis, per_axis
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Positive, Rate, Strides
from squeeze_jax.weights import foreign

CLASSIFIER = ("classifier",)  # the layers that depend on the classes


class Stage(NamedTuple):
    """A line of Table 2: t, c, n, s; only the first block of a stage has the strides."""

    expand: int
    features: int
    blocks: int
    strides: int


class Row(NamedTuple):
    """A variant: width multiplier, features of the stem and of the last convolution, the stages between them."""

    width: float
    stem: int
    head: int
    stages: tuple[Stage, ...]


_STAGES = (  # Table 2
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
_TINY = (Stage(1, 8, 1, 1), Stage(6, 8, 2, 2), Stage(6, 16, 1, 1))

VARIANTS = {  # section 6.1 and Table 4: width multipliers 0.35 to 1.4
    "0.35": Row(0.35, 32, 1280, _STAGES),
    "0.5": Row(0.5, 32, 1280, _STAGES),
    "0.75": Row(0.75, 32, 1280, _STAGES),
    "1.0": Row(1.0, 32, 1280, _STAGES),
    "1.4": Row(1.4, 32, 1280, _STAGES),
    "tiny": Row(1.0, 8, 32, _TINY),
}


class Bottleneck(nn.Module):
    """A bottleneck: expand, depthwise, project; Table 1 and Figure 4(d).

    `expand`: channels inside the bottleneck, None for those of the input. `residual`: whether the block adds its input.
    """

    expand: int | None
    features: int
    strides: PerAxis
    residual: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = partial(
            conv_norm, activation=nn.relu6, options=self.options, train=train
        )
        y = x
        if self.expand is not None:
            y = unit(y, self.expand, 1, name="expand")
        wide = y.shape[-1]
        y = unit(y, wide, 3, self.strides, groups=wide, name="depthwise")
        y = unit(y, self.features, 1, name="project", activation=None)
        return residual_sum(x, y, self, "project") if self.residual else y


class MobileNetV2(nn.Module):
    """The MobileNetV2 network; attributes as in `make`. Endpoints: conv1, stage1, stage2, … (the lines of Table 2), head."""

    row: Row
    num_classes: int | None
    dropout: float
    stem_strides: tuple[int, int]
    options: UnitOptions = UNIT

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the mean of the last feature map, float32 [b, d], takes the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row, number = self.row, 0
        endpoints = {}
        unit = partial(
            conv_norm, activation=nn.relu6, options=self.options, train=train
        )
        y = unit(x, row.stem, 3, self.stem_strides, name="conv1")
        endpoints["conv1"], channels = y, row.stem
        for index, stage in enumerate(row.stages, 1):
            for block in range(stage.blocks):
                number += 1
                strides = stage.strides if block == 0 else 1
                y = Bottleneck(
                    None if stage.expand == 1 else stage.expand * channels,
                    stage.features,
                    strides,
                    residual=strides == 1 and channels == stage.features,
                    options=self.options,
                    name=f"bottleneck{number}",
                )(y, train=train)
                channels = stage.features
            endpoints[f"stage{index}"] = y
        y = endpoints["head"] = unit(y, row.head, 1, name="head")
        y = global_mean(y)
        if self.num_classes is None:
            return y, endpoints
        y = Dropout(self.dropout)(y, train=train)
        classifier = Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(0.01),
            fixed=True,
            name="classifier",
        )
        return classifier(y), endpoints


def make(
    variant: str = "1.0",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier | None = None,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    dropout: Rate = 0.2,
    padding: Sides = "symmetric",
    epsilon: Positive = 1e-5,
) -> MobileNetV2:
    """Builds a MobileNetV2.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      width: width multiplier that replaces the variant's; the last convolution never gets narrower than 1280.
      strides: strides of each stage that replace (1, 2, 2, 2, 1, 2, 1); smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier, 0 to 1; needs the rng "dropout" in training.
      padding, epsilon: see `UnitOptions`; Keras' weights need "same" and 1e-3.

    Raises:
      UserError: the variant is unknown, or `strides` does not have one value for each stage.
    """
    row = registry.row(VARIANTS, variant, "variant of mobilenet_v2")
    strides = stage_strides(strides, [s.strides for s in row.stages])
    width = row.width if width is None else width
    stages = tuple(
        stage._replace(features=scaled(stage.features, width), strides=s)
        for stage, s in zip(row.stages, strides, strict=True)
    )
    row = Row(width, scaled(row.stem, width), scaled(row.head, max(1.0, width)), stages)
    options = UnitOptions(padding, epsilon)
    return MobileNetV2(row, num_classes, dropout, per_axis(stem_strides), options)


def torchvision_names(net: MobileNetV2) -> dict[str, str]:
    """Returns {our layer: its name in torchvision's checkpoints}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-5)
    foreign.check_options("torchvision", net.options._asdict(), published)
    blocks = [s.expand for s in net.row.stages for _ in range(s.blocks)]
    names = {"classifier": "classifier.1"}

    def add(ours, conv, norm):
        names.update({ours: conv, f"{ours}_norm": norm})

    add("conv1", "features.0.0", "features.0.1")
    for number, expand in enumerate(blocks, 1):
        ours, theirs = f"bottleneck{number}", f"features.{number}.conv"
        units = ["expand", "depthwise"] if expand != 1 else ["depthwise"]
        for index, unit in enumerate(units):
            add(f"{ours}/{unit}", f"{theirs}.{index}.0", f"{theirs}.{index}.1")
        last = len(units)
        add(f"{ours}/project", f"{theirs}.{last}", f"{theirs}.{last + 1}")
    head = f"features.{len(blocks) + 1}"
    add("head", f"{head}.0", f"{head}.1")
    return names


def timm_names(net: MobileNetV2) -> dict[str, str]:
    """Returns {our layer: its name in timm's checkpoints}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-5)
    foreign.check_options("timm", net.options._asdict(), published)
    names, number = _timm.stem_and_head(), 0
    for index, stage in enumerate(net.row.stages):
        for block in range(stage.blocks):
            number += 1
            ours, theirs = f"bottleneck{number}", f"blocks.{index}.{block}"
            expand = stage.expand != 1
            names |= _timm.bottleneck(ours, theirs, expand=expand, excite=False)
    return names


def keras_names(net: MobileNetV2) -> dict[str, str | tuple[str, ...]]:
    """Returns {our layer: its name in Keras' files}; raises a UserError for another padding or epsilon."""
    published = dict(padding="same", epsilon=1e-3)
    foreign.check_options("keras", net.options._asdict(), published)
    names = dict(conv1="Conv1", conv1_norm="bn_Conv1", head="Conv_1")
    names |= {"head_norm": "Conv_1_bn", "classifier": ("predictions", "Logits")}
    expands = [s.expand != 1 for s in net.row.stages for _ in range(s.blocks)]
    for number, expand in enumerate(expands):
        block = f"block_{number}" if number else "expanded_conv"
        for unit in ["expand"] * expand + ["depthwise", "project"]:
            names[f"bottleneck{number + 1}/{unit}"] = f"{block}_{unit}"
            names[f"bottleneck{number + 1}/{unit}_norm"] = f"{block}_{unit}_BN"
    return names
