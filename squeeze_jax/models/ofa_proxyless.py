"""Once-for-all's space of ProxylessNAS: stages of inverted residuals without excitation, each with its own kernel and expansion.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791; ProxylessNAS: Cai, Zhu, Han 2018, arXiv 1812.00332. The choices are those of
`ofa_mobilenet_v3`; the activation is ReLU6, the last stage has one block, and the classifier follows the global mean directly.
Images are NHWC.
"""

from typing import NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models import _once_for_all
from squeeze_jax.models.mobilenet_v3 import Bottleneck
from squeeze_jax.models.ofa_mobilenet_v3 import Stem
from squeeze_jax.nn.blocks import Sides, UnitOptions, conv_norm, stage_strides
from squeeze_jax.nn.chain import Chain, Classifier, Piece
from squeeze_jax.nn.conv import per_axis
from squeeze_jax.nn.elastic import one_per_position
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.resolution import resize_pieces, resolution_choices
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Positive, Rate, Strides
from squeeze_jax.weights import foreign

CLASSIFIER = ("classifier",)  # the layers that depend on the classes
APART = _once_for_all.APART


class Stage(NamedTuple):
    """A stage: output channels, strides of its first block, and whether it always has one block."""

    features: int
    strides: int
    single: bool = False


class Row(NamedTuple):
    """A variant: width multiplier, channels of the stem, the first block and the last convolution, stages, choices."""

    width: float
    stem: int
    first: int
    head: int
    stages: tuple[Stage, ...]
    choices: dict[str, tuple[int, ...]]


_STAGES = (
    Stage(24, 2),
    Stage(40, 2),
    Stage(80, 2),
    Stage(96, 1),
    Stage(192, 2),
    Stage(320, 1, single=True),
)
_CHOICES = {"kernel": (3, 5, 7), "expand": (3, 4, 6), "depth": (2, 3, 4)}
_TINY = (Stage(16, 1), Stage(24, 2, single=True))
_FEW = {"kernel": (3, 5), "expand": (2, 3), "depth": (1, 2)}

VARIANTS = {  # 1.3: the width multiplier of the authors' published weights
    "w1.3": Row(1.3, 32, 16, 1280, _STAGES, _CHOICES),
    "tiny": Row(1.0, 8, 8, 64, _TINY, _FEW),
}


class Head(nn.Module):
    """The last convolution and the global mean: [b, h, w, c] → [b, features]."""

    features: int
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the convolution and the mean."""
        y = conv_norm(
            x,
            self.features,
            1,
            activation=nn.relu6,
            options=self.options,
            train=train,
            name="mix",
        )
        return global_mean(y).astype(y.dtype)


class OfaProxyless(Chain):
    """A network of the space; attributes and endpoints as in `Chain`."""


def make(
    variant: str = "w1.3",
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
    epsilon: Positive = 1e-3,
) -> OfaProxyless:
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
      strides: strides of each stage that replace (2, 2, 2, 1, 2, 1); smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier.
      padding, epsilon: see `UnitOptions`.

    Raises:
      UserError: the variant is unknown, or an option has the wrong number of values.
    """
    row = registry.row(VARIANTS, variant, "variant of ofa_proxyless")
    resolution_choices(resolutions, resolution)
    given = dict(kernel=kernel, expand=expand, depth=depth, resolution=resolution)
    values = one_per_position(elastic(variant, resolutions), given)
    strides = stage_strides(strides, [s.strides for s in row.stages])
    width = row.width if width is None else width
    options = UnitOptions(padding, epsilon, momentum=0.9)
    stem, channels = scaled(row.stem, width), scaled(row.first, width)
    common = dict(excite=False, activation=nn.relu6, options=options)
    first = Bottleneck(stem, stem, channels, 3, 1, residual=False, **common)
    pieces = resize_pieces(values.get("resolution", ()))
    pieces += [
        Piece("stem", Stem(stem, per_axis(stem_strides), nn.relu6, options)),
        Piece("first", first),
    ]
    place = 0
    for index, (stage, stride) in enumerate(zip(row.stages, strides, strict=True)):
        features = scaled(stage.features, width)
        for block in range(values["depth"][index]):
            step = stride if block == 0 else 1
            bottleneck = Bottleneck(
                channels,
                scaled(channels, values["expand"][place + block]),
                features,
                values["kernel"][place + block],
                step,
                residual=step == 1 and channels == features,
                **common,
            )
            pieces.append(Piece(f"stage{index + 1}_block{block + 1}", bottleneck))
            channels = features
        place += _longest(row, stage)
    pieces.append(Piece("head", Head(scaled(row.head, width), options)))
    if num_classes is not None:
        pieces.append(Piece("classifier", Classifier(num_classes, dropout)))
    return OfaProxyless(tuple(pieces))


def elastic(
    variant: str = "w1.3", resolutions: tuple[int, ...] = (), **_
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the space: for each elastic option of `make`, the choices of each of its values, in ascending order."""
    row = registry.row(VARIANTS, variant, "variant of ofa_proxyless")
    blocks = sum(_longest(row, stage) for stage in row.stages)
    return {
        "kernel": (row.choices["kernel"],) * blocks,
        "expand": (row.choices["expand"],) * blocks,
        "depth": tuple((1,) if s.single else row.choices["depth"] for s in row.stages),
        **resolution_choices(resolutions),
    }


def _longest(row: Row, stage: Stage) -> int:
    """Returns the largest number of blocks of a stage."""
    return 1 if stage.single else max(row.choices["depth"])


def released_names(net: OfaProxyless) -> dict[str, str | tuple[str, ...]]:
    """Returns {our layer: its possible names in the authors' files}; raises a UserError for another padding or epsilon."""
    published = dict(padding="symmetric", epsilon=1e-3)
    stem = next(p.module for p in net.pieces if p.name == "stem")
    foreign.check_options("released", stem.options._asdict(), published)
    names = _once_for_all.unit("stem/conv", "first_conv")
    names |= _once_for_all.bottlenecks(_once_for_all.blocks(net))
    names |= _once_for_all.unit("head/mix", "feature_mix_layer")
    names["classifier"] = "classifier.linear"
    return names
