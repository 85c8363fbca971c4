"""ShuffleNet: grouped 1x1 convolutions whose groups exchange channels.

Zhang, Zhou, Lin, Sun 2017, arXiv 1707.01083. In a network with depthwise convolutions nearly all computation is in the 1x1
convolutions. Grouped ones cost a fraction, so they can be wider. To mix the groups, the channels are shuffled between the
two 1x1 convolutions of a unit: each group of the second convolution reads channels of all groups of the first. Variants are
"scale-groups": a scale of all widths (at 1.0 chosen for about 140 million multiply-accumulates) and the number of groups.
Images are NHWC.

The paper does not say how to round widths that the groups do not divide, nor whether the classifier has a bias. Here, as in
the authors' code (github.com/megvii-model/ShuffleNet-Series), the classifier has no bias, and the stem has 24 channels at
scale 1.5 and 16 at scale 0.5 with 8 groups. That code supports only 3 and 8 groups. With 2 and 4 groups the channels inside a
unit, a quarter of its output channels, are rounded to the nearest multiple of the groups.
"""

from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn.blocks import conv_norm, residual_sum, stage_strides
from squeeze_jax.nn.conv import per_axis
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean, max_pool, mean_pool
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Rate, Strides

Shuffle = Literal["paper", "released"]

CLASSIFIER = ("classifier",)  # the layers that depend on the classes


class Row(NamedTuple):
    """A variant: groups of the 1x1 convolutions, features of the stem and of stage 2, units and strides of each stage.

    Each stage has twice the features of the previous one.
    """

    groups: int
    stem: int
    features: int
    units: tuple[int, ...] = (4, 8, 4)
    strides: tuple[int, ...] = (2, 2, 2)


VARIANTS = {  # Table 1, and as section 3.3 scales it for Tables 2 and 5
    "0.25-g1": Row(1, 6, 36),
    "0.25-g2": Row(2, 6, 50),
    "0.25-g3": Row(3, 6, 60),
    "0.25-g4": Row(4, 8, 68),
    "0.25-g8": Row(8, 8, 96),
    "0.5-g1": Row(1, 12, 72),
    "0.5-g2": Row(2, 12, 100),
    "0.5-g3": Row(3, 12, 120),
    "0.5-g4": Row(4, 12, 136),
    "0.5-g8": Row(8, 16, 192),
    "1.0-g1": Row(1, 24, 144),
    "1.0-g2": Row(2, 24, 200),
    "1.0-g3": Row(3, 24, 240),
    "1.0-g4": Row(4, 24, 272),
    "1.0-g8": Row(8, 24, 384),
    "1.5-g3": Row(3, 24, 360),
    "1.5-g8": Row(8, 24, 576),
    "2.0-g3": Row(3, 48, 480),
    "2.0-g8": Row(8, 48, 768),
    "tiny": Row(2, 8, 24, (2, 1), (2, 2)),
}


class Unit(nn.Module):
    """A unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, joined with the input; Figure 2(b) and (c).

    `residual`: whether the unit adds its input; the first unit of a stage concatenates it instead. `groups`: those of the
    first and of the second 1x1 convolution. `inputs`: the channels of the input according to the network's options.
    """

    inputs: int
    features: int
    strides: int
    groups: tuple[int, int]
    residual: bool
    shuffle: Shuffle

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = partial(conv_norm, train=train)
        before, groups = self.groups
        narrow = scaled(self.features, 0.25, groups)
        y = nn.relu(unit(x, narrow, 1, groups=before, name="reduce"))
        narrow = y.shape[-1]
        if narrow % groups:
            name = "/".join((*self.path, "reduce"))
            raise UserError(
                f"{name}: {narrow} features do not shuffle into groups = {groups}: choose a multiple"
            )
        y = channel_shuffle(y, groups if self.shuffle == "paper" else narrow // groups)
        y = unit(y, narrow, 3, self.strides, groups=narrow, name="depthwise")
        features = self.features if self.residual else self.features - self.inputs
        y = unit(y, features, 1, groups=groups, name="expand")
        if self.residual:
            return nn.relu(residual_sum(x, y, self, "expand"))
        if self.strides != 1:
            x = mean_pool(x, 3, self.strides, padding=1)
        return nn.relu(jnp.concatenate([x, y], axis=-1))


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Shuffles channels: views [groups * n] as [groups, n] and transposes it; section 3.1. A shuffle with n groups undoes it.

    Args:
      x: [..., c], c a multiple of `groups`.
    """
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


class ShuffleNet(nn.Module):
    """The ShuffleNet network; attributes as in `make`. Endpoints: conv1 (before pooling), stage2, stage3, stage4."""

    row: Row
    num_classes: int | None
    dropout: float
    stem_strides: tuple[int, int]
    stem_pool: bool
    shuffle: Shuffle

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the mean of the last feature map, float32 [b, d], takes the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row = self.row
        y = conv_norm(x, row.stem, 3, self.stem_strides, train=train, name="conv1")
        y = nn.relu(y)
        endpoints, channels = {"conv1": y}, row.stem
        if self.stem_pool:
            y = max_pool(y, 3, 2, padding=1)
        for stage, (units, strides) in enumerate(
            zip(row.units, row.strides, strict=True)
        ):
            for number in range(units):
                first = number == 0
                y = Unit(
                    channels,
                    row.features * 2**stage,
                    strides if first else 1,
                    # The stem has few channels: the first 1x1 convolution after it is not grouped.
                    (1 if first and stage == 0 else row.groups, row.groups),
                    not first,
                    self.shuffle,
                    name=f"stage{stage + 2}_{number + 1}",
                )(y, train=train)
                channels = row.features * 2**stage
            endpoints[f"stage{stage + 2}"] = y
        y = global_mean(y)
        if self.num_classes is None:
            return y, endpoints
        y = Dropout(self.dropout)(y, train=train)
        classifier = Dense(
            self.num_classes,
            use_bias=False,
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(0.01),
            fixed=True,
            name="classifier",
        )
        return classifier(y), endpoints


def make(
    variant: str = "1.0-g3",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier = 1.0,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    stem_pool: bool = True,
    dropout: Rate = 0.0,
    shuffle: Shuffle = "paper",
) -> ShuffleNet:
    """Builds a ShuffleNet.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      width: multiplies all of the variant's channel counts except the number of classes.
      strides: strides of each stage that replace (2, 2, 2); smaller ones for small images.
      stem_strides: strides of the first convolution.
      stem_pool: whether 3x3 max pooling with strides 2 follows that convolution; False for small images.
      dropout: dropout rate before the classifier, 0 to 1; needs the rng "dropout" in training.
      shuffle: "paper" transposes [groups, n] to [n, groups]; "released" transposes the other way, which the authors'
        checkpoints need. In both cases each group reads channels of all groups.

    Raises:
      UserError: the variant is unknown, or `strides` does not have one value for each stage.
    """
    row = registry.row(VARIANTS, variant, "variant of shufflenet")
    strides = stage_strides(strides, row.strides)
    # Both are multiples of the groups, because the first unit computes their difference.
    stem = scaled(row.stem, width, row.groups)
    features = scaled(row.features, width, row.groups)
    row = row._replace(stem=stem, features=features, strides=strides)
    return ShuffleNet(
        row, num_classes, dropout, per_axis(stem_strides), stem_pool, shuffle
    )


def released_names(net: ShuffleNet) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of ShuffleNet-Series}, to be read with shuffle="released"."""
    names = {"conv1": "first_conv.0", "conv1_norm": "first_conv.1"}
    names["classifier"] = "classifier.0"
    number = 0
    for stage, units in enumerate(net.row.units, 2):
        for unit in range(1, units + 1):
            ours, theirs = f"stage{stage}_{unit}", f"features.{number}.branch_main"
            names[f"{ours}/reduce"] = f"{theirs}_1.0"
            names[f"{ours}/reduce_norm"] = f"{theirs}_1.1"
            names[f"{ours}/depthwise"] = f"{theirs}_1.3"
            names[f"{ours}/depthwise_norm"] = f"{theirs}_1.4"
            names[f"{ours}/expand"] = f"{theirs}_2.0"
            names[f"{ours}/expand_norm"] = f"{theirs}_2.1"
            number += 1
    return names
