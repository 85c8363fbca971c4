"""Object detection: images with boxes and their classes, from a source whose examples have boxes."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from squeeze_jax.data import pipeline, survey, vision
from squeeze_jax.data.annotations import BoxLists, too_many_boxes
from squeeze_jax.data.normalise import (
    check_normalisation,
    normalised,
    per_channel,
)
from squeeze_jax.data.pipeline import Batches
from squeeze_jax.data.reader import Reader, readers
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import (
    Count,
    Finite,
    Part,
    Pixels,
    Positive,
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
    mean: Finite | tuple[Finite, ...] = 0.5,
    std: Positive | tuple[Positive, ...] = 0.5,
    crop: Literal["none", "pad", "random_resized"] = "none",
    pad: Annotated[int, Range(0, 1024)] = 4,
    scale: tuple[Part, Part] = (0.08, 1.0),
    flip: bool = False,
    eval_resize: Annotated[int, Range(0, 16384)] = 0,
    workers: Threads = 0,
    threads: Threads = 2,
    cache_mb: Whole = 512,
    corrupt: Literal["raise", "skip"] = "raise",
) -> "Detection":
    """Opens a data set; the parameters are the keys of `config.data`.

    Boxes move with their images and are clipped to them. RandAugment, mixup and CutMix are not available: they move no boxes.

    Args:
      source: `{"name": a file of data/sources, ...its keys}`: one whose images have boxes, such as coco.
      size: images become size x size pixels, or (height, width).
      max_boxes: rows for the boxes of an image, 1 or more; an image with more boxes is an error.
      min_visible: the share of its area, 0 to 1, that a box keeps inside a crop, or the crop drops it; 0: a box is dropped
        only if nothing of it is inside.
      channels, mean, std, crop, pad, scale, flip: as for images, see `tasks/images.py`.
      eval_resize: evaluation images are resized to this short side, then cropped in the centre, and boxes with them; 0:
        resized directly, which drops no box.
      workers, threads, cache_mb, corrupt: as for images.

    Raises:
      UserError: an unknown or missing key, a value out of range, an image with too many boxes, or what the source itself
        finds wrong.
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
    mean, std = per_channel(mean), per_channel(std)
    check_normalisation(mean, std, view.channels)
    for key, value in dict(workers=workers, threads=threads, cache_mb=cache_mb).items():
        if value < 0:
            raise UserError(f"config.data.{key} = {value} should not be negative")
    if max_boxes < 1:
        raise UserError(f"config.data.max_boxes = {max_boxes} should be 1 or more")
    if not 0 <= min_visible <= 1:
        raise UserError(f"config.data.min_visible = {min_visible} should be 0 to 1")
    crowded, count = opened.most_boxes
    if count > max_boxes:
        raise too_many_boxes(crowded, count, max_boxes)
    train_reader, eval_reader = readers(
        opened,
        view,
        workers=workers,
        cache_mb=cache_mb,
        corrupt=corrupt,
        annotation=BoxLists(view, len(opened.label_names), max_boxes, min_visible),
    )
    return Detection(
        label_names=opened.label_names,
        max_boxes=max_boxes,
        view=view,
        train_reader=train_reader,
        eval_reader=eval_reader,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        notes=survey.notes(opened, view),
    )


@dataclasses.dataclass(frozen=True)
class Detection:
    """A data set under one view of its images, see `pipeline.Data`; `make` builds it.

    Batches are dicts of numpy arrays: "image" uint8 [b, h, w, c], "boxes" float32 [b, max_boxes, 4] (left, top, right,
    bottom in pixels of the image in the batch), "box_labels" int32 [b, max_boxes] (-1: padding), "dropped_boxes" int32 [b]
    (boxes of the example that a crop left out), "mask" bool [b] (False: padding or a skipped image), "index" int64 [b].

    The library has no detector yet. One needs the files `train/losses/detection.py` and `train/metrics/detection.py`.
    """

    reads = "images"
    noun = "image"
    ranges: ClassVar = {"image": (0.0, 255.0)}  # pixels, in files of integers
    objective: ClassVar = {"name": "losses.detection"}
    metrics = "detection"

    label_names: tuple[str, ...]
    max_boxes: int
    view: vision.View
    train_reader: Reader
    eval_reader: Reader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    threads: int
    notes: tuple[str, ...] = ()  # lines of the plan before training

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (h, w, c) of an image."""
        return self.view.shape

    @property
    def model(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    @property
    def describe(self) -> str:
        size = "{}x{}x{}".format(*self.shape)
        return (
            f"{self.num_train:,} train + {self.num_eval:,} test images at {size} with boxes,"
            f" {self.num_classes} classes"
        )

    @property
    def fixed(self) -> bool:
        return self.view.crop == "none" and not self.view.flip

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    @property
    def num_train(self) -> int:
        return len(self.train_reader)

    @property
    def num_eval(self) -> int:
        return len(self.eval_reader)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Batches:
        """Returns the endless stream of shuffled, augmented batches, see `pipeline.training`."""
        how = dict(workers=self.workers, threads=self.threads)
        return pipeline.training(self.train_reader, batch, seed, start, process, **how)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Batches:
        """Returns each evaluation image once and in order, see `pipeline.evaluation`."""
        how = dict(workers=self.workers, threads=self.threads)
        return pipeline.evaluation(self.eval_reader, batch, process, **how)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the one shape that all batches have."""
        shapes = {
            "image": ((rows, *self.shape), jnp.uint8),
            "boxes": ((rows, self.max_boxes, 4), jnp.float32),
            "box_labels": ((rows, self.max_boxes), jnp.int32),
            "mask": ((rows,), jnp.bool_),
        }
        return [{k: jax.ShapeDtypeStruct(*spec) for k, spec in shapes.items()}]

    def inputs(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns normalised images, float32 [b, h, w, c]."""
        return normalised(batch["image"], self.mean, self.std)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Returns the batch as it is: the reader augments images and boxes together."""
        del key
        return batch
