"""Crops, resizes and flips label maps and boxes in the same way as `vision.py` does their images.

A label map has one class number per pixel. Where an image is interpolated, it takes the nearest pixel; where an image is
padded, it has the label `IGNORED`. The functions get the random numbers of the image, so they make the same crop and flip.
"""

import io

import numpy as np
from PIL import Image

from squeeze_jax.data import vision
from squeeze_jax.data.source import IGNORED, Boxes

MODES = ("1", "L", "P")  # Pillow's modes of images whose pixels can be class numbers


def read(target: bytes | np.ndarray) -> np.ndarray:
    """Returns the class numbers of a label map, uint8 [h, w]; for a PNG with a palette, the indices in the palette.

    The class numbers are those in the file: Pillow stretches grey of 2 or 4 bits to 0..255, which is undone.

    Args:
      target: an encoded image, or uint8 [h, w].

    Raises:
      vision.Undecodable: the bytes are not an image, or the image has colours instead of class numbers.
    """
    if isinstance(target, np.ndarray):
        return target
    with vision.decoding():
        picture = vision.open_picture(io.BytesIO(target))
        check_mode(picture)
        white = _white(picture)
        pixels = np.asarray(picture).astype(np.uint8)
    if white == 255:
        return pixels
    return ((pixels.astype(np.uint16) * white + 127) // 255).astype(np.uint8)


def check_mode(picture: Image.Image) -> None:
    """Raises `vision.Undecodable` if a picture has colours instead of class numbers, according to its header."""
    if picture.mode not in MODES:
        raise vision.Undecodable(
            f"a map of labels has 8-bit class numbers, this image has mode {picture.mode}"
        )
    if picture.mode == "L" and _raw_mode(picture).endswith("I"):
        raise vision.Undecodable(
            "in a map of labels 0 is black, in this image 0 is white: save it as a grey PNG"
        )


def _white(picture: Image.Image) -> int:
    """Returns the number in a file that Pillow decodes to 255; the picture's pixels are not read yet."""
    if picture.mode != "L" or not picture.tile:
        return 255
    tile = picture.tile[0]
    if tile.codec_name in ("ppm", "ppm_plain"):
        return tile.args[-1]  # a PGM's largest number, below 255 or 255
    return 255 // vision.WIDENED.get(_raw_mode(picture), 1)


def _raw_mode(picture: Image.Image) -> str:
    """Returns Pillow's word for the stored pixels without the order of their bits, such as "L;4"; "" if it has none."""
    args = picture.tile[0].args if picture.tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first.rstrip("R") if isinstance(first, str) else ""


def still(target: np.ndarray, view: vision.View) -> np.ndarray:
    """Moves a label map as `vision.still` moves its image: uint8 [h, w] of any size → uint8 of the view's size."""
    height, width, _ = view.shape
    picture = Image.fromarray(target)
    if view.eval_resize:
        size = vision.size_with_short_side(picture.size, view.eval_resize)
        picture = picture.resize(size, Image.Resampling.NEAREST)
        return _cropped(np.asarray(picture), vision.centre(size, (width, height)))
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def random_resized(
    target: np.ndarray, view: vision.View, draws: np.ndarray
) -> np.ndarray:
    """Moves a label map, uint8 [h, w], as `vision.random_resized` moves its image with the same random numbers [DRAWS]."""
    height, width, _ = view.shape
    picture = Image.fromarray(target)
    area = vision.random_box(*picture.size, view.scale, draws)
    return np.asarray(
        picture.resize((width, height), Image.Resampling.NEAREST, box=area)
    )


def pad_crop(targets: np.ndarray, pad: int, draws: np.ndarray) -> np.ndarray:
    """Moves label maps, uint8 [b, h, w], as `vision.pad_crop` moves their images with the same random numbers [b, DRAWS]."""
    return vision.pad_crop(targets, pad, draws, fill=IGNORED)


def flip(targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors the label maps, uint8 [b, h, w], whose images `vision.augment` mirrors; works in place."""
    mirrored = vision.flipped_indices(draws)
    targets[mirrored] = targets[mirrored][:, :, ::-1]
    return targets


def _cropped(target: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Returns a crop of a label map; pixels beyond the map have the label `IGNORED`."""
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
    """Moves boxes from an image into a resized crop of it, and clips them to the crop.

    Args:
      boxes: in pixels of the image.
      area: (left, top, right, bottom) of the crop in the image; the crop may reach beyond the image.
      size: (width, height) that the crop is resized to.
      min_visible: the share of a box's area that must be inside the crop to keep the box, 0 to 1.

    Returns:
      The boxes that are kept, and the number of those that are dropped: they have no area or too little area in the crop.
    """
    left, top, right, bottom = area
    scale = np.array([size[0] / (right - left), size[1] / (bottom - top)] * 2)
    moved = (boxes.corners - np.array([left, top] * 2)) * scale
    clipped = moved.clip(0, np.array(size * 2))
    corners = clipped.astype(np.float32)
    kept = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    # Rounding may move a box that ends at the border slightly beyond it. The factor keeps this from counting as lost area.
    kept &= _areas(clipped) >= min_visible * _areas(moved) * (1 - 1e-6)
    return Boxes(corners[kept], boxes.labels[kept]), int((~kept).sum())


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """Mirrors the boxes of an image of `width` pixels left to right."""
    left, top, right, bottom = boxes.corners.T
    return boxes._replace(
        corners=np.stack([width - right, top, width - left, bottom], 1)
    )


def still_boxes(
    boxes: Boxes, size: tuple[int, int], view: vision.View, min_visible: float = 0.0
) -> tuple[Boxes, int]:
    """Moves the boxes of an image as `vision.still` moves its pixels.

    Args:
      boxes: in pixels of the image.
      size: (width, height) of the image.
      view: the size and the transforms.
      min_visible: see `crop_boxes`.

    Returns:
      The boxes that are kept, and the number of those that are dropped.
    """
    height, width, _ = view.shape
    if not view.eval_resize:
        return crop_boxes(boxes, (0, 0, *size), (width, height), min_visible)
    resized_size = vision.size_with_short_side(size, view.eval_resize)
    boxes, lost = crop_boxes(boxes, (0, 0, *size), resized_size)
    area = vision.centre(resized_size, (width, height))
    boxes, outside = crop_boxes(boxes, area, (width, height), min_visible)
    return boxes, lost + outside


def random_resized_boxes(
    boxes: Boxes,
    size: tuple[int, int],
    view: vision.View,
    draws: np.ndarray,
    min_visible: float = 0.0,
) -> tuple[Boxes, int]:
    """Moves the boxes of an image as `vision.random_resized` moves its pixels.

    Args:
      boxes: in pixels of the image.
      size: (width, height) of the image.
      view: the size and the transforms.
      draws: the random numbers of the image, [DRAWS].
      min_visible: see `crop_boxes`.

    Returns:
      The boxes that are kept, and the number of those that are dropped.
    """
    height, width, _ = view.shape
    area = vision.random_box(*size, view.scale, draws)
    return crop_boxes(boxes, area, (width, height), min_visible)


def _areas(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
