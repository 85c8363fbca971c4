"""Maps of labels and boxes, moved as `vision.py` moves their image.

A map has one class number per pixel and takes the nearest pixel wherever an image is interpolated; what an image is padded
with has the label `IGNORED`. Functions get the random numbers of the image, and so the same crop and the same flip.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.data import vision
from squeeze_jax.data.source import IGNORED

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


class Boxes(NamedTuple):
    """Boxes of one image.

    Attributes:
      corners: float32 [n, 4]: left, top, right, bottom in pixels.
      labels: int [n].
    """

    corners: np.ndarray
    labels: np.ndarray


def crop_boxes(
    boxes: Boxes, area: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[Boxes, int]:
    """Moves boxes into a crop that is resized, and clips them there.

    Args:
      boxes: in the image.
      area: (left, top, right, bottom) of the crop in the image; it may reach beyond it.
      size: (width, height) that the crop is resized to.

    Returns:
      The boxes with an area inside the crop, and how many are dropped because they have none.
    """
    left, top, right, bottom = area
    scale = np.array([size[0] / (right - left), size[1] / (bottom - top)] * 2)
    moved = (boxes.corners - np.array([left, top] * 2)) * scale
    moved = moved.clip(0, np.array(size * 2)).astype(np.float32)
    full = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    return Boxes(moved[full], boxes.labels[full]), int((~full).sum())


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """Mirrors the boxes of an image of that width left to right."""
    left, top, right, bottom = boxes.corners.T
    return boxes._replace(
        corners=np.stack([width - right, top, width - left, bottom], 1)
    )
