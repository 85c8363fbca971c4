"""Once-for-all's space of MobileNetV3: five stages of bottlenecks, each bottleneck with its own kernel and expansion.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.1. Each network of the space is an ordinary network. A stage has
two to four bottlenecks, and each of them has a 3x3, 5x5 or 7x7 depthwise convolution and an expansion ratio of 3, 4 or 6.
The weights of the largest network serve all 2.2e19 of them, see `nas/subnetwork.py`. Stages have the widths, strides,
activations and excitations of MobileNetV3-Large. Images are NHWC.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models import _once_for_all
from squeeze_jax.models.mobilenet_v3 import Bottleneck
from squeeze_jax.nn.blocks import Sides, UnitOptions, conv_norm, stage_strides
from squeeze_jax.nn.chain import Chain, Classifier, Piece
from squeeze_jax.nn.conv import Conv, per_axis
from squeeze_jax.nn.elastic import one_per_position
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.resolution import resize_pieces, resolution_choices
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Positive, Rate, Strides
from squeeze_jax.weights import foreign

CLASSIFIER = ("classifier",)  # the layers that depend on the classes
APART = _once_for_all.APART


class Stage(NamedTuple):
    """A stage: output channels, strides of its first block, excitation, and activation."""

    features: int
    strides: int
    excite: bool
    activation: Callable


class Row(NamedTuple):
    """A variant: width multiplier, features of the stem and of the two last convolutions, the stages, choices.

    Attributes:
      width: multiplies all channel counts.
      stem: channels of the stem and of the first block.
      head: channels before the global mean.
      hidden: channels after the global mean.
      stages: the stages after the first block.
      choices: {option: its values}, for each block or stage.
    """

    width: float
    stem: int
    head: int
    hidden: int
    stages: tuple[Stage, ...]
    choices: dict[str, tuple[int, ...]]


_STAGES = (  # the widths of MobileNetV3-Large
    Stage(24, 2, False, nn.relu),
    Stage(40, 2, True, nn.relu),
    Stage(80, 2, False, nn.hard_swish),
    Stage(112, 1, True, nn.hard_swish),
    Stage(160, 2, True, nn.hard_swish),
)
_CIFAR = (  # for images of 32 pixels, with `stem_strides=1`: 16, 8 and 4 pixels
    Stage(24, 2, False, nn.relu),
    Stage(40, 2, True, nn.hard_swish),
    Stage(80, 2, True, nn.hard_swish),
)
_TINY = (Stage(16, 1, False, nn.relu), Stage(16, 2, True, nn.hard_swish))
_CHOICES = {"kernel": (3, 5, 7), "expand": (3, 4, 6), "depth": (2, 3, 4)}
_MIXED = {"kernel": (3, 5), "expand": (2, 4, 6), "depth": (1, 2, 3)}
_FEW = {"kernel": (3, 5), "expand": (2, 3), "depth": (1, 2)}

VARIANTS = {  # w1.0 and w1.2: the width multipliers of the authors' published weights
    "w1.0": Row(1.0, 16, 960, 1280, _STAGES, _CHOICES),
    "w1.2": Row(1.2, 16, 960, 1280, _STAGES, _CHOICES),
    "cifar": Row(1.0, 16, 480, 640, _CIFAR, _MIXED),
    "tiny": Row(1.0, 8, 48, 64, _TINY, _FEW),
}


class Stem(nn.Module):
    """The first convolution: [b, h, w, c] → [b, h', w', features]."""

    features: int
    strides: tuple[int, int]
    activation: Callable
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the convolution to images."""
        return conv_norm(
            check_images(x, "the stem"),
            self.features,
            3,
            self.strides,
            activation=self.activation,
            options=self.options,
            train=train,
            name="conv",
        )


class Head(nn.Module):
    """The last stage of MobileNetV3: a convolution, the global mean, and a layer: [b, h, w, c] → [b, hidden]."""

    features: int
    hidden: int
    options: UnitOptions
    activation: Callable = nn.hard_swish

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the three layers."""
        y = conv_norm(
            x,
            self.features,
            1,
            activation=self.activation,
            options=self.options,
            train=train,
            name="expand",
        )
        y = global_mean(y)[:, None, None].astype(y.dtype)
        y = Conv(self.hidden, (1, 1), use_bias=False, dtype=y.dtype, name="mix")(y)
        return self.activation(y)[:, 0, 0]


class OfaMobileNetV3(Chain):
    """A network of the space; attributes and endpoints as in `Chain`."""


def make(
    variant: str = "w1.0",
    *,
    num_classes: Count | None = 1000,
    kernel: tuple[Count, ...] | Count | None = None,
    expand: tuple[Positive, ...] | Positive | None = None,
    depth: tuple[Count, ...] | Count | None = None,
    resolutions: tuple[Count, ...] = (),
    resolution: tuple[Count, ...] | Count | None = None,
    width: Multiplier | None = None,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    dropout: Rate = 0.1,
    padding: Sides = "symmetric",
    epsilon: Positive = 1e-5,
) -> OfaMobileNetV3:
    """Builds a network of the space.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      kernel: side of the depthwise kernel: one for all blocks, or one for each block of the largest network; None for
        the largest.
      expand: ratio of the channels inside a block to those of its input, likewise.
      depth: number of blocks: one for all stages, or one for each; None for the largest. Values of `kernel` and
        `expand` for blocks beyond it are not used.
      resolutions: image sizes among which `resolution` chooses, ascending; () for images that keep their size.
      resolution: images are resized to this size; None for the largest of `resolutions`.
      width: width multiplier that replaces the variant's.
      strides: strides of each stage that replace (2, 2, 2, 1, 2); smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier.
      padding, epsilon: see `UnitOptions`.

    Raises:
      UserError: the variant is unknown, or an option has the wrong number of values.
    """
    row = registry.row(VARIANTS, variant, "variant of ofa_mobilenet_v3")
    resolution_choices(resolutions, resolution)
    given = dict(kernel=kernel, expand=expand, depth=depth, resolution=resolution)
    values = one_per_position(elastic(variant, resolutions), given)
    strides = stage_strides(strides, [s.strides for s in row.stages])
    width = row.width if width is None else width
    options = UnitOptions(padding, epsilon, momentum=0.9)
    channels = scaled(row.stem, width)
    stem = Stem(channels, per_axis(stem_strides), nn.hard_swish, options)
    pieces = resize_pieces(values.get("resolution", ()))
    pieces.append(Piece("stem", stem))
    first = Bottleneck(
        channels, channels, channels, 3, 1, False, nn.relu, True, options
    )
    pieces.append(Piece("first", first))
    longest = max(row.choices["depth"])
    for index, (stage, stride) in enumerate(zip(row.stages, strides, strict=True)):
        features = scaled(stage.features, width)
        for block in range(values["depth"][index]):
            place = index * longest + block
            step = stride if block == 0 else 1
            bottleneck = Bottleneck(
                channels,
                scaled(channels, values["expand"][place]),
                features,
                values["kernel"][place],
                step,
                stage.excite,
                stage.activation,
                residual=step == 1 and channels == features,
                options=options,
            )
            pieces.append(Piece(f"stage{index + 1}_block{block + 1}", bottleneck))
            channels = features
    head = scaled(row.head, width), scaled(row.hidden, width)
    pieces.append(Piece("head", Head(*head, options)))
    if num_classes is not None:
        pieces.append(Piece("classifier", Classifier(num_classes, dropout)))
    return OfaMobileNetV3(tuple(pieces))


def elastic(
    variant: str = "w1.0", resolutions: tuple[int, ...] = (), **_
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the space: for each elastic option of `make`, the choices of each of its values, in ascending order."""
    row = registry.row(VARIANTS, variant, "variant of ofa_mobilenet_v3")
    stages, choices = len(row.stages), row.choices
    blocks = stages * max(choices["depth"])
    return {
        "kernel": (choices["kernel"],) * blocks,
        "expand": (choices["expand"],) * blocks,
        "depth": (choices["depth"],) * stages,
        **resolution_choices(resolutions),
    }


def released_names(net: OfaMobileNetV3) -> dict[str, str | tuple[str, ...]]:
    """Returns {our layer: its possible names in the authors' files}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-5)
    stem = next(p.module for p in net.pieces if p.name == "stem")
    foreign.check_options("released", stem.options._asdict(), published)
    names = _once_for_all.unit("stem/conv", "first_conv")
    names |= _once_for_all.bottlenecks(_once_for_all.blocks(net))
    names |= _once_for_all.unit("head/expand", "final_expand_layer")
    names["head/mix"] = "feature_mix_layer.conv"
    names["classifier"] = "classifier.linear"
    return names
