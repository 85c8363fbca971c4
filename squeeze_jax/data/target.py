"""Maps of labels and boxes, moved as `vision.py` moves their image.

A map has one class number per pixel and takes the nearest pixel wherever an image is interpolated; what an image is padded
with has the label `IGNORED`. Functions get the random numbers of the image, and so the same crop and the same flip.
"""

import io

import numpy as np
from PIL import Image

from squeeze_jax.data import vision
from squeeze_jax.data.source import IGNORED, Boxes

MODES = ("1", "L", "P")


def read(target: bytes | np.ndarray) -> np.ndarray:
    """Returns the class numbers of a map, uint8 [h, w]; of a PNG with a palette its indices.

    Raises:
      vision.Undecodable: the bytes are no image, or one that has colours instead of class numbers.
    """
    if isinstance(target, np.ndarray):
        return target
    with vision.decoding():
        picture = Image.open(io.BytesIO(target))
        mode, pixels = picture.mode, np.asarray(picture)
    if mode not in MODES:
        raise vision.Undecodable(
            f"a map of labels has 8-bit class numbers, this image has mode {mode}"
        )
    return pixels.astype(np.uint8)


def still(target: np.ndarray, view: vision.View) -> np.ndarray:
    """Returns the map that belongs to `vision.still`: uint8 [h, w] of any size → uint8 of the view's size."""
    height, width, _ = view.shape
    picture = Image.fromarray(target)
    if view.eval_resize:
        size = vision.resized(picture.size, view.eval_resize)
        picture = picture.resize(size, Image.Resampling.NEAREST)
        return _cropped(np.asarray(picture), vision.centre(size, (width, height)))
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def random_resized(
    target: np.ndarray, view: vision.View, draws: np.ndarray
) -> np.ndarray:
    """Returns the map that belongs to `vision.random_resized` with the same random numbers [DRAWS]."""
    height, width, _ = view.shape
    picture = Image.fromarray(target)
    area = vision.box(*picture.size, view.scale, draws)
    return np.asarray(
        picture.resize((width, height), Image.Resampling.NEAREST, box=area)
    )


def pad_crop(targets: np.ndarray, pad: int, draws: np.ndarray) -> np.ndarray:
    """Returns the maps that belong to `vision.pad_crop`: uint8 [b, h, w] → the same shape; draws [b, DRAWS]."""
    return vision.pad_crop(targets, pad, draws, fill=IGNORED)


def flip(targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors the maps whose images `vision.augment` mirrors, in place: uint8 [b, h, w]."""
    chosen = vision.flipped(draws)
    targets[chosen] = targets[chosen][:, :, ::-1]
    return targets


def _cropped(target: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A crop that may reach beyond the map."""
    left, top, right, bottom = box
    h, w = target.shape
    out = np.full((bottom - top, right - left), IGNORED, np.uint8)
    rows, columns = (
        slice(max(top, 0), min(bottom, h)),
        slice(max(left, 0), min(right, w)),
    )
    inside = target[rows, columns]
    y, x = rows.start - top, columns.start - left
    out[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return out


def crop_boxes(
    boxes: Boxes,
    area: tuple[float, float, float, float],
    size: tuple[int, int],
    min_visible: float = 0.0,
) -> tuple[Boxes, int]:
    """Moves boxes into a crop that is resized, and clips them there.

    Args:
      boxes: in the image.
      area: (left, top, right, bottom) of the crop in the image; it may reach beyond it.
      size: (width, height) that the crop is resized to.
      min_visible: the share of a box's area that has to be inside the crop, 0 to 1.

    Returns:
      The boxes with an area inside the crop that is large enough, and how many are dropped.
    """
    left, top, right, bottom = area
    scale = np.array([size[0] / (right - left), size[1] / (bottom - top)] * 2)
    moved = (boxes.corners - np.array([left, top] * 2)) * scale
    clipped = moved.clip(0, np.array(size * 2))
    corners = clipped.astype(np.float32)
    kept = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    # Scaling may round a box that ends at the border to a hair beyond it: that is no loss of area.
    kept &= _areas(clipped) >= min_visible * _areas(moved) * (1 - 1e-6)
    return Boxes(corners[kept], boxes.labels[kept]), int((~kept).sum())


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """Mirrors the boxes of an image of that width left to right."""
    left, top, right, bottom = boxes.corners.T
    return boxes._replace(
        corners=np.stack([width - right, top, width - left, bottom], 1)
    )


def still_boxes(
    boxes: Boxes, size: tuple[int, int], view: vision.View, min_visible: float = 0.0
) -> tuple[Boxes, int]:
    """Moves the boxes of an image of that (width, height) as `vision.still` moves its pixels; returns as `crop_boxes`."""
    height, width, _ = view.shape
    if not view.eval_resize:
        return crop_boxes(boxes, (0, 0, *size), (width, height), min_visible)
    resized = vision.resized(size, view.eval_resize)
    boxes, lost = crop_boxes(boxes, (0, 0, *size), resized)
    area = vision.centre(resized, (width, height))
    boxes, outside = crop_boxes(boxes, area, (width, height), min_visible)
    return boxes, lost + outside


def random_resized_boxes(
    boxes: Boxes,
    size: tuple[int, int],
    view: vision.View,
    draws: np.ndarray,
    min_visible: float = 0.0,
) -> tuple[Boxes, int]:
    """Moves the boxes of an image as `vision.random_resized` does with the same numbers; returns as `crop_boxes`."""
    height, width, _ = view.shape
    area = vision.box(*size, view.scale, draws)
    return crop_boxes(boxes, area, (width, height), min_visible)


def _areas(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
