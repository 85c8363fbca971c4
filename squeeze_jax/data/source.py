"""What a source of images is: two splits of encoded or raw images, their labels, and the labels' names.

A file in `sources/` has one function `make(...) -> Source`; its parameters are the keys of `config.data.source` beside
`name`, which is the file's name. Splits must survive pickling, because worker processes get a copy.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

IGNORED = 255  # the label of pixels that do not count, in every batch


class Example(NamedTuple):
    """One example as it is stored."""

    image: bytes | np.ndarray  # an encoded image file, or uint8 [h, w, c]
    label: int
    name: str  # how an error calls it: a path, or "cifar10 train[17]"
    target: bytes | np.ndarray | None = None  # class numbers: a PNG, or uint8 [h, w]


class Examples(Protocol):
    """One split; examples are read many at a time because storage is fastest that way."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Example]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: `label_names[label]` is a class, `channels` is 1 or 3 as stored.

    Of maps of labels, `ignored` lists the labels that do not count, and `colours` has the colour in which to show each class.
    """

    label_names: tuple[str, ...]
    channels: int
    train: Examples
    eval: Examples
    ignored: tuple[int, ...] = (IGNORED,)
    colours: tuple[tuple[int, int, int], ...] = ()
