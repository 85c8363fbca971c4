"""What a source of images is: two splits of encoded or raw images, their labels, and the labels' names.

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

    `ignored` lists the labels of targets that do not count; it is None where images have one label and no target.
    `survey` counts the stored images' sizes and kinds, where they are known; `notes` are lines about files left out.
    """

    label_names: tuple[str, ...]
    channels: int
    train: Examples
    eval: Examples
    ignored: tuple[int, ...] | None = None
    survey: Survey | None = None
    notes: tuple[str, ...] = ()


def make(source: Mapping) -> Source:
    """Opens the data set that `config.data.source` names, such as {"name": "tfds", "dataset": "cifar10", ...}.

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
