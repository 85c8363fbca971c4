"""Once-for-all's space of ResNet-50: bottlenecks of elastic width in four stages of elastic width and depth.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, and the authors' code; ResNet-D's stem and shortcuts: He, Zhang, Zhang, Zhang,
Xie, Li 2018, arXiv 1812.01187. The stem has three 3x3 convolutions, of which the second has a shortcut and may be absent. A
shortcut with strides is a mean over the window and a 1x1 convolution. Images are NHWC.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models import _once_for_all
from squeeze_jax.nn.blocks import UnitOptions, conv_norm, residual_sum
from squeeze_jax.nn.chain import Chain, Classifier, Piece
from squeeze_jax.nn.elastic import one_per_position
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean, max_pool, window_mean
from squeeze_jax.nn.resolution import resize_pieces, resolution_choices
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Part, Positive, Rate, Whole
from squeeze_jax.weights import foreign

CLASSIFIER = ("classifier",)  # the layers that depend on the classes
APART = _once_for_all.APART


class Row(NamedTuple):
    """A variant.

    Attributes:
      stem: channels after the stem at width 1.
      features: channels of each stage at width 1.
      blocks: smallest number of blocks of each stage.
      pool: whether max pooling follows the stem.
      choices: {option: its values}.
    """

    stem: int
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    pool: bool
    choices: dict[str, tuple[float, ...]]


_CHOICES = {"depth": (0, 1, 2), "expand": (0.2, 0.25, 0.35), "stage_width": (0.65, 0.8, 1.0)}  # fmt: skip
_FEW = {"depth": (0, 1), "expand": (0.25, 0.5), "stage_width": (0.5, 1.0)}

VARIANTS = {
    "50": Row(64, (256, 512, 1024, 2048), (2, 2, 4, 2), True, _CHOICES),
    "tiny": Row(16, (32, 32), (1, 1), False, _FEW),
}


class Stem(nn.Module):
    """Three 3x3 convolutions and max pooling: [b, h, w, c] → [b, h / 4, w / 4, features].

    `middle`: channels of the first two. `extra`: whether the second is there. `pool`: whether the stem has strides.
    """

    middle: int
    features: int
    extra: bool
    pool: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the stem to images."""
        x = check_images(x, "ofa_resnet")
        unit = partial(conv_norm, activation=nn.relu, options=self.options, train=train)
        y = unit(x, self.middle, 3, 2 if self.pool else 1, name="conv1")
        if self.extra:
            y = residual_sum(y, unit(y, self.middle, 3, name="conv2"), self, "conv2")
        y = unit(y, self.features, 3, name="conv3")
        return max_pool(y, 3, 2, padding=1) if self.pool else y


class Bottleneck(nn.Module):
    """A bottleneck: 1x1, 3x3 with the strides, 1x1, and a shortcut, which is the input itself if `residual`."""

    middle: int
    features: int
    strides: int
    residual: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', features]."""
        unit = partial(conv_norm, options=self.options, train=train)
        y = unit(x, self.middle, 1, activation=nn.relu, name="conv1")
        y = unit(y, self.middle, 3, self.strides, activation=nn.relu, name="conv2")
        y = unit(y, self.features, 1, name="conv3")
        if not self.residual:
            x = window_mean(x, self.strides)
            x = unit(x, self.features, 1, name="shortcut")
        return nn.relu(residual_sum(x, y, self, "conv3"))


class Head(nn.Module):
    """The global mean: [b, h, w, c] → [b, c]."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Returns the means over all positions."""
        del train
        return global_mean(x).astype(x.dtype)


class OfaResNet(Chain):
    """A network of the space; attributes and endpoints as in `Chain`."""


def make(
    variant: str = "50",
    *,
    num_classes: Count | None = 1000,
    depth: tuple[Whole, ...] | Whole | None = None,
    expand: tuple[Positive, ...] | Positive | None = None,
    stage_width: tuple[Part, ...] | Part | None = None,
    stem_block: tuple[Whole, ...] | Whole | None = None,
    resolutions: tuple[Count, ...] = (),
    resolution: tuple[Count, ...] | Count | None = None,
    dropout: Rate = 0.0,
    epsilon: Positive = 1e-5,
) -> OfaResNet:
    """Builds a network of the space.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      depth: number of blocks of each stage beyond the smallest number: one value for all stages, or one for each; None for
        the largest.
      expand: ratio of the channels inside a block to those of its output, for each block of the largest network, likewise.
      stage_width: width multiplier of the stem's middle, the stem's output and each stage, likewise.
      stem_block: 1 for a stem with its second convolution, 0 without.
      resolutions: image sizes among which `resolution` chooses, ascending; () for images that keep their size.
      resolution: images are resized to this size; None for the largest of `resolutions`.
      dropout: dropout rate before the classifier.
      epsilon: see `UnitOptions`.

    Raises:
      UserError: the variant is unknown, or an option has the wrong number of values or a value outside the space.
    """
    row = registry.row(VARIANTS, variant, "variant of ofa_resnet")
    given = dict(depth=depth, expand=expand, stage_width=stage_width)
    given |= dict(stem_block=stem_block, resolution=resolution)
    resolution_choices(resolutions, resolution)
    values = one_per_position(elastic(variant, resolutions), given)
    options = UnitOptions("symmetric", epsilon, momentum=0.9)
    of_middle, of_stem, *of_stages = values["stage_width"]
    middle = scaled(scaled(row.stem, of_middle) // 2, 1.0)
    channels = scaled(row.stem, of_stem)
    extra = bool(values["stem_block"][0])
    pieces = resize_pieces(values.get("resolution", ()))
    pieces.append(Piece("stem", Stem(middle, channels, extra, row.pool, options)))
    place, longest = 0, max(row.choices["depth"])
    for index, (blocks, width) in enumerate(zip(row.blocks, of_stages, strict=True)):
        features = scaled(row.features[index], width)
        for block in range(blocks + values["depth"][index]):
            strides = 2 if index and not block else 1
            inside = scaled(round(features * values["expand"][place + block]), 1.0)
            residual = block > 0
            bottleneck = Bottleneck(inside, features, strides, residual, options)
            pieces.append(Piece(f"stage{index + 1}_block{block + 1}", bottleneck))
        place += blocks + longest
        channels = features
    pieces.append(Piece("head", Head()))
    if num_classes is not None:
        pieces.append(Piece("classifier", Classifier(num_classes, dropout)))
    return OfaResNet(tuple(pieces))


def elastic(
    variant: str = "50", resolutions: tuple[int, ...] = (), **_
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Returns the space: for each elastic option of `make`, the choices of each of its values, in ascending order."""
    row = registry.row(VARIANTS, variant, "variant of ofa_resnet")
    longest, stages = max(row.choices["depth"]), len(row.blocks)
    return {
        "depth": (row.choices["depth"],) * stages,
        "expand": (row.choices["expand"],) * (sum(row.blocks) + stages * longest),
        "stage_width": (row.choices["stage_width"],) * (stages + 2),
        "stem_block": ((0, 1),),
        **resolution_choices(resolutions),
    }


def released_names(net: OfaResNet) -> dict[str, str | tuple[str, ...]]:
    """Returns {our layer: its possible names in the authors' files}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-5)
    stem = next(p.module for p in net.pieces if p.name == "stem")
    foreign.check_options("released", stem.options._asdict(), published)
    convs = {"conv1": "0", "conv2": "1.conv", "conv3": "2"}
    if not stem.extra:
        convs = {"conv1": "0", "conv3": "1"}
    names = {}
    for ours, theirs in convs.items():
        names |= _once_for_all.unit(f"stem/{ours}", f"input_stem.{theirs}")
    for number, block in enumerate(_once_for_all.blocks(net)):
        layers = {f"conv{n}": f"conv{n}" for n in (1, 2, 3)}
        if not block.module.residual:
            layers["shortcut"] = "downsample"
        for ours, theirs in layers.items():
            names |= _once_for_all.unit(
                f"{block.name}/{ours}", f"blocks.{number}.{theirs}"
            )
    names["classifier"] = ("classifier.linear.linear", "classifier.linear")
    return names
