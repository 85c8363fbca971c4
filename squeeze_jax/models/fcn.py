"""FCN: class scores for every pixel, from convolutions alone.

Long, Shelhamer, Darrell 2015, arXiv 1411.4038. The backbone ends at 1/32 of the image's size. A 1x1 convolution scores the
classes there, and bilinear interpolation enlarges the scores to the image's size (FCN-32s). FCN-16s adds the scores of
stage 4, at 1/16, to the interpolated ones, and FCN-8s those of stage 3, at 1/8 (section 4.2), which sharpens outlines.

The paper's backbone is VGG-16; this one is small: 3x3 convolutions with batch normalisation, the first of each stage
with strides 2. The paper learns the kernels of its upsampling, which are initialised as bilinear interpolation; here they
are fixed. `dilated` keeps the last stages at the size of the stage before them and dilates their kernels instead (Yu, Koltun
2016, arXiv 1511.07122). So outputs have the same receptive field at a finer resolution. Images are NHWC.
"""

from typing import Annotated, NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn import resize
from squeeze_jax.nn.blocks import conv_norm
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Range

INPUTS = "images"
CLASSIFIER = ("score3", "score4", "score5")  # the layers that depend on the classes


class Row(NamedTuple):
    """A variant: features and number of convolutions of stage1, stage2, …, and the stages that are scored, last first."""

    features: tuple[int, ...]
    depths: tuple[int, ...]
    scored: tuple[int, ...]


_FEATURES, _DEPTHS = (16, 32, 64, 96, 128), (1, 1, 2, 2, 2)

VARIANTS = {  # Figure 3 of the paper: which stages are scored
    "32s": Row(_FEATURES, _DEPTHS, (5,)),
    "16s": Row(_FEATURES, _DEPTHS, (5, 4)),
    "8s": Row(_FEATURES, _DEPTHS, (5, 4, 3)),
    "tiny": Row((8, 8, 12, 16, 16), (1, 1, 1, 1, 1), (5, 4, 3)),
}


class Stage(nn.Module):
    """A stage of 3x3 convolutions; the first has the strides, and the others have the stage's dilation."""

    features: int
    depth: int
    strides: int
    first_dilation: int
    dilation: int

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        for number in range(1, self.depth + 1):
            x = conv_norm(
                x,
                self.features,
                3,
                self.strides if number == 1 else 1,
                dilation=self.first_dilation if number == 1 else self.dilation,
                activation=nn.relu,
                train=train,
                name=f"conv{number}",
            )
        return x


class FCN(nn.Module):
    """The FCN network; attributes as in `make`. Endpoints: stage1 … stage5, and score5 … (before interpolation)."""

    row: Row
    num_classes: int | None
    dilated: int

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, h, w, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c]."""
        x = check_images(x, type(self).__name__)
        size, endpoints, dilation = x.shape[1:3], {}, 1
        count = len(self.row.features)
        for number, features, depth in zip(
            range(1, count + 1), self.row.features, self.row.depths, strict=True
        ):
            first, strides = dilation, 2
            if number > count - self.dilated:
                strides, dilation = 1, dilation * 2
            stage = Stage(
                features, depth, strides, first, dilation, name=f"stage{number}"
            )
            endpoints[f"stage{number}"] = x = stage(x, train=train)
        if self.num_classes is None:
            return x, endpoints
        total = None
        for number in self.row.scored:
            stage = endpoints[f"stage{number}"]
            scores = Conv(
                self.num_classes,
                (1, 1),
                dtype=stage.dtype,
                kernel_init=nn.initializers.normal(0.01),
                name=f"score{number}",
            )(stage)
            endpoints[f"score{number}"] = scores
            if total is not None:
                scores += resize.bilinear(total, scores.shape[1:3])
            total = scores
        return resize.bilinear(total.astype("float32"), size), endpoints


def make(
    variant: str = "8s",
    *,
    num_classes: Count | None = 21,
    width: Multiplier = 1.0,
    dilated: Annotated[int, Range(0, 2)] = 0,
) -> FCN:
    """Builds a fully convolutional network.

    Args:
      variant: a row of VARIANTS.
      num_classes: channels of the logits; 21 for PASCAL VOC, which the paper reports. None for no scores: the feature
        map of the last stage then takes the place of the logits.
      width: multiplies the features of all stages.
      dilated: number of last stages that keep the size of the feature map and dilate their kernels instead: 0, 1 or 2.

    Raises:
      UserError: the variant is unknown, or `dilated` is not 0, 1 or 2.
    """
    row = registry.row(VARIANTS, variant, "variant of fcn")
    if dilated not in (0, 1, 2):
        raise UserError(f"config.model.dilated = {dilated} should be 0, 1 or 2")
    features = tuple(scaled(f, width, 4) for f in row.features)
    return FCN(row._replace(features=features), num_classes, dilated)
