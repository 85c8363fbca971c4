"""Images of a split by index: read, decode, check, keep the decoded ones in memory if asked to, and transform."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import vision
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.source import Example, Examples
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)

UNKNOWN, GOOD, BAD = 0, 1, 2


class _Cache(NamedTuple):
    state: np.ndarray  # uint8 [n]: UNKNOWN, GOOD or BAD
    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray  # int32 [n]


class Reader:
    """One split under one view. Its methods are pure functions of their arguments and may run in any thread.

    Args:
      examples: the split.
      num_classes: labels must be below it.
      view: how images are looked at.
      skip: whether an image that cannot be decoded is skipped; otherwise it is an error.
      cached: whether to keep decoded images in memory. A worker process gets a copy without them.
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
    ):
        self.examples, self.num_classes, self.view = examples, num_classes, view
        self.skip = skip
        self._skipped = set()
        # A random crop of a random area is cut from the original, which has any size.
        self._cache = None
        if cached and view.crop != "random_resized":
            n = len(examples)
            self._cache = _Cache(
                np.zeros(n, np.uint8),
                np.empty((n, *view.shape), np.uint8),
                np.zeros(n, np.int32),
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def still(self, indices: np.ndarray) -> Batch:
        """Evaluation images: "image" uint8 [b, h, w, c], "label" int32 [b], "mask" bool [b]; those not decoded are black.

        Raises:
          UserError: a label outside the classes or, unless they are skipped, an image that cannot be decoded.
        """
        if self._cache is None:
            return self._decode(
                indices, lambda image, i: vision.still(image, self.view)
            )
        state, images, labels = self._cache
        new = np.unique(indices[state[indices] == UNKNOWN])
        if len(new):
            decoded = self._decode(new, lambda image, i: vision.still(image, self.view))
            images[new], labels[new] = decoded["image"], decoded["label"]
            state[new] = np.where(decoded["mask"], GOOD, BAD)
        return {
            "image": images[indices],
            "label": labels[indices],
            "mask": state[indices] == GOOD,
        }

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Training images, as `still`, under the random transforms that `draws` [b, vision.DRAWS] decide."""
        view = self.view
        if view.crop == "random_resized":
            batch = self._decode(
                indices, lambda image, i: vision.random_resized(image, view, draws[i])
            )
            images = batch["image"]
        else:
            batch = self.still(indices)
            images = batch["image"]
            if view.crop == "pad":
                images = vision.pad_crop(images, view.pad, draws)
        images = vision.augment(images, view, draws)
        images[~batch["mask"]] = 0
        return batch | {"image": images}

    def empty(self, rows: int) -> Batch:
        """Black images that do not count."""
        return {
            "image": np.zeros((rows, *self.view.shape), np.uint8),
            "label": np.zeros(rows, np.int32),
            "mask": np.zeros(rows, bool),
        }

    def _decode(
        self, indices, transform: Callable[[bytes | np.ndarray, int], np.ndarray]
    ):
        images = np.zeros((len(indices), *self.view.shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        good = np.ones(len(indices), bool)
        for i, example in enumerate(self.examples.read(indices.tolist())):
            if not 0 <= example.label < self.num_classes:
                raise UserError(
                    f"{example.name} has label {example.label}, outside the data set's {self.num_classes} classes"
                )
            labels[i] = example.label
            try:
                images[i] = transform(example.image, i)
            except vision.Undecodable as error:
                self._undecodable(example, error)
                good[i] = False
        return {"image": images, "label": labels, "mask": good}

    def _undecodable(self, example: Example, error: vision.Undecodable):
        line = f"cannot decode image {example.name}: {error}"
        if not self.skip:
            raise UserError(
                f"{line}; replace or remove it (only training can skip it: config.data.corrupt='skip')"
            ) from None
        if example.name not in self._skipped:
            self._skipped.add(example.name)
            log.warning("%s; skipped", line)
