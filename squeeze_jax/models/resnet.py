"""ResNet: deep residual learning.

He, Zhang, Ren, Sun 2015, arXiv 1512.03385. A block adds its output to its input, so that deep networks can be
trained. Variants differ in the number of blocks of each stage and in the block: two 3x3 convolutions, or a bottleneck
of 1x1, 3x3, 1x1. As in torchvision's checkpoints, the bottleneck's strides are in its 3x3 convolution (called v1.5);
`strided="1x1"` puts them in the first 1x1, where the paper and Keras have them. Images are NHWC.
"""

from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn.blocks import UNIT, UnitOptions, conv_norm, residual_sum
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.pool import global_mean, max_pool
from squeeze_jax.nn.width import scaled
from squeeze_jax.ranges import Count, Multiplier, Positive
from squeeze_jax.weights import foreign

Stem = Literal["imagenet", "cifar"]
Strided = Literal["3x3", "1x1"]

CLASSIFIER = ("classifier",)  # the layers that depend on the classes
# {naming: inputs that its published weights expect and config.data cannot produce}.
EXPECTS = {
    "keras": "channels in the order blue, green, red, minus (103.939, 116.779, 123.68)"
}


class Row(NamedTuple):
    """A variant: whether blocks are bottlenecks, blocks of conv2_x to conv5_x, features of conv2_x's 3x3."""

    bottleneck: bool
    blocks: tuple[int, ...]
    features: int = 64


VARIANTS = {  # Table 1
    "18": Row(False, (2, 2, 2, 2)),
    "34": Row(False, (3, 4, 6, 3)),
    "50": Row(True, (3, 4, 6, 3)),
    "101": Row(True, (3, 4, 23, 3)),
    "152": Row(True, (3, 8, 36, 3)),
    "tiny": Row(True, (1, 1), 8),
}


class Block(nn.Module):
    """A residual block: convolutions (features, kernel) in sequence, and a shortcut; Figure 5.

    `strided`: kernel of the convolution that has the strides; of several the first. `residual`: whether the shortcut is the
    input itself; otherwise it is a 1x1 convolution of the input.
    """

    convs: tuple[tuple[int, int], ...]
    strides: int
    residual: bool
    strided: Strided
    options: UnitOptions

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        unit = partial(conv_norm, options=self.options, train=train)
        kernels = [f"{kernel}x{kernel}" for _, kernel in self.convs]
        strided = kernels.index(self.strided)
        last, y = len(self.convs) - 1, x
        for i, (features, kernel) in enumerate(self.convs):
            strides = self.strides if i == strided else 1
            y = unit(y, features, kernel, strides, name=f"conv{i + 1}")
            y = nn.relu(y) if i < last else y
        if not self.residual:
            x = unit(x, y.shape[-1], 1, self.strides, name="shortcut")
        return nn.relu(residual_sum(x, y, self, f"conv{len(self.convs)}"))


class ResNet(nn.Module):
    """The ResNet network; attributes as in `make`. Endpoints: conv1, conv2, … conv5 (the paper's conv2_x, …)."""

    row: Row
    num_classes: int | None
    stem: Stem
    strided: Strided = "3x3"
    options: UnitOptions = UNIT

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}) for images x [b, h, w, c].

        If `num_classes` is None, the mean of the last feature map, float32 [b, d], takes the place of the logits.
        """
        x = check_images(x, type(self).__name__)
        row, endpoints = self.row, {}
        kernel, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        unit = partial(conv_norm, options=self.options, train=train)
        y = unit(x, row.features, kernel, strides, name="conv1")
        y = endpoints["conv1"] = nn.relu(y)
        channels = row.features
        if self.stem == "imagenet":
            y = max_pool(y, 3, 2, padding=1)
        for stage, blocks in enumerate(row.blocks):
            features = row.features * 2**stage
            convs = ((features, 3), (features, 3))
            if row.bottleneck:
                convs = ((features, 1), (features, 3), (4 * features, 1))
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                name = f"conv{stage + 2}_{block + 1}"
                residual = strides == 1 and channels == convs[-1][0]
                options = (strides, residual, self.strided, self.options)
                y = Block(convs, *options, name=name)(y, train=train)
                channels = convs[-1][0]
            endpoints[f"conv{stage + 2}"] = y
        y = global_mean(y)
        if self.num_classes is None:
            return y, endpoints
        classifier = Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            fixed=True,
            name="classifier",
        )
        return classifier(y), endpoints


def make(
    variant: str = "50",
    *,
    num_classes: Count | None = 1000,
    stem: Stem = "imagenet",
    width: Multiplier = 1.0,
    strided: Strided = "3x3",
    epsilon: Positive = 1e-5,
) -> ResNet:
    """Builds a ResNet.

    Args:
      variant: a row of VARIANTS, the number of layers.
      num_classes: outputs of the classifier; None for no classifier.
      stem: "imagenet" is a 7x7 convolution with strides 2 and max pooling; "cifar" is a 3x3 convolution, for small images.
      width: multiplies all channel counts except the number of classes.
      strided: which convolution of a bottleneck has its strides, the 3x3 or the first 1x1; Keras' weights need "1x1".
      epsilon: epsilon of the normalisations; Keras' weights need 1.001e-5.

    Raises:
      UserError: the variant is unknown, or `strided` is "1x1" for blocks without 1x1 convolutions.
    """
    row = registry.row(VARIANTS, variant, "variant of resnet")
    if strided == "1x1" and not row.bottleneck:
        raise UserError(
            f"strided = '1x1': the blocks of variant {variant!r} have no 1x1 convolution: use '3x3', or variant '50'"
        )
    row = row._replace(features=scaled(row.features, width))
    return ResNet(row, num_classes, stem, strided, UnitOptions(epsilon=epsilon))


def torchvision_names(net: ResNet) -> dict[str, str]:
    """Returns {our layer: its name in torchvision's checkpoints}; raises a UserError for other strides or epsilon."""
    _check("torchvision", net, "3x3", 1e-5)
    names = {"conv1": "conv1", "conv1_norm": "bn1", "classifier": "fc"}
    for ours, stage, block in _blocks(net):
        theirs = f"layer{stage + 1}.{block}"
        for n in range(1, 4 if net.row.bottleneck else 3):
            names[f"{ours}/conv{n}"] = f"{theirs}.conv{n}"
            names[f"{ours}/conv{n}_norm"] = f"{theirs}.bn{n}"
        if block == 0 and (stage or net.row.bottleneck):
            names[f"{ours}/shortcut"] = f"{theirs}.downsample.0"
            names[f"{ours}/shortcut_norm"] = f"{theirs}.downsample.1"
    return names


def timm_names(net: ResNet) -> dict[str, str]:
    """Returns {our layer: its name in timm's checkpoints}, which are torchvision's; raises the same UserError."""
    _check("timm", net, "3x3", 1e-5)
    return torchvision_names(net)


def keras_names(net: ResNet) -> dict[str, str]:
    """Returns {our layer: its name in Keras' files}.

    Raises:
      UserError: basic blocks, which Keras does not have, or other options than Keras'.
    """
    if not net.row.bottleneck:
        raise UserError(
            "config.init.names = 'keras': Keras has no ResNet without bottlenecks: use variant '50', '101' or '152'"
        )
    _check("keras", net, "1x1", 1.001e-5)
    names = dict(conv1="conv1_conv", conv1_norm="conv1_bn", classifier="predictions")
    for ours, stage, block in _blocks(net):
        units = {"conv1": 1, "conv2": 2, "conv3": 3}
        if block == 0:
            units["shortcut"] = 0
        for unit, number in units.items():
            theirs = f"conv{stage + 2}_block{block + 1}_{number}"
            names[f"{ours}/{unit}"] = f"{theirs}_conv"
            names[f"{ours}/{unit}_norm"] = f"{theirs}_bn"
    return names


def _blocks(net: ResNet):
    """Returns the name of each block with the numbers of its stage and of the block in it, from 0."""
    return [
        (f"conv{stage + 2}_{block + 1}", stage, block)
        for stage, blocks in enumerate(net.row.blocks)
        for block in range(blocks)
    ]


def _check(names: str, net: ResNet, strided: Strided, epsilon: float) -> None:
    """Raises a UserError unless the network has the published strides and epsilon."""
    options = {"strided": net.strided, "epsilon": net.options.epsilon}
    published = {"strided": strided, "epsilon": epsilon}
    if not net.row.bottleneck:  # basic blocks have no choice of strides
        options.pop("strided")
        published.pop("strided")
    foreign.check_options(names, options, published)
