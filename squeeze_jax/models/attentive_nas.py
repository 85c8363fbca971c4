"""AttentiveNAS' space: seven stages of inverted residuals whose channels, depth, kernel and expansion are elastic.

Wang, Li, Gong, Chandra 2020, arXiv 2011.09011, Table 1; the space is close to that of BigNAS (Yu et al. 2020, arXiv 2003.11142).
All blocks of a stage have one kernel and one expansion. Each block has a shortcut: its input, or the means over its strides,
through a 1x1 convolution where the channels differ. The activation is swish, and the last stage is that of MobileNetV3.
Images are NHWC.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models.ofa_mobilenet_v3 import Head, Stem
from squeeze_jax.nn.blocks import (
    Sides,
    SqueezeExcite,
    UnitOptions,
    conv_norm,
    residual_sum,
    stage_strides,
)
from squeeze_jax.nn.chain import Chain, Classifier, Piece
from squeeze_jax.nn.conv import Conv, per_axis
from squeeze_jax.nn.elastic import one_per_position
from squeeze_jax.nn.pool import window_mean
from squeeze_jax.nn.resolution import resize_pieces, resolution_choices
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Positive, Rate, Strides

CLASSIFIER = ("classifier",)  # the layers that depend on the classes

_HEAD_EXPAND = 6  # channels before the global mean, per channel of the last stage


class Stage(NamedTuple):
    """A stage: choices of its channels, depth and expansion, strides of its first block, and excitation."""

    features: tuple[int, ...]
    depth: tuple[int, ...]
    expand: tuple[int, ...]
    strides: int
    excite: bool


class Row(NamedTuple):
    """A variant: choices of the channels of the stem and of the layer after the global mean, kernels, and the stages."""

    stem: tuple[int, ...]
    hidden: tuple[int, ...]
    kernel: tuple[int, ...]
    stages: tuple[Stage, ...]


_STAGES = (  # Table 1
    Stage((16, 24), (1, 2), (1,), 1, False),
    Stage((24, 32), (3, 4, 5), (4, 5, 6), 2, False),
    Stage((32, 40), (3, 4, 5, 6), (4, 5, 6), 2, True),
    Stage((64, 72), (3, 4, 5, 6), (4, 5, 6), 2, False),
    Stage((112, 120, 128), (3, 4, 5, 6, 7, 8), (4, 5, 6), 1, True),
    Stage((192, 200, 208, 216), (3, 4, 5, 6, 7, 8), (6,), 2, True),
    Stage((216, 224), (1, 2), (6,), 1, True),
)
_TINY = (
    Stage((8, 16), (1, 2), (1,), 1, False),
    Stage((8, 16), (1, 2), (2, 3), 2, True),
)

VARIANTS = {
    "imagenet": Row((16, 24), (1792, 1984), (3, 5), _STAGES),
    "tiny": Row((8, 16), (24, 32), (3, 5), _TINY),
}


class Block(nn.Module):
    """An inverted residual with a shortcut.

    `inputs`: the channels of the input according to the network's options. `residual`: whether the shortcut is the input
    itself.
    """

    inputs: int
    expand: int
    features: int
    kernel: int
    strides: int
    excite: bool
    residual: bool
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', features]."""
        unit = partial(conv_norm, options=self.options, train=train)
        wide = partial(unit, activation=nn.silu)
        y = x
        if self.expand != self.inputs:
            y = wide(y, self.expand, 1, name="expand")
        inside = y.shape[-1]
        y = wide(y, inside, self.kernel, self.strides, groups=inside, name="depthwise")
        if self.excite:
            squeezed = scaled(self.expand, 0.25)
            y = SqueezeExcite(squeezed, gate=nn.hard_sigmoid, name="squeeze_excite")(y)
        y = unit(y, self.features, 1, name="project")
        if not self.residual:
            x = window_mean(x, self.strides)
        if self.inputs != self.features:
            shortcut = partial(Conv, use_bias=False, dtype=y.dtype, name="shortcut")
            x = shortcut(self.features, (1, 1))(x)
        return residual_sum(x, y, self, "project")


class AttentiveNas(Chain):
    """A network of the space; attributes and endpoints as in `Chain`."""


def make(
    variant: str = "imagenet",
    *,
    num_classes: Count | None = 1000,
    features: tuple[Count, ...] | None = None,
    kernel: tuple[Count, ...] | Count | None = None,
    expand: tuple[Positive, ...] | Positive | None = None,
    depth: tuple[Count, ...] | Count | None = None,
    resolutions: tuple[Count, ...] = (),
    resolution: tuple[Count, ...] | Count | None = None,
    strides: tuple[Strides, ...] | None = None,
    stem_strides: Strides | tuple[Strides, ...] = 2,
    dropout: Rate = 0.2,
    padding: Sides = "symmetric",
    epsilon: Positive = 1e-5,
) -> AttentiveNas:
    """Builds a network of the space.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for no classifier.
      features: channels of the stem, of each stage, and of the layer after the global mean; None for the largest.
      kernel: side of the depthwise kernels: one for all stages, or one for each; None for the largest.
      expand: ratio of the channels inside a block to those of its input, likewise.
      depth: number of blocks of each stage, likewise.
      resolutions: image sizes among which `resolution` chooses, ascending; the paper has (192, 224, 256, 288). () for
        images that keep their size.
      resolution: images are resized to this size; None for the largest of `resolutions`.
      strides: strides of each stage that replace (1, 2, 2, 2, 1, 2, 1); smaller ones for small images.
      stem_strides: strides of the first convolution.
      dropout: dropout rate before the classifier.
      padding, epsilon: see `UnitOptions`.

    Raises:
      UserError: the variant is unknown, or an option has the wrong number of values or a value outside the space.
    """
    row = registry.row(VARIANTS, variant, "variant of attentive_nas")
    resolution_choices(resolutions, resolution)
    given = dict(features=features, kernel=kernel, expand=expand, depth=depth)
    space = elastic(variant, resolutions)
    values = one_per_position(space, given | dict(resolution=resolution))
    strides = stage_strides(strides, [s.strides for s in row.stages])
    options = UnitOptions(padding, epsilon, momentum=0.9)
    channels, *of_stages, hidden = values["features"]
    pieces = resize_pieces(values.get("resolution", ()))
    stem = Stem(channels, per_axis(stem_strides), nn.silu, options)
    pieces.append(Piece("stem", stem))
    for index, (stage, stride) in enumerate(zip(row.stages, strides, strict=True)):
        wide = of_stages[index]
        for block in range(values["depth"][index]):
            step = stride if block == 0 else 1
            residual = step == 1 and channels == wide
            module = Block(
                channels,
                scaled(channels, values["expand"][index]),
                wide,
                values["kernel"][index],
                step,
                stage.excite,
                residual,
                options,
            )
            pieces.append(Piece(f"stage{index + 1}_block{block + 1}", module))
            channels = wide
    head = Head(_HEAD_EXPAND * channels, hidden, options, nn.silu)
    pieces.append(Piece("head", head))
    if num_classes is not None:
        pieces.append(Piece("classifier", Classifier(num_classes, dropout)))
    return AttentiveNas(tuple(pieces))


def elastic(
    variant: str = "imagenet", resolutions: tuple[int, ...] = (), **_
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the space: for each elastic option of `make`, the choices of each of its values, in ascending order."""
    row = registry.row(VARIANTS, variant, "variant of attentive_nas")
    return {
        "features": (row.stem, *(s.features for s in row.stages), row.hidden),
        "kernel": (row.kernel,) * len(row.stages),
        "expand": tuple(s.expand for s in row.stages),
        "depth": tuple(s.depth for s in row.stages),
        **resolution_choices(resolutions),
    }
