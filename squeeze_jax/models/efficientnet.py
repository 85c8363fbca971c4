"""EfficientNet: depth, width and resolution scaled together.

Tan, Le 2019, arXiv 1905.11946. B0 comes from a search like MobileNetV3's; its blocks are inverted residuals with squeeze and
excitation and swish. B1 to B7 increase depth, width and image size in a fixed proportion, which gains more than any of the
three alone. Lite0 to Lite4 (tensorflow/tpu, efficientnet/lite) are for integer arithmetic and accelerators: they have no
excitation, ReLU6 instead of swish, a stem and a head of the same width in all variants, and one block in the first and in the
last stage.

In training each sample skips a block at a rate that grows linearly with depth (stochastic depth, arXiv 1603.09382). Momentum
and epsilon are those of torchvision's checkpoints, where B0 to B4 do not have the authors' 0.99 and 0.001. Images are NHWC.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError
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
    """A line of Table 1; only the first block of a stage has the strides."""

    expand: int
    features: int
    blocks: int
    strides: int
    kernel: int


_STAGES = (  # Table 1, stages 2 to 8
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)
_TINY = (Stage(6, 16, 1, 2, 5), Stage(1, 16, 1, 1, 3))


class Row(NamedTuple):
    """A variant: multipliers of width and depth, dropout, whether it is Lite, options of normalisations, sizes."""

    width: float
    depth: float
    dropout: float
    lite: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    stem: int = 32
    head: int = 1280
    stages: tuple[Stage, ...] = _STAGES


# Multipliers and dropout as in the authors' efficientnet_builder.py and lite/efficientnet_lite_builder.py.
VARIANTS = {
    "b0": Row(1.0, 1.0, 0.2),  # 224 pixels
    "b1": Row(1.0, 1.1, 0.2),  # 240
    "b2": Row(1.1, 1.2, 0.3),  # 260
    "b3": Row(1.2, 1.4, 0.3),  # 300
    "b4": Row(1.4, 1.8, 0.4),  # 380
    "b5": Row(1.6, 2.2, 0.4, False, 0.99, 1e-3),  # 456
    "b6": Row(1.8, 2.6, 0.5, False, 0.99, 1e-3),  # 528
    "b7": Row(2.0, 3.1, 0.5, False, 0.99, 1e-3),  # 600
    "lite0": Row(1.0, 1.0, 0.2, True),  # 224
    "lite1": Row(1.0, 1.1, 0.2, True),  # 240
    "lite2": Row(1.1, 1.2, 0.3, True),  # 260
    "lite3": Row(1.2, 1.4, 0.3, True),  # 280
    "lite4": Row(1.4, 1.8, 0.3, True),  # 300
    "tiny": Row(1.0, 1.0, 0.2, stem=8, head=64, stages=_TINY),
}


class MBConv(nn.Module):
    """A block: expand, depthwise, squeeze and excite, project.

    `inputs`: the channels of the input according to the network's options. `residual`: whether the block adds its input.
    `skip`: the rate at which a sample skips the block.
    """

    row: Row
    stage: Stage
    inputs: int
    strides: int
    skip: float
    residual: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = _unit(self.row, self.options, train)
        stage, y = self.stage, x
        if stage.expand != 1:
            y = unit(y, self.inputs * stage.expand, 1, name="expand")
        wide = y.shape[-1]
        y = unit(y, wide, stage.kernel, self.strides, groups=wide, name="depthwise")
        if not self.row.lite:
            # A quarter of the block's input channels, not of the channels inside.
            y = SqueezeExcite(self.inputs // 4, nn.swish, name="squeeze_excite")(y)
        y = unit(y, stage.features, 1, activation=None, name="project")
        if not self.residual:
            return y
        y = Dropout(self.skip, broadcast_dims=(1, 2, 3))(y, train=train)
        return residual_sum(x, y, self, "project")


class EfficientNet(nn.Module):
    """The EfficientNet network; attributes as in `make`. Endpoints: conv1, stage2, … stage8 (the stages of Table 1), head."""

    row: Row
    num_classes: int | None
    stochastic_depth: float
    stem_strides: tuple[int, int]
    options: UnitOptions = UNIT

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the mean of the last feature map, float32 [b, d], takes the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row, number = self.row, 0
        unit = _unit(row, self.options, train)
        y = unit(x, row.stem, 3, self.stem_strides, name="conv1")
        endpoints, channels = {"conv1": y}, row.stem
        blocks = sum(stage.blocks for stage in row.stages)
        for index, stage in enumerate(row.stages, 2):
            for block in range(stage.blocks):
                strides = 1 if block else stage.strides
                skip = self.stochastic_depth * number / blocks
                name = f"stage{index}_{block + 1}"
                residual = strides == 1 and channels == stage.features
                y = MBConv(
                    row,
                    stage,
                    channels,
                    strides,
                    skip,
                    residual,
                    self.options,
                    name=name,
                )(y, train=train)
                number, channels = number + 1, stage.features
            endpoints[f"stage{index}"] = y
        y = endpoints["head"] = unit(y, row.head, 1, name="head")
        y = global_mean(y)
        if self.num_classes is None:
            return y, endpoints
        y = Dropout(row.dropout)(y, train=train)
        # Uniform with a bound of 1 / sqrt(outputs).
        init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        classifier = Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=init,
            fixed=True,
            name="classifier",
        )
        return classifier(y), endpoints


def _unit(row: Row, options: UnitOptions, train: bool):
    """Returns `conv_norm` with a variant's activation and options."""
    return partial(
        conv_norm,
        activation=nn.relu6 if row.lite else nn.swish,
        options=options,
        train=train,
    )


def make(
    variant: str = "b0",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier | None = None,
    depth: Multiplier | None = None,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    dropout: Rate | None = None,
    stochastic_depth: Rate = 0.2,
    padding: Sides = "symmetric",
    epsilon: Positive | None = None,
) -> EfficientNet:
    """Builds an EfficientNet.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      width: width multiplier that replaces the variant's.
      depth: multiplier of each stage's number of blocks, which is rounded up; replaces the variant's.
      strides: strides of each stage that replace (1, 2, 2, 2, 1, 2, 1); smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier, 0 to 1; None for the variant's. It needs the rng "dropout" in training.
      stochastic_depth: rate at which samples skip a block, 0 to 1. It grows linearly from 0 at the first block to this value
        just after the last one. Each sample draws from the rng "dropout".
      padding, epsilon: see `UnitOptions`; None for the variant's epsilon. Keras' weights, and timm's weights
        whose names start with tf_, need "same" and 1e-3.

    Raises:
      UserError: the variant is unknown, or `strides` does not have one value for each stage.
    """
    row = registry.row(VARIANTS, variant, "variant of efficientnet")
    strides = stage_strides(strides, [s.strides for s in row.stages])
    width = row.width if width is None else width
    depth = row.depth if depth is None else depth
    stages, last = [], len(row.stages) - 1
    for index, (stage, s) in enumerate(zip(row.stages, strides, strict=True)):
        blocks = stage.blocks
        if not row.lite or 0 < index < last:
            blocks = math.ceil(blocks * depth)
        features = scaled(stage.features, width)
        stages.append(stage._replace(features=features, blocks=blocks, strides=s))
    row = row._replace(
        width=width,
        depth=depth,
        dropout=row.dropout if dropout is None else dropout,
        stem=row.stem if row.lite else scaled(row.stem, width),
        head=row.head if row.lite else scaled(row.head, width),
        stages=tuple(stages),
    )
    epsilon = row.epsilon if epsilon is None else epsilon
    options = UnitOptions(padding, epsilon, row.momentum)
    stem_strides = per_axis(stem_strides)
    return EfficientNet(row, num_classes, stochastic_depth, stem_strides, options)


def torchvision_names(net: EfficientNet) -> dict[str, str]:
    """Returns {our layer: its name in torchvision's checkpoints}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=net.row.epsilon)
    foreign.check_options("torchvision", net.options._asdict(), published)
    names = {"classifier": "classifier.1"}

    def add(ours, theirs):
        names.update({ours: f"{theirs}.0", f"{ours}_norm": f"{theirs}.1"})

    add("conv1", "features.0")
    for index, stage in enumerate(net.row.stages, 1):
        for block in range(stage.blocks):
            ours, theirs = f"stage{index + 1}_{block + 1}", f"features.{index}.{block}"
            units = ["expand"] if stage.expand != 1 else []
            for position, unit in enumerate([*units, "depthwise", "excite", "project"]):
                if unit != "excite":
                    add(f"{ours}/{unit}", f"{theirs}.block.{position}")
                elif not net.row.lite:
                    excite = f"{ours}/squeeze_excite"
                    names[f"{excite}/reduce"] = f"{theirs}.block.{position}.fc1"
                    names[f"{excite}/expand"] = f"{theirs}.block.{position}.fc2"
    add("head", f"features.{len(net.row.stages) + 1}")
    return names


def timm_names(net: EfficientNet) -> dict[str, str]:
    """Returns {our layer: its name in timm's checkpoints}, also for Lite.

    Raises:
      UserError: another padding or epsilon.
    """
    published = dict(padding="symmetric", epsilon=1e-5)
    converted = dict(padding="same", epsilon=1e-3)  # weights named tf_efficientnet
    foreign.check_options("timm", net.options._asdict(), published, converted)
    names = _timm.stem_and_head()
    for index, stage in enumerate(net.row.stages):
        for block in range(stage.blocks):
            names |= _timm.bottleneck(
                f"stage{index + 2}_{block + 1}",
                f"blocks.{index}.{block}",
                expand=stage.expand != 1,
                excite=not net.row.lite,
            )
    return names


def keras_names(net: EfficientNet) -> dict[str, str]:
    """Returns {our layer: its name in Keras' files}.

    Raises:
      UserError: a Lite variant, which Keras does not have, or other options than Keras'.
    """
    if net.row.lite:
        raise UserError(
            "config.init.names = 'keras': Keras has no EfficientNet Lite: use a variant b0 to b7"
        )
    published = dict(padding="same", epsilon=1e-3)
    foreign.check_options("keras", net.options._asdict(), published)
    names = dict(conv1="stem_conv", conv1_norm="stem_bn", head="top_conv")
    names |= dict(head_norm="top_bn", classifier="predictions")
    for index, stage in enumerate(net.row.stages):
        for block in range(stage.blocks):
            ours = f"stage{index + 2}_{block + 1}"
            theirs = f"block{index + 1}{chr(ord('a') + block)}_"
            units = {"depthwise": ("dwconv", "bn")}
            units["project"] = ("project_conv", "project_bn")
            if stage.expand != 1:
                units["expand"] = ("expand_conv", "expand_bn")
            for unit, (conv, norm) in units.items():
                names[f"{ours}/{unit}"] = theirs + conv
                names[f"{ours}/{unit}_norm"] = theirs + norm
            for unit in ("reduce", "expand"):
                names[f"{ours}/squeeze_excite/{unit}"] = f"{theirs}se_{unit}"
    return names
