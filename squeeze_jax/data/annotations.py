"""The annotations that move with an image's pixels, checked and laid out as rows of a batch: maps of labels, and boxes.

`target.py` moves one annotation; a class here reads it from an `Example`, names the example that is wrong, and gives all
rows of a batch one shape.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from squeeze_jax.data import target, vision
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.source import IGNORED, Boxes, Example
from squeeze_jax.errors import UserError

OUTSIDE = 254  # in a table of labels: no class and not ignored
NO_BOX = -1  # the label of a row without a box
TOLERANCE = (
    1.0  # pixels by which a box may reach out of its image, as rounding makes it
)


class Annotation(Protocol):
    """One kind of annotation under one view."""

    def empty(self, rows: int) -> Batch:
        """Returns so many rows without an annotation."""

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        """Returns one row: the annotation of an upright image of that (width, height).

        It is moved as `vision.still` moves the image, or as `vision.random_resized` does with the random numbers [DRAWS].

        Raises:
          UserError: an annotation that cannot be read or does not fit its image or the classes.
        """

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        """Moves the annotations of a batch as `vision.pad_crop` moves its images, in place."""

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        """Mirrors the annotations whose images `vision.augment` mirrors, in place."""


class Maps:
    """Maps of labels: "target" uint8 [b, h, w], 255 where a pixel does not count.

    Args:
      view: how images are looked at.
      num_classes: labels must be below it, or be ignored.
      ignored: labels in the files that do not count, beside 255.

    Raises:
      UserError: more classes than 8 bits tell apart.
    """

    def __init__(self, view: vision.View, num_classes: int, ignored: Sequence[int]):
        if num_classes > OUTSIDE:
            raise UserError(
                f"a target has 8-bit labels, at most {OUTSIDE} classes, not {num_classes}"
            )
        self.view, self.num_classes = view, num_classes
        self._table = np.full(256, OUTSIDE, np.uint8)  # what each stored label becomes
        self._table[:num_classes] = np.arange(num_classes)
        self._table[[*ignored, IGNORED]] = IGNORED

    def empty(self, rows: int) -> Batch:
        return {"target": np.full((rows, *self.view.shape[:2]), IGNORED, np.uint8)}

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        labels = self._labels(example, size)
        if draws is None:
            return {"target": target.still(labels, self.view)}
        return {"target": target.random_resized(labels, self.view, draws)}

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        batch["target"] = target.pad_crop(batch["target"], self.view.pad, draws)

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        target.flip(batch["target"], draws)

    def _labels(self, example: Example, size: tuple[int, int]) -> np.ndarray:
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


class BoxLists:
    """Boxes: "boxes" float32 [b, n, 4], "box_labels" int32 [b, n], "dropped_boxes" int32 [b].

    A box is left, top, right, bottom in pixels of the view. The boxes of an image come first, in their stored order; the other
    rows are zeros with the label -1. A crop clips boxes; it drops a box of which nothing, or less than `min_visible` of its
    area before the crop, stays inside. "dropped_boxes" counts the dropped boxes of each image.

    Args:
      view: how images are looked at.
      num_classes: labels must be below it.
      max_boxes: n; an image with more boxes is an error.
      min_visible: 0 to 1.
    """

    def __init__(
        self,
        view: vision.View,
        num_classes: int,
        max_boxes: int,
        min_visible: float = 0.0,
    ):
        self.view, self.num_classes = view, num_classes
        self.max_boxes, self.min_visible = max_boxes, min_visible

    def empty(self, rows: int) -> Batch:
        return {
            "boxes": np.zeros((rows, self.max_boxes, 4), np.float32),
            "box_labels": np.full((rows, self.max_boxes), NO_BOX, np.int32),
            "dropped_boxes": np.zeros(rows, np.int32),
        }

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        if example.boxes is None:
            raise UserError(
                f"{example.name} has no boxes, and its source says that images have: give it Boxes of length 0"
            )
        boxes = checked_boxes(example.boxes, size, self.num_classes, example.name)
        if len(boxes.labels) > self.max_boxes:
            raise too_many_boxes(example.name, len(boxes.labels), self.max_boxes)
        if draws is None:
            moved, dropped = target.still_boxes(
                boxes, size, self.view, self.min_visible
            )
        else:
            moved, dropped = target.random_resized_boxes(
                boxes, size, self.view, draws, self.min_visible
            )
        batch = self.empty(1)
        _put(batch, 0, moved)
        batch["dropped_boxes"][0] = dropped
        return {key: values[0] for key, values in batch.items()}

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        height, width, _ = self.view.shape
        pad = self.view.pad
        for i, (y, x) in enumerate(vision.pad_corners(pad, draws)):
            area = (x - pad, y - pad, x - pad + width, y - pad + height)
            boxes, dropped = target.crop_boxes(
                _get(batch, i), area, (width, height), self.min_visible
            )
            _put(batch, i, boxes)
            batch["dropped_boxes"][i] += dropped

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        for i in vision.flipped(draws):
            _put(batch, i, target.flip_boxes(_get(batch, i), self.view.shape[1]))


def _get(batch: Batch, i: int) -> Boxes:
    count = (batch["box_labels"][i] != NO_BOX).sum()
    return Boxes(batch["boxes"][i, :count], batch["box_labels"][i, :count])


def _put(batch: Batch, i: int, boxes: Boxes) -> None:
    count = len(boxes.labels)
    batch["boxes"][i, :count], batch["boxes"][i, count:] = boxes.corners, 0
    batch["box_labels"][i, :count] = boxes.labels
    batch["box_labels"][i, count:] = NO_BOX


def checked_boxes(
    boxes: Boxes, size: tuple[int, int], num_classes: int, name: str
) -> Boxes:
    """Returns boxes clipped to their upright image, after checking that they lie in it within a pixel.

    Args:
      boxes: as they are stored.
      size: (width, height) of the image.
      num_classes: labels must be below it.
      name: what an error calls the image.

    Raises:
      UserError: boxes for an image of another size, corners that are not finite, not in order or outside the image, a label
        that is no class.
    """
    w, h = size
    if boxes.size is not None and tuple(boxes.size) != size:
        raise UserError(
            f"{name} has {w}x{h} pixels, its boxes belong to an image of {boxes.size[0]}x{boxes.size[1]}:"
            " boxes are in pixels of the upright image; mend them or replace the image"
        )
    corners = np.asarray(boxes.corners, np.float64)
    labels = np.asarray(boxes.labels)
    if corners.shape != (len(labels), 4):
        raise UserError(
            f"{name} has {len(labels)} labels of boxes, and corners of shape {corners.shape}: they should be"
            f" {(len(labels), 4)}"
        )
    finite = np.isfinite(corners).all(1)
    inside = (corners >= -TOLERANCE).all(1)
    inside &= (corners <= np.array([w, h] * 2) + TOLERANCE).all(1)
    clipped = corners.clip(0, np.array([w, h] * 2))
    ordered = (clipped[:, 0] < clipped[:, 2]) & (clipped[:, 1] < clipped[:, 3])
    known = (labels >= 0) & (labels < num_classes)
    for fine, fault in (
        (finite, "has a number that is not finite"),
        (inside, f"reaches out of the image of {w}x{h} pixels"),
        (ordered, "should have left < right and top < bottom inside the image"),
        (known, f"has a label outside the data set's {num_classes} classes"),
    ):
        if not fine.all():
            i = int(np.argmin(fine))
            where = ", ".join(f"{number:g}" for number in corners[i].tolist())
            raise UserError(
                f"box {i} of {name}, ({where}) with label {labels[i]}, {fault}; mend or remove it"
            )
    return Boxes(clipped.astype(np.float32), labels)


def too_many_boxes(name: str, count: int, max_boxes: int) -> UserError:
    """Returns the error for an image with more boxes than a batch has room for."""
    return UserError(
        f"{name} has {count} boxes, more than config.data.max_boxes = {max_boxes}: raise it to {count}"
    )
