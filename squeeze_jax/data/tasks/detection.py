"""Object detection: images with boxes and their classes, from a source whose examples have boxes."""

from typing import Annotated, Literal

import jax.numpy as jnp

from squeeze_jax.data import image_set, vision
from squeeze_jax.data.annotations import BoxLists, too_many_boxes
from squeeze_jax.data.image_set import ImageSet
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import (
    Count,
    Part,
    PixelMean,
    Pixels,
    PixelStd,
    Range,
    Share,
    Threads,
    Whole,
)


def make(
    source: dict,
    size: Pixels | tuple[Pixels, Pixels],
    *,
    max_boxes: Count = 100,
    min_visible: Share = 0.0,
    channels: Literal[1, 3] | None = None,
    mean: PixelMean | tuple[PixelMean, ...] = 0.5,
    std: PixelStd | tuple[PixelStd, ...] = 0.5,
    crop: Literal["none", "pad", "random_resized"] = "none",
    pad: Annotated[int, Range(0, 1024)] = 4,
    scale: tuple[Part, Part] = (0.08, 1.0),
    flip: bool = False,
    eval_resize: Annotated[int, Range(0, 16384)] = 0,
    workers: Threads = 0,
    threads: Threads = 2,
    cache_mb: Whole = 512,
    corrupt: Literal["raise", "skip"] = "raise",
) -> ImageSet:
    """Opens a dataset; the parameters are the keys of `config.data`.

    A batch has "boxes" float32 [b, max_boxes, 4] (left, top, right, bottom in pixels of the image in the batch), "box_labels"
    int32 [b, max_boxes] (-1: padding) and "dropped_boxes" int32 [b] (boxes of the example that a crop left out). The library
    has no detector yet. One needs the files `train/losses/detection.py` and `train/metrics/detection.py`.

    Boxes move with their images and are clipped to them. RandAugment, mixup and CutMix are not available, because they do not
    move boxes.

    Args:
      source: `{"name": a name of --list=source, ...its keys}`; its images must have boxes, as the source coco has.
      size: images become size x size pixels, or (height, width).
      max_boxes: the number of rows for the boxes of an image, 1 or more; an image with more boxes is an error.
      min_visible: a crop drops a box if less than this share of the box's area is inside, 0 to 1. With 0 it drops only boxes
        that are completely outside.
      channels, mean, std, crop, pad, scale, flip: see `images.make`.
      eval_resize: evaluation images are resized to this short side, then cropped in the centre, and boxes with them. 0
        resizes them to the size directly, which drops no box.
      workers, threads, cache_mb, corrupt: see `images.make`.

    Raises:
      UserError: a key is unknown or missing, a value is out of range, an image has too many boxes, or the source itself raises
        an error.
    """
    opened = open_source(source)
    if opened.most_boxes is None:
        raise UserError(
            f"config.data.source: {source['name']!r} has {opened.annotation}, and detection needs boxes: use coco"
        )
    view = vision.View(
        size=size if isinstance(size, int) else tuple(size),
        channels=channels or opened.channels,
        crop=crop,
        pad=pad,
        scale=tuple(scale),
        flip=flip,
        eval_resize=eval_resize,
    )
    crowded, count = opened.most_boxes
    if count > max_boxes:
        raise too_many_boxes(crowded, count, max_boxes)
    return image_set.make(
        opened,
        view,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        cache_mb=cache_mb,
        corrupt=corrupt,
        annotation=BoxLists(view, len(opened.label_names), max_boxes, min_visible),
        arrays={
            "boxes": ((max_boxes, 4), jnp.float32),
            "box_labels": ((max_boxes,), jnp.int32),
        },
        having=" with boxes",
        objective={"name": "losses.detection"},
        metrics="detection",
    )
