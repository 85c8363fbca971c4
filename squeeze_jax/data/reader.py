"""Reads the images of a split by index: decodes, checks and transforms them, and may keep decoded images in memory.

An image has one label, or an annotation that moves with its pixels: a target or boxes, see `annotations.py`.
"""

import logging
import math
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import vision
from squeeze_jax.data.annotations import Annotation
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.source import Example, Examples, Source
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)

# States of an image: not decoded yet, decoded, undecodable.
UNKNOWN, GOOD, BAD = 0, 1, 2


class _Cache(NamedTuple):
    state: np.ndarray  # uint8 [n]: UNKNOWN, GOOD or BAD
    rows: Batch  # images and their labels or annotations, without "mask"


class ImageReader:
    """Reads the images of one split under one view. Its methods are pure functions and may run in any thread.

    Args:
      examples: the split.
      num_classes: labels must be below this number.
      view: the size and the transforms of the images.
      skip: whether an image that cannot be decoded is skipped; otherwise it is an error.
      cached: whether to keep decoded images in memory. A worker process gets a copy of the reader without them.
      annotation: the kind of annotation that moves with the pixels; None for images that have a label.

    Raises:
      UserError: RandAugment together with annotations, which it does not move.
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
        annotation: Annotation | None = None,
    ):
        if annotation is not None and view.randaugment:
            raise UserError(
                f"config.data.randaugment = {view.randaugment} shears and rotates images without their targets or boxes:"
                " set it to 0"
            )
        self.examples, self.num_classes, self.view = examples, num_classes, view
        self.skip = skip
        self._skipped = set()
        self._annotation = annotation
        # "random_resized" crops the original image, which may have any size, so a resized image is of no use to it.
        self._cache = None
        if cached and view.crop != "random_resized":
            rows = self._rows(len(examples))
            self._cache = _Cache(np.zeros(len(examples), np.uint8), rows)

    def __len__(self) -> int:
        return len(self.examples)

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def still(self, indices: np.ndarray) -> Batch:
        """Returns evaluation images.

        Args:
          indices: int [b].

        Returns:
          A batch with "image" uint8 [b, h, w, c], "mask" bool [b], and "label" int32 [b] or the arrays of the annotation. An
          image that is skipped is black, with "mask" False.

        Raises:
          UserError: a label is outside the classes, an annotation is wrong, or an image cannot be decoded and is not skipped.
        """
        if self._cache is None:
            return self._decode(indices)
        state, rows = self._cache
        new = np.unique(indices[state[indices] == UNKNOWN])
        if len(new):
            decoded = self._decode(new)
            for key, values in rows.items():
                values[new] = decoded[key]
            state[new] = np.where(decoded["mask"], GOOD, BAD)
        batch = {key: values[indices] for key, values in rows.items()}
        return batch | {"mask": state[indices] == GOOD}

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Returns training images under random transforms; the arrays are those of `still`.

        Args:
          indices: int [b].
          draws: uniform numbers in [0, 1), [b, vision.DRAWS], that decide the transforms.
        """
        view, annotation = self.view, self._annotation
        if view.crop == "random_resized":
            batch = self._decode(indices, draws)
        else:
            batch = self.still(indices)
        if view.crop == "pad":
            batch["image"] = vision.pad_crop(batch["image"], view.pad, draws)
            if annotation is not None:
                annotation.pad_crop(batch, draws)
        images = vision.augment(batch["image"], view, draws)
        if annotation is not None and view.flip:
            annotation.flip(batch, draws)
        images[~batch["mask"]] = 0
        return batch | {"image": images}

    def empty(self, rows: int) -> Batch:
        """Returns a batch of `rows` black images with "mask" False."""
        batch = self._rows(rows)
        batch["image"][:] = 0
        return batch | {"mask": np.zeros(rows, bool)}

    def _rows(self, rows: int) -> Batch:
        """Returns a batch of `rows` images with undefined pixels and with empty labels or annotations."""
        if self._annotation is None:
            labels = {"label": np.zeros(rows, np.int32)}
        else:
            labels = self._annotation.empty(rows)
        return {"image": np.empty((rows, *self.view.shape), np.uint8)} | labels

    def _decode(self, indices: np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """Returns examples as evaluation sees them, or random resized crops if `draws` are given."""
        batch = self.empty(len(indices))
        for i, example in enumerate(self.examples.read(indices.tolist())):
            row = None if draws is None else draws[i]
            if self._annotation is None:
                batch["label"][i] = self._label(example)
            try:
                batch["image"][i] = self._pixels(example.image, row)
                if self._annotation is not None:
                    size = vision.size_of(example.image)
                    for key, value in self._annotation.read(example, size, row).items():
                        batch[key][i] = value
                batch["mask"][i] = True
            except vision.Undecodable as error:
                self._undecodable(example, error)
        return batch

    def _pixels(self, image: bytes | np.ndarray, row: np.ndarray | None) -> np.ndarray:
        if row is None:
            return vision.still(image, self.view)
        return vision.random_resized(image, self.view, row)

    def _label(self, example: Example) -> int:
        if not 0 <= example.label < self.num_classes:
            raise UserError(
                f"{example.name} has label {example.label}, outside the data set's {self.num_classes} classes"
            )
        return example.label

    def _undecodable(self, example: Example, error: vision.Undecodable):
        line = f"cannot decode image {example.name}: {error}"
        if not self.skip:
            raise UserError(
                f"{line}; replace or remove it (only training can skip it: config.data.corrupt='skip')"
            ) from None
        if example.name not in self._skipped:
            self._skipped.add(example.name)
            log.warning("%s; skipped", line)


def readers(
    source: Source,
    view: vision.View,
    *,
    workers: int,
    cache_mb: int,
    corrupt: str,
    annotation: Annotation | None = None,
) -> tuple[ImageReader, ImageReader]:
    """Returns the readers of the training and of the evaluation split.

    Args:
      source: the dataset.
      view: the size and the transforms of the images.
      workers: the number of worker processes; with any, decoded images are not kept, because processes cannot share them.
      cache_mb: decoded images are kept in memory if all of them take no more MiB than this.
      corrupt: "skip" skips a training image that cannot be decoded; "raise" makes it an error.
      annotation: see `ImageReader`.
    """
    size = math.prod(view.shape)
    if annotation is not None:
        size += sum(array.nbytes for array in annotation.empty(1).values())
    images = len(source.train) + len(source.eval)
    cached = workers == 0 and images * size / 2**20 <= cache_mb
    shared = dict(cached=cached, annotation=annotation)
    classes = len(source.label_names)
    return (
        ImageReader(source.train, classes, view, skip=corrupt == "skip", **shared),
        ImageReader(source.eval, classes, view, skip=False, **shared),
    )
