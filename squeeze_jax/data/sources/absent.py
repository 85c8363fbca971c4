"""Stands in for a dataset that is not available: its classes and channels are known, its images are noise.

The jobs predict and export use it if the images that a network was trained on are missing. The job predict reads no images of
it, and export needs only some inputs, to compare exported files with the live network. Nothing is trained, measured or
calibrated on it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from squeeze_jax.data.source import Example, Source
from squeeze_jax.ranges import Filled, Integer, Name

COUNT, SIZE = 128, 64


def make(
    classes: Annotated[tuple[Name, ...], Filled()],
    channels: Literal[1, 3],
    ignored: tuple[Integer, ...] | None = None,
) -> Source:
    """Returns a source with two splits of 128 images of noise.

    Args:
      classes: the names of the classes.
      channels: the number of channels of the images.
      ignored: the labels in targets that do not count; None for images without targets.
    """
    noise = _Noise(channels, ignored is not None)
    return Source(tuple(classes), channels, noise, noise, ignored)


@dataclasses.dataclass(frozen=True)
class _Noise:
    channels: int
    targets: bool

    def __len__(self) -> int:
        return COUNT

    def read(self, indices: Sequence[int]) -> list[Example]:
        shape = SIZE, SIZE, self.channels
        return [
            Example(
                np.random.default_rng(i).integers(0, 256, shape, np.uint8),
                0,
                f"noise[{i}]",
                np.zeros(shape[:2], np.uint8) if self.targets else None,
            )
            for i in map(int, indices)
        ]
