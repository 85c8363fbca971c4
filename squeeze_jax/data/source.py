"""A source of images: two splits of encoded or raw images with labels, targets or boxes, and the classes' names.

A file in `sources/` has one function `make(...) -> Source`; its parameters are the keys of `config.data.source` beside
`name`, which is the file's name. Splits must survive pickling, because worker processes get a copy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from squeeze_jax import registry
from squeeze_jax.data.survey import Survey
from squeeze_jax.errors import UserError

SOURCES = "squeeze_jax.data.sources"
IGNORED = 255  # the label of pixels that do not count, in every batch
LABELS = "one label per image"  # what a source for classification has


class Boxes(NamedTuple):
    """The boxes of one image, in pixels of the upright image: as `vision` decodes it, after its EXIF rotation.

    Attributes:
      corners: float32 [n, 4]: left, top, right, bottom; the image spans 0 to its width and 0 to its height.
      labels: int [n]: class numbers.
      size: (width, height) of the image that the boxes belong to, where the source knows it; the decoded image must match.
    """

    corners: np.ndarray
    labels: np.ndarray
    size: tuple[int, int] | None = None


class Example(NamedTuple):
    """One example as it is stored."""

    image: bytes | np.ndarray  # an encoded image file, or uint8 [h, w, c]
    label: int
    name: str  # how an error calls it: a path, or "cifar10 train[17]"
    target: bytes | np.ndarray | None = None  # class numbers: a PNG, or uint8 [h, w]
    boxes: Boxes | None = None  # objects; an image without any has Boxes of length 0


class Examples(Protocol):
    """One split; examples are read many at a time because storage is fastest that way."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Example]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset: `label_names[label]` is a class, `channels` is 1 or 3 as stored.

    `ignored` lists the labels of targets that do not count; it is None where images have no targets.
    `most_boxes` names the image with the most boxes and counts them: (name, count); it is None where images have no boxes.
    `survey` counts the stored images' sizes and kinds, where they are known; `notes` are lines about files left out.
    """

    label_names: tuple[str, ...]
    channels: int
    train: Examples
    eval: Examples
    ignored: tuple[int, ...] | None = None
    most_boxes: tuple[str, int] | None = None
    survey: Survey | None = None
    notes: tuple[str, ...] = ()

    @property
    def annotation(self) -> str:
        """Returns what the images have, in words for an error."""
        if self.most_boxes is not None:
            return "boxes"
        return LABELS if self.ignored is None else "targets"


def make(source: Mapping) -> Source:
    """Opens the dataset that `config.data.source` names, such as {"name": "tfds", "dataset": "cifar10", ...}.

    Raises:
      UserError: an unknown or missing key, or what the source itself finds wrong.
    """
    if not isinstance(source, Mapping) or "name" not in source:
        raise UserError(
            f"config.data.source = {source!r} lacks a name; choose from {', '.join(registry.names(SOURCES))}"
        )
    keys = dict(source)
    module = registry.load(SOURCES, keys.pop("name"), "data source")
    registry.check(module.make, keys, "config.data.source")
    opened = module.make(**keys)
    if not isinstance(opened, Source):
        raise UserError(
            f"config.data.source.name = {source['name']!r} makes a {type(opened).__name__}: return a"
            " squeeze_jax.data.source.Source"
        )
    return opened
