"""A dataset that is not at hand: its classes and channels are known, its images are noise.

The jobs predict and export take it where the images of a trained network's run are gone: predict reads none of them, and
export compares files with the live network, for which noise serves. Nothing is trained, measured or calibrated on it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from squeeze_jax.data.source import Example, Source
from squeeze_jax.ranges import Filled, Integer

COUNT, SIZE = 128, 64


def make(
    classes: Annotated[tuple[str, ...], Filled()],
    channels: Literal[1, 3],
    ignored: tuple[Integer, ...] | None = None,
) -> Source:
    """Returns two splits of 128 images of noise.

    Args:
      classes: their names.
      channels: of the images.
      ignored: labels of targets that do not count; None for images with one label.
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
