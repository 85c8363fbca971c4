"""Where the channels of a network's layers lie among those of the largest network of its space.

A narrower layer has some channels of the same layer in the largest network, and a layer with more groups has fewer weights for
each of them. The shapes of the weights do not tell which ones: [1, 192, 768] may be 192 channels, or four groups of 192. A
module that is an elastic layer of this kind says it by a method `placement`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.nn.attention import shuffle_channels
from squeeze_jax.nn.chain import Piece


class Axis(NamedTuple):
    """The input or output channels of a layer.

    The channels of the largest network are divided into `blocks` equal blocks, and the first channels of each block remain.
    So with a number of groups that divides `blocks`, each remaining channel stays in its group.

    Attributes:
      name: pieces whose axes have the same name, and whose own names have the same first part, have the same channels.
      total: number of channels in the largest network.
      count: number of channels that remain.
      blocks: number of blocks.
      unit: number of neighbouring channels that remain together, such as those of a head.
      shuffle: (groups before, groups after) of a channel shuffle that the layer reads through, see `shuffle_channels`.
    """

    name: str
    total: int
    count: int
    blocks: int = 1
    unit: int = 1
    shuffle: tuple[int, int] = (1, 1)

    def units(self) -> np.ndarray:
        """Returns the remaining units in order, by their numbers in the largest network, int [count / unit]."""
        numbers = np.arange(self.total // self.unit).reshape(self.blocks, -1)
        return numbers[:, : self.count // self.unit // self.blocks].ravel()

    def channels(self) -> np.ndarray:
        """Returns the channels in the order in which the layer has them, by their numbers in the largest network, [count]."""
        return _channels(self)


class Placement(NamedTuple):
    """The channels of a layer.

    Attributes:
      groups: number of groups of the layer.
      inputs, outputs: its channels; None for those of the largest network with the smallest numbers.
    """

    groups: int = 1
    inputs: Axis | None = None
    outputs: Axis | None = None


def of_module(module) -> Placement | None:
    """Returns the placement of a module that is one layer and has a method `placement`; None for any other module."""
    return module.placement() if hasattr(module, "placement") else None


def placements(pieces: Sequence[Piece]) -> dict[str, Placement]:
    """Returns {piece: placement} of the pieces of a network that have one; pieces with shared weights are one piece."""
    pairs = ((piece.scope, of_module(piece.module)) for piece in pieces)
    return {scope: placement for scope, placement in pairs if placement is not None}


@functools.lru_cache(maxsize=1024)
def _channels(axis: Axis) -> np.ndarray:
    numbers = axis.units()[:, None] * axis.unit + np.arange(axis.unit)
    return shuffle_channels(numbers.ravel(), *axis.shuffle)
