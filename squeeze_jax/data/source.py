"""Sources of images: two splits of encoded or raw images with labels, targets or boxes, and the names of the classes.

A file in `sources/` has one function `make(...) -> Source`. Its parameters are the keys of `config.data.source`, except
`name`, which is the file's name. Splits must be picklable, because worker processes get a copy.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from squeeze_jax import registry
from squeeze_jax.data.survey import Survey
from squeeze_jax.errors import UserError

SOURCES = "squeeze_jax.data.sources"
IGNORED = 255  # the label of pixels that do not count, in every batch
LABELS = "one label per image"  # `Source.annotation` for classification


class Boxes(NamedTuple):
    """The boxes of one image, in pixels of the upright image, which `vision` decodes and rotates by its EXIF tag.

    Attributes:
      corners: float32 [n, 4]: left, top, right, bottom; the image spans 0 to its width and 0 to its height.
      labels: class numbers, int [n].
      size: (width, height) of the image that the boxes belong to, which the decoded image must have; None if the source does
        not know it.
    """

    corners: np.ndarray
    labels: np.ndarray
    size: tuple[int, int] | None = None


class Example(NamedTuple):
    """One stored example."""

    image: bytes | np.ndarray  # an encoded image file, or uint8 [h, w, c]
    label: int
    name: str  # names the example in errors: a path, or "cifar10 train[17]"
    target: bytes | np.ndarray | None = None  # class numbers: a PNG, or uint8 [h, w]
    boxes: Boxes | None = None  # an image without objects has Boxes of length 0


class Examples(Protocol):
    """One split. It reads many examples at a time, because storage is fastest that way."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples at these indices."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset of images.

    Attributes:
      label_names: the names of the classes, in the order of the labels.
      channels: of the stored images, 1 or 3.
      train, eval: the two splits.
      ignored: the labels in targets that do not count; None if images have no targets.
      most_boxes: (name, number of boxes) of the image with the most boxes; None if images have no boxes.
      survey: counts of the stored images' sizes and kinds; None if they are not known.
      notes: lines about files left out.
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
        """The kind of annotation that the images have, in words for an error."""
        if self.most_boxes is not None:
            return "boxes"
        return LABELS if self.ignored is None else "targets"


class Subset(NamedTuple):
    """Some examples of a split.

    Attributes:
      examples: the split.
      indices: of the examples, int [n].
    """

    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples at these places of `self.indices`."""
        return self.examples.read([int(self.indices[i]) for i in indices])


def hold_out(opened: Source, share: float) -> tuple[Source, Subset]:
    """Returns (the source without some of its training examples, these examples).

    Args:
      opened: the source.
      share: of the training examples, 0 to 1; which ones depends on their number and the share alone.

    Raises:
      UserError: no example is left on one side.
    """
    count = len(opened.train)
    order = np.random.default_rng(0).permutation(count)
    held = round(share * count)
    if share and not 0 < held < count:
        raise UserError(
            f"config.data.validation = {share} holds out {held} of {count} training images: choose another share"
        )
    kept = np.sort(order[held:])
    train = Subset(opened.train, kept) if held else opened.train
    validation = Subset(opened.train, np.sort(order[:held]))
    return dataclasses.replace(opened, train=train), validation


def make(source: Mapping) -> Source:
    """Opens the dataset that `config.data.source` names, such as {"name": "tfds", "dataset": "cifar10", ...}.

    Raises:
      UserError: a key is unknown or missing, or the source itself raises an error.
    """
    module = check(source)
    opened = module.make(**{k: v for k, v in source.items() if k != "name"})
    if not isinstance(opened, Source):
        raise UserError(
            f"config.data.source.name = {source['name']!r} makes a {type(opened).__name__}: return a"
            " squeeze_jax.data.source.Source"
        )
    return opened


def check(source: Mapping) -> types.ModuleType:
    """Checks the keys of `config.data.source` without opening the dataset, and returns the file of `sources` that it names.

    Raises:
      UserError: a key is unknown or missing, or a value has another type or is out of range.
    """
    if not isinstance(source, Mapping) or "name" not in source:
        raise UserError(
            f"config.data.source = {source!r} lacks a name; choose from {', '.join(registry.names(SOURCES))}"
        )
    keys = dict(source)
    module = registry.load(SOURCES, keys.pop("name"), "data source")
    registry.check(module.make, keys, "config.data.source")
    return module


def class_name(label_names: Sequence[str], label: int) -> str:
    """Returns the name of a class; "class 7" if the dataset has no name for it, because a network may have more classes."""
    return label_names[label] if label < len(label_names) else f"class {label}"
