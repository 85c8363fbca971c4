"""Images of a split by index: read, decode, check, keep the decoded ones in memory if asked to, and transform.

An image has either a label or a target, a map with a label for each pixel. Both are checked against the classes.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import target, vision
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.source import IGNORED, Example, Examples, Source
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)

UNKNOWN, GOOD, BAD = 0, 1, 2
OUTSIDE = 254  # in a table of labels: no class and not ignored


class _Cache(NamedTuple):
    state: np.ndarray  # uint8 [n]: UNKNOWN, GOOD or BAD
    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray  # int32 [n], or uint8 [n, h, w] of targets


class Reader:
    """One split under one view. Its methods are pure functions of their arguments and may run in any thread.

    Args:
      examples: the split.
      num_classes: labels must be below it.
      view: how images are looked at.
      skip: whether an image that cannot be decoded is skipped; otherwise it is an error.
      cached: whether to keep decoded images in memory. A worker process gets a copy without them.
      ignored: labels of targets that do not count and become `IGNORED`; None for images that have a label.
    """

    draws = vision.DRAWS

    def __init__(
        self,
        examples: Examples,
        num_classes: int,
        view: vision.View,
        *,
        skip: bool,
        cached: bool,
        ignored: Sequence[int] | None = None,
    ):
        self.examples, self.num_classes, self.view = examples, num_classes, view
        self.skip = skip
        self._skipped = set()
        self._table = None if ignored is None else _table(num_classes, ignored)
        self._key = "label" if ignored is None else "target"
        # A random crop of a random area is cut from the original, which has any size.
        self._cache = None
        if cached and view.crop != "random_resized":
            n = len(examples)
            self._cache = _Cache(
                np.zeros(n, np.uint8),
                np.empty((n, *view.shape), np.uint8),
                self._labels(n),
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def still(self, indices: np.ndarray) -> Batch:
        """Evaluation images: "image" uint8 [b, h, w, c], "label" int32 [b] or "target" uint8 [b, h, w], "mask" bool [b].

        Those not decoded are black.

        Raises:
          UserError: a label outside the classes, a target that cannot be decoded or has another size than its image or,
            unless they are skipped, an image that cannot be decoded.
        """
        if self._cache is None:
            return self._still(indices)
        state, images, labels = self._cache
        new = np.unique(indices[state[indices] == UNKNOWN])
        if len(new):
            decoded = self._still(new)
            images[new], labels[new] = decoded["image"], decoded[self._key]
            state[new] = np.where(decoded["mask"], GOOD, BAD)
        return {
            "image": images[indices],
            self._key: labels[indices],
            "mask": state[indices] == GOOD,
        }

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Training images, as `still`, under the random transforms that `draws` [b, vision.DRAWS] decide."""
        view = self.view
        if view.crop == "random_resized":
            batch = self._decode(
                indices,
                lambda image, i: vision.random_resized(image, view, draws[i]),
                lambda labels, i: target.random_resized(labels, view, draws[i]),
            )
            images = batch["image"]
        else:
            batch = self.still(indices)
            images = batch["image"]
            if view.crop == "pad":
                images = vision.pad_crop(images, view.pad, draws)
                if self._table is not None:
                    batch["target"] = target.pad_crop(batch["target"], view.pad, draws)
        images = vision.augment(images, view, draws)
        if self._table is not None and view.flip:
            target.flip(batch["target"], draws)
        images[~batch["mask"]] = 0
        return batch | {"image": images}

    def empty(self, rows: int) -> Batch:
        """Black images that do not count."""
        return {
            "image": np.zeros((rows, *self.view.shape), np.uint8),
            self._key: self._labels(rows),
            "mask": np.zeros(rows, bool),
        }

    def _labels(self, rows: int) -> np.ndarray:
        if self._table is None:
            return np.zeros(rows, np.int32)
        return np.full((rows, *self.view.shape[:2]), IGNORED, np.uint8)

    def _still(self, indices: np.ndarray) -> Batch:
        return self._decode(
            indices,
            lambda image, i: vision.still(image, self.view),
            lambda labels, i: target.still(labels, self.view),
        )

    def _decode(
        self,
        indices: np.ndarray,
        transform: Callable[[bytes | np.ndarray, int], np.ndarray],
        move: Callable[[np.ndarray, int], np.ndarray],
    ) -> Batch:
        images = np.zeros((len(indices), *self.view.shape), np.uint8)
        labels = self._labels(len(indices))
        good = np.ones(len(indices), bool)
        for i, example in enumerate(self.examples.read(indices.tolist())):
            if self._table is None:
                labels[i] = self._label(example)
            try:
                images[i] = transform(example.image, i)
                if self._table is not None:
                    size = vision.size_of(example.image)
                    labels[i] = move(self._target(example, size), i)
            except vision.Undecodable as error:
                self._undecodable(example, error)
                good[i] = False
        return {"image": images, self._key: labels, "mask": good}

    def _label(self, example: Example) -> int:
        if not 0 <= example.label < self.num_classes:
            raise UserError(
                f"{example.name} has label {example.label}, outside the data set's {self.num_classes} classes"
            )
        return example.label

    def _target(self, example: Example, size: tuple[int, int]) -> np.ndarray:
        """The labels of an image of that (width, height), uint8 [h, w]."""
        name = f"the target of {example.name}"
        try:
            stored = target.read(example.target)
        except vision.Undecodable as error:
            raise UserError(
                f"cannot decode {name}: {error}; replace or remove it"
            ) from None
        if stored.shape[::-1] != size:
            w, h = stored.shape[::-1]
            raise UserError(
                f"{name} has {w}x{h} pixels, the image {size[0]}x{size[1]}: each pixel needs one label"
            )
        labels = self._table[stored]
        if (labels == OUTSIDE).any():
            wrong = int(stored[labels == OUTSIDE][0])
            raise UserError(
                f"{name} has label {wrong}, outside the data set's {self.num_classes} classes and not ignored"
            )
        return labels

    def _undecodable(self, example: Example, error: vision.Undecodable):
        line = f"cannot decode image {example.name}: {error}"
        if not self.skip:
            raise UserError(
                f"{line}; replace or remove it (only training can skip it: config.data.corrupt='skip')"
            ) from None
        if example.name not in self._skipped:
            self._skipped.add(example.name)
            log.warning("%s; skipped", line)


def _table(num_classes: int, ignored: Sequence[int]) -> np.ndarray:
    """Returns what each stored label becomes, uint8 [256]."""
    if num_classes > OUTSIDE:
        raise UserError(
            f"a target has 8-bit labels, at most {OUTSIDE} classes, not {num_classes}"
        )
    table = np.full(256, OUTSIDE, np.uint8)
    table[:num_classes] = np.arange(num_classes)
    table[[*ignored, IGNORED]] = IGNORED
    return table


def readers(
    source: Source,
    view: vision.View,
    *,
    workers: int,
    cache_mb: int,
    corrupt: str,
    ignored: Sequence[int] | None = None,
) -> tuple[Reader, Reader]:
    """Returns the readers of the training and of the evaluation split.

    Args:
      source: the data set.
      view: how images are looked at.
      workers: worker processes, which cannot share decoded images.
      cache_mb: decoded images are kept in memory if all of them take no more MiB than this.
      corrupt: "skip" skips a training image that cannot be decoded; "raise" makes it an error.
      ignored: see `Reader`.
    """
    height, width, channels = view.shape
    depth = channels + (ignored is not None)  # a target is one byte a pixel
    images = len(source.train) + len(source.eval)
    cached = workers == 0 and images * height * width * depth / 2**20 <= cache_mb
    same = dict(cached=cached, ignored=ignored)
    classes = len(source.label_names)
    return (
        Reader(source.train, classes, view, skip=corrupt == "skip", **same),
        Reader(source.eval, classes, view, skip=False, **same),
    )
