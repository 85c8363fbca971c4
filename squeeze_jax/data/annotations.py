"""Annotations that move with an image's pixels: label maps and boxes, checked and laid out as the rows of a batch.

The classes here read an annotation from an `Example`, raise an error that names the example if it is wrong, and give all
rows of a batch the same shape. `target.py` crops, resizes and flips a single annotation.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from squeeze_jax.data import target, vision
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.source import IGNORED, Boxes, Example
from squeeze_jax.errors import UserError

OUTSIDE = 254  # stands for a label that is neither a class nor ignored
NO_BOX = -1  # the label of a row without a box
TOLERANCE = 1.0  # pixels that a box may reach beyond its image, because of rounding


class Annotation(Protocol):
    """One kind of annotation under one view, such as `Maps` or `BoxLists`."""

    def empty(self, rows: int) -> Batch:
        """Returns a batch of `rows` rows without annotations."""

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        """Returns one row: the annotation of an image, moved in the same way as the image.

        Args:
          example: has the annotation.
          size: (width, height) of the upright image.
          draws: random numbers [DRAWS], to move the annotation as `vision.random_resized` does; None to move it as
            `vision.still` does.

        Raises:
          UserError: the annotation cannot be read, or does not fit its image or the classes.
        """

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        """Moves the annotations of a batch as `vision.pad_crop` moves its images; works in place."""

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        """Mirrors the annotations whose images `vision.augment` mirrors; works in place."""


class Maps:
    """Label maps: "target" uint8 [b, h, w], with 255 for pixels that do not count.

    Args:
      view: the size and the transforms of the images.
      num_classes: labels must be below this number, or be ignored.
      ignored: labels in the files that do not count, in addition to 255.

    Raises:
      UserError: there are more classes than 8-bit labels allow.
    """

    def __init__(self, view: vision.View, num_classes: int, ignored: Sequence[int]):
        if num_classes > OUTSIDE:
            raise UserError(
                f"a target has 8-bit labels, at most {OUTSIDE} classes, not {num_classes}"
            )
        self.view, self.num_classes = view, num_classes
        self._table = np.full(256, OUTSIDE, np.uint8)  # stored label → label in a batch
        self._table[:num_classes] = np.arange(num_classes)
        self._table[[*ignored, IGNORED]] = IGNORED

    def empty(self, rows: int) -> Batch:
        """Returns `rows` label maps without labels: all pixels are ignored."""
        return {"target": np.full((rows, *self.view.shape[:2]), IGNORED, np.uint8)}

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        """Returns the label map of an image, see `Annotation.read`."""
        labels = self._labels(example, size)
        if draws is None:
            return {"target": target.still(labels, self.view)}
        return {"target": target.random_resized(labels, self.view, draws)}

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        """Moves the label maps of a batch as `vision.pad_crop` moves its images; works in place."""
        batch["target"] = target.pad_crop(batch["target"], self.view.pad, draws)

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        """Mirrors the label maps whose images `vision.augment` mirrors; works in place."""
        target.flip(batch["target"], draws)

    def _labels(self, example: Example, size: tuple[int, int]) -> np.ndarray:
        """Returns the labels of an image with the given (width, height), uint8 [h, w]."""
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
    rows are zeros with the label -1. A crop clips boxes. It drops a box if nothing of it stays inside, or less than
    `min_visible` of its area. "dropped_boxes" counts the dropped boxes of each image.

    Args:
      view: the size and the transforms of the images.
      num_classes: labels must be below this number.
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
        """Returns `rows` rows without boxes."""
        return {
            "boxes": np.zeros((rows, self.max_boxes, 4), np.float32),
            "box_labels": np.full((rows, self.max_boxes), NO_BOX, np.int32),
            "dropped_boxes": np.zeros(rows, np.int32),
        }

    def read(
        self, example: Example, size: tuple[int, int], draws: np.ndarray | None
    ) -> Batch:
        """Returns the boxes of an image, see `Annotation.read`."""
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
        _set_boxes(batch, 0, moved)
        batch["dropped_boxes"][0] = dropped
        return {key: values[0] for key, values in batch.items()}

    def pad_crop(self, batch: Batch, draws: np.ndarray) -> None:
        """Moves the boxes of a batch as `vision.pad_crop` moves its images; works in place."""
        height, width, _ = self.view.shape
        pad = self.view.pad
        for i, (y, x) in enumerate(vision.pad_corners(pad, draws)):
            area = (x - pad, y - pad, x - pad + width, y - pad + height)
            boxes, dropped = target.crop_boxes(
                _boxes_of(batch, i), area, (width, height), self.min_visible
            )
            _set_boxes(batch, i, boxes)
            batch["dropped_boxes"][i] += dropped

    def flip(self, batch: Batch, draws: np.ndarray) -> None:
        """Mirrors the boxes whose images `vision.augment` mirrors; works in place."""
        for i in vision.flipped_indices(draws):
            _set_boxes(
                batch, i, target.flip_boxes(_boxes_of(batch, i), self.view.shape[1])
            )


def _boxes_of(batch: Batch, i: int) -> Boxes:
    count = (batch["box_labels"][i] != NO_BOX).sum()
    return Boxes(batch["boxes"][i, :count], batch["box_labels"][i, :count])


def _set_boxes(batch: Batch, i: int, boxes: Boxes) -> None:
    count = len(boxes.labels)
    batch["boxes"][i, :count], batch["boxes"][i, count:] = boxes.corners, 0
    batch["box_labels"][i, :count] = boxes.labels
    batch["box_labels"][i, count:] = NO_BOX


def checked_boxes(
    boxes: Boxes, size: tuple[int, int], num_classes: int, name: str
) -> Boxes:
    """Checks boxes against their upright image, and returns them clipped to it; they may reach beyond it by one pixel.

    Args:
      boxes: the stored boxes.
      size: (width, height) of the image.
      num_classes: labels must be below this number.
      name: the name of the image in errors.

    Raises:
      UserError: the boxes are for an image of another size; corners are not finite, not in order or outside the image; or a
        label is not a class.
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
    for is_valid, fault in (
        (finite, "has a number that is not finite"),
        (inside, f"reaches out of the image of {w}x{h} pixels"),
        (ordered, "should have left < right and top < bottom inside the image"),
        (known, f"has a label outside the data set's {num_classes} classes"),
    ):
        if not is_valid.all():
            i = int(np.argmin(is_valid))
            where = ", ".join(f"{number:g}" for number in corners[i].tolist())
            raise UserError(
                f"box {i} of {name}, ({where}) with label {labels[i]}, {fault}; mend or remove it"
            )
    return Boxes(clipped.astype(np.float32), labels)


def too_many_boxes(name: str, count: int, max_boxes: int) -> UserError:
    """Returns the error for an image that has more boxes than fit into a batch."""
    return UserError(
        f"{name} has {count} boxes, more than config.data.max_boxes = {max_boxes}: raise it to {count}"
    )
