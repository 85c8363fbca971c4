"""A slimmable network: one set of weights runs at several widths.

Yu, Yang, Xu, Yang, Huang 2018, arXiv 1812.08928 (slimmable neural networks). At width w each layer uses the first
fraction w of its output channels, and as many input channels as it receives. Batch statistics differ between widths, so each
width has its own normalisations ("switchable batch normalisation", section 3.2); all other weights are shared. This is a small
residual network for small images. Images are NHWC.
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
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.pool import global_mean
from squeeze_jax.nn.reshaped import features
from squeeze_jax.ranges import Count, Multiplier, Part

CLASSIFIER = ("classifier",)  # the layers that depend on the classes


class Row(NamedTuple):
    """A variant: channels of the stem, and (channels, strides) of each block."""

    stem: int
    blocks: tuple[tuple[int, int], ...]


VARIANTS = {
    "small": Row(32, ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))),
    "tiny": Row(8, ((8, 1), (16, 2))),
}


class Slice(nn.Module):
    """A convolution or dense layer that uses a part of its kernel.

    Attributes:
      features: output channels at width 1.
      kernel: side of the convolution's kernel [kh, kw, c, features]; 0 for a dense layer with kernel [c, features] and bias.
      strides: strides of the convolution.
    """

    features: int
    kernel: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, width: float = 1.0) -> jax.Array:
        """Returns [b, h', w', width * features] for x [b, h, w, c']; a dense layer has all its features at each width."""
        dense = self.kernel == 0
        outputs = features(self, self.features, fixed=dense)
        extent = () if dense else (self.kernel, self.kernel)
        # At a smaller width the layer receives fewer channels than its kernel has.
        if self.has_variable("params", "kernel"):
            full_kernel = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.he_normal()
            full_kernel = parameter(
                self, "kernel", init, (*extent, x.shape[-1], outputs)
            )
        outputs = full_kernel.shape[-1]
        outputs = outputs if dense else scaled(outputs, width)
        x = as_float(x)
        kernel = full_kernel[..., : x.shape[-1], :outputs].astype(x.dtype)
        x, kernel = tap(self, "inputs", x), tap(self, "kernel", kernel)
        if not dense:
            pad = self.kernel // 2
            y = conv(x, kernel, strides=self.strides, padding=pad)
            return tap(self, "outputs", y)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (outputs,))
        return tap(self, "outputs", (x @ kernel).astype(jnp.float32) + bias)


class Unit(nn.Module):
    """A convolution, the normalisation of the current width, and ReLU; the normalisations are norm25, norm50, …"""

    features: int
    strides: int
    switches: tuple[float, ...]

    @nn.compact
    def __call__(self, x, width: float, *, train: bool, activate: bool = True):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        y = Slice(self.features, 3, self.strides, name="conv")(x, width)
        y = batch_norm(y, train=train, name=f"norm{percent(width)}")
        return nn.relu(y) if activate else y


class Block(nn.Module):
    """Two convolutions, and a residual sum if the shape stays the same."""

    features: int
    strides: int
    switches: tuple[float, ...]
    residual: bool

    @nn.compact
    def __call__(self, x, width: float, *, train: bool):
        """Applies the block: [b, h, w, c] → [b, h', w', c']."""
        sizes = self.features, self.switches
        first = Unit(sizes[0], self.strides, sizes[1], name="unit1")
        y = first(x, width, train=train)
        second = Unit(sizes[0], 1, sizes[1], name="unit2")
        y = second(y, width, train=train, activate=not self.residual)
        if not self.residual:
            return y
        return nn.relu(residual_sum(x, y, self, "unit2/conv"))


class Slimmable(nn.Module):
    """The Slimmable network; attributes as in `make`. Endpoints: stem, block1, block2, …"""

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
          (logits [b, num_classes] in float32, endpoints {name: [b, h', w', c']}).

        Raises:
          UserError: `width` is not one of the switches.
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
        if self.is_initializing():  # to create the normalisations of the other widths
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
      num_classes: outputs of the classifier; None for no classifier: pooled features then take the place of the logits.
      width: multiplies all channel counts: `width=0.5, switches=(1.0,)` is the ordinary network of half the width.
      switches: the widths at which the network can run, as fractions of its channels in (0, 1], including 1.

    Raises:
      UserError: the variant is unknown, or switches are out of range or round to the same percentage.
    """
    if len({percent(width) for width in switches}) < len(switches):
        raise UserError(
            f"switches = {switches} has two widths of the same percentage, which names their normalisations: choose other widths"
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
    """Returns the number of channels of a layer at a width, at least one."""
    return max(1, round(channels * width))


def percent(width: float) -> int:
    """Returns a width in percent, which names its normalisations."""
    return round(100 * width)


def extract(options: dict, variables: dict, width: float) -> tuple[dict, dict]:
    """Extracts the ordinary network that a slimmable network is at one width.

    Args:
      options: options of `make` of the slimmable network.
      variables: its {"params", "batch_stats"}.
      width: one of its switches.

    Returns:
      (options of `make`, variables) of the ordinary network.

    Raises:
      UserError: the option `width` times this width rounds a number of channels differently.
    """
    row = registry.row(VARIANTS, options.get("variant", "small"), "variant")
    base = options.get("width", 1.0)
    for channels in (row.stem, *(c for c, _ in row.blocks)):
        if scaled(scaled(channels, base), width) != scaled(channels, base * width):
            raise UserError(
                f"width = {width}: {channels} channels times {base} times {width} round to another number than in the"
                " slimmable network: build it with width=1.0"
            )
    plain = {**options, "width": options.get("width", 1.0) * width, "switches": (1.0,)}
    net = make(**{k: v for k, v in plain.items() if k != "name"})
    channels = variables["params"]["stem"]["conv"]["kernel"].shape[2]
    example = jax.ShapeDtypeStruct((1, 16, 16, channels), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), example)
    arrays = {kind: tree.flatten(part) for kind, part in variables.items()}

    def cut(kind):
        def leaf(name, shape):
            array = arrays[kind][name.replace("/norm100/", f"/norm{percent(width)}/")]
            return array[tuple(slice(n) for n in shape.shape)]

        return leaf

    return plain, {
        kind: tree.map_named(cut(kind), part) for kind, part in shapes.items()
    }
