"""A slimmable network: one set of weights runs at several widths.

Yu, Yang, Xu, Yang, Huang 2018, arXiv 1812.08928 (slimmable neural networks). At width w each layer uses the first share
w of its output channels, and of its input channels as many as arrive. Batch statistics differ between widths, so each
width has normalisations of its own ("switchable batch normalisation", section 3.2); all else is shared. The network is a
small residual one for small images. Images are NHWC.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.nn.blocks import batch_norm, residual_sum
from squeeze_jax.nn.conv import conv
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.image import check_images
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.reshaped import features
from squeeze_jax.ranges import Count, Multiplier, Part

CLASSIFIER = ("classifier",)  # the layers that other classes change


class Row(NamedTuple):
    """A variant: channels of the stem, and (channels, strides) of each block."""

    stem: int
    blocks: tuple[tuple[int, int], ...]


VARIANTS = {
    "small": Row(32, ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))),
    "tiny": Row(8, ((8, 1), (16, 2))),
}


class Slice(nn.Module):
    """A convolution, or without positions a dense layer, that uses a part of its kernel [kh, kw, c, features].

    Attributes:
      features: output channels at width 1.
      kernel: positions on each side; 0 for a dense layer, kernel [c, features] and bias.
      strides: of the convolution.
    """

    features: int
    kernel: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, width: float = 1.0) -> jax.Array:
        """x: [b, h, w, c'] → [b, h', w', width * features]; a dense layer has all its features at each width."""
        dense = self.kernel == 0
        outputs = features(self, self.features, fixed=dense)
        extent = () if dense else (self.kernel, self.kernel)
        # At a smaller width fewer channels arrive than the kernel has.
        if self.has_variable("params", "kernel"):
            whole = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.he_normal()
            whole = self.param("kernel", init, (*extent, x.shape[-1], outputs))
        outputs = whole.shape[-1] if dense else scaled(whole.shape[-1], width)
        x = as_float(x)
        kernel = whole[..., : x.shape[-1], :outputs].astype(x.dtype)
        x, kernel = tap(self, "inputs", x), tap(self, "kernel", kernel)
        if not dense:
            pad = self.kernel // 2
            y = conv(x, kernel, strides=self.strides, padding=pad)
            return tap(self, "outputs", y)
        bias = self.param("bias", nn.initializers.zeros_init(), (outputs,))
        return tap(self, "outputs", (x @ kernel).astype(jnp.float32) + bias)


class Unit(nn.Module):
    """Convolution, the normalisation of the width in use, and ReLU; the normalisations are norm25, norm50, …"""

    features: int
    strides: int
    switches: tuple[float, ...]

    @nn.compact
    def __call__(self, x, width: float, *, train: bool, activate: bool = True):
        y = Slice(self.features, 3, self.strides, name="conv")(x, width)
        y = batch_norm(y, train=train, name=f"norm{percent(width)}")
        return nn.relu(y) if activate else y


class Block(nn.Module):
    """Two convolutions and a residual sum, where the shape stays."""

    features: int
    strides: int
    switches: tuple[float, ...]
    residual: bool

    @nn.compact
    def __call__(self, x, width: float, *, train: bool):
        sizes = self.features, self.switches
        first = Unit(sizes[0], self.strides, sizes[1], name="unit1")
        y = first(x, width, train=train)
        second = Unit(sizes[0], 1, sizes[1], name="unit2")
        y = second(y, width, train=train, activate=not self.residual)
        if not self.residual:
            return y
        return nn.relu(residual_sum(x, y, self, "unit2/conv"))


class Slimmable(nn.Module):
    """The net; attributes as in `make`. Endpoints: stem, block1, block2, …"""

    row: Row
    num_classes: int | None
    switches: tuple[float, ...]

    @nn.compact
    def __call__(self, x, *, train: bool = False, width: float | None = None):
        """Runs the network at one width.

        Args:
          x: [b, h, w, c].
          train: whether normalisations use the batch's statistics.
          width: one of `switches`; None for the largest.

        Returns:
          Logits [b, num_classes], float32, and {name: [b, h', w', c']}.

        Raises:
          UserError: a width that is none of the switches.
        """
        x = check_images(x, type(self).__name__)
        width = max(self.switches) if width is None else width
        if width not in self.switches:
            raise UserError(
                f"width = {width} is none of the switches {self.switches}: choose one of them"
            )
        stem = Unit(self.row.stem, 1, self.switches, name="stem")
        blocks, channels = [], self.row.stem
        for number, (features_, strides) in enumerate(self.row.blocks, 1):
            residual = strides == 1 and features_ == channels
            name = f"block{number}"
            blocks.append(Block(features_, strides, self.switches, residual, name=name))
            channels = features_
        classify = None
        if self.num_classes is not None:
            classify = Slice(self.num_classes, 0, name="classifier")

        def run(width):
            endpoints = {"stem": stem(x, width, train=train)}
            y = endpoints["stem"]
            for number, block in enumerate(blocks, 1):
                y = endpoints[f"block{number}"] = block(y, width, train=train)
            y = global_mean(y)
            return (y if classify is None else classify(y)), endpoints

        outputs = run(width)
        if self.is_initializing():  # the other widths have normalisations too
            for other in self.switches:
                if other != width:
                    run(other)
        return outputs


def make(
    variant: str = "small",
    *,
    num_classes: Count | None = 1000,
    width: Multiplier = 1.0,
    switches: tuple[Part, ...] = (0.25, 0.5, 0.75, 1.0),
) -> Slimmable:
    """Builds a slimmable network.

    Args:
      variant: a row of VARIANTS.
      num_classes: outputs of the classifier; None for none, then pooled features come in place of logits.
      width: multiplies all channels, so that `width=0.5, switches=(1.0,)` is the plain network of half the width.
      switches: the widths that the network can run at, shares of its channels in (0, 1], 1 among them.

    Raises:
      UserError: unknown variant, or switches out of range.
    """
    if len({percent(width) for width in switches}) < len(switches):
        raise UserError(
            f"switches = {switches} has two of the same percentage: each width has normalisations of its own, norm25 and so on"
        )
    row = registry.row(VARIANTS, variant, "variant of slimmable")
    if not switches or max(switches) != 1 or min(switches) <= 0:
        raise UserError(
            f"switches = {switches} should be shares in (0, 1], 1 among them, such as (0.5, 1.0)"
        )
    blocks = tuple((scaled(c, width), s) for c, s in row.blocks)
    row = Row(scaled(row.stem, width), blocks)
    return Slimmable(row, num_classes, tuple(map(float, sorted(switches))))


def scaled(channels: int, width: float) -> int:
    """The channels of a layer at a width; at least one."""
    return max(1, round(channels * width))


def percent(width: float) -> int:
    return round(100 * width)


def extract(options: dict, variables: dict, width: float) -> tuple[dict, dict]:
    """Returns the options and the variables of the plain network that a slimmable one is at a width.

    Args:
      options: of `make`.
      variables: {"params", "batch_stats"} of the slimmable network.
      width: one of its switches.

    Raises:
      UserError: channels that the option `width` and this width together round to another number.
    """
    row = registry.row(VARIANTS, options.get("variant", "small"), "variant")
    base = options.get("width", 1.0)
    for channels in (row.stem, *(c for c, _ in row.blocks)):
        if scaled(scaled(channels, base), width) != scaled(channels, base * width):
            raise UserError(
                f"width = {width}: {channels} channels times {base} times {width} do not round to what the slimmable network"
                " uses; make it with width=1.0"
            )
    plain = {**options, "width": options.get("width", 1.0) * width, "switches": (1.0,)}
    net = make(**{k: v for k, v in plain.items() if k != "name"})
    channels = variables["params"]["stem"]["conv"]["kernel"].shape[2]
    example = jax.ShapeDtypeStruct((1, 16, 16, channels), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), example)
    arrays = {kind: tree.flatten(part) for kind, part in variables.items()}

    def cut(kind):
        def leaf(name, shape):
            whole = arrays[kind][name.replace("/norm100/", f"/norm{percent(width)}/")]
            return whole[tuple(slice(n) for n in shape.shape)]

        return leaf

    return plain, {
        kind: tree.map_named(cut(kind), part) for kind, part in shapes.items()
    }
