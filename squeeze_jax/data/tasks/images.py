"""Images and their classes: which pixels a network gets, from a source of `data/sources`."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data import answering, mix, photos, pipeline, survey, vision
from squeeze_jax.data.normalise import (
    check_normalisation,
    normalised,
    per_channel,
)
from squeeze_jax.data.pipeline import Batches
from squeeze_jax.data.reader import Reader, readers
from squeeze_jax.data.source import LABELS
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import (
    Finite,
    NonNegative,
    Part,
    Pixels,
    Positive,
    Range,
    Threads,
    Whole,
)

PREDICTED = 32  # images at a time


def make(
    source: dict,
    size: Pixels | tuple[Pixels, Pixels],
    *,
    channels: Literal[1, 3] | None = None,
    mean: Finite | tuple[Finite, ...] = 0.5,
    std: Positive | tuple[Positive, ...] = 0.5,
    crop: Literal["none", "pad", "random_resized"] = "none",
    pad: Annotated[int, Range(0, 1024)] = 4,
    scale: tuple[Part, Part] = (0.08, 1.0),
    flip: bool = False,
    randaugment: Annotated[int, Range(0, 20)] = 0,
    magnitude: Annotated[float, Range(0, 30)] = 9.0,
    eval_resize: Annotated[int, Range(0, 16384)] = 0,
    resize: Literal["crop", "squash"] = "crop",
    mixup: NonNegative = 0.0,
    cutmix: NonNegative = 0.0,
    workers: Threads = 0,
    threads: Threads = 2,
    cache_mb: Whole = 512,
    corrupt: Literal["raise", "skip"] = "raise",
) -> "Images":
    """Opens a data set; the parameters are the keys of `config.data`.

    Args:
      source: `{"name": a file of data/sources, ...its keys}`, such as {"name": "tfds", "dataset": "cifar10", "data_dir": "..."}.
      size: images become size x size pixels, or (height, width).
      channels: 1 or 3; None keeps what the source has: 1 if all images are grey, otherwise 3.
      mean, std: of the pixels in units of 0..1, one number or one a channel; `normalise` gives (x / 255 - mean) / std.
      crop: of training images. "none": as for evaluation; "pad": the evaluation image, padded by `pad` black pixels on each
        side and cropped back at random; "random_resized": a crop of a random `scale` share of the original's area and an aspect
        ratio of 3/4 to 4/3, resized.
      pad, scale: see crop.
      flip: mirror half of the training images left to right.
      randaugment: number of RandAugment operations for each training image, 0 to 20.
      magnitude: their strength, 0 to 30.
      eval_resize: evaluation images are resized to this short side, then cropped in the centre, as torchvision's
        Resize(256) and CenterCrop(224) do; 0: to the size itself, see resize.
      resize: what becomes of evaluation images of another aspect ratio. "crop": they are resized until they just cover the
        size, and their centre is cropped; "squash": they are resized to the size, which changes their aspect ratio.
      mixup, cutmix: α of their Beta distributions, applied by `augment`; 0 is off.
      workers: worker processes that prepare batches; 0 leaves it to threads. Needed only where decoding is slower than the
        training step, as the threads of one process share Python's lock for a part of the work.
      threads: threads that prepare batches, in each process.
      cache_mb: a data set that takes less than this decoded is kept decoded in memory after its first epoch (not for
        "random_resized", not in worker processes); 0 never.
      corrupt: a training image that cannot be decoded is an error, or is skipped: a black image, mask False, and a warning. In
        evaluation it is always an error.

    Raises:
      UserError: an unknown or missing key, a value out of range, or what the source itself finds wrong.
    """
    opened = open_source(source)
    if opened.annotation != LABELS:
        raise UserError(
            f"config.data.source: {source['name']!r} has {opened.annotation} and no label per image: set config.data.name to"
            " 'segmentation' for targets, 'detection' for boxes"
        )
    if len(opened.label_names) < 2:
        raise UserError(
            f"config.data.source has the one class {''.join(opened.label_names)!r}: a classifier needs two or more"
        )
    view = vision.View(
        size=size,
        channels=channels or opened.channels,
        crop=crop,
        pad=pad,
        scale=tuple(scale),
        flip=flip,
        randaugment=randaugment,
        magnitude=magnitude,
        eval_resize=eval_resize,
        resize=resize,
    )
    if eval_resize and resize == vision.SQUASH:
        raise UserError(
            f"config.data.eval_resize = {eval_resize} keeps the aspect ratio, and config.data.resize = 'squash' does not:"
            " set eval_resize to 0, or resize to 'crop'"
        )
    mean, std = per_channel(mean), per_channel(std)
    check_normalisation(mean, std, view.channels)
    for key, value in dict(
        mixup=mixup, cutmix=cutmix, workers=workers, threads=threads, cache_mb=cache_mb
    ).items():
        if value < 0:
            raise UserError(f"config.data.{key} = {value} should not be negative")
    train_reader, eval_reader = readers(
        opened, view, workers=workers, cache_mb=cache_mb, corrupt=corrupt
    )
    return Images(
        label_names=opened.label_names,
        view=view,
        train_reader=train_reader,
        eval_reader=eval_reader,
        mean=mean,
        std=std,
        mixup=mixup,
        cutmix=cutmix,
        workers=workers,
        threads=threads,
        notes=survey.notes(opened, view),
    )


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set under one view of its images, see `pipeline.Data`; `make` builds it.

    Batches are dicts of numpy arrays: "image" uint8 [b, h, w, c], "label" int32 [b], "mask" bool [b] (False: padding or a
    skipped image), "index" int64 [b].
    """

    reads = "images"
    noun = "image"
    ranges: ClassVar = {"image": (0.0, 255.0)}  # pixels, in files of integers
    objective: ClassVar = {"name": "losses.cross_entropy"}
    metrics = "classification"

    label_names: tuple[str, ...]
    view: vision.View
    train_reader: Reader
    eval_reader: Reader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixup: float
    cutmix: float
    workers: int
    threads: int
    notes: tuple[str, ...] = ()  # lines of the plan before training

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        return self.view.shape

    @property
    def model(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    @property
    def describe(self) -> str:
        size = "{}x{}x{}".format(*self.shape)
        return (
            f"{self.num_train:,} train + {self.num_eval:,} test images at {size},"
            f" {self.num_classes} classes"
        )

    @property
    def fixed(self) -> bool:
        view = self.view
        still = view.crop == "none" and not view.flip and not view.randaugment
        return still and not self.mixup and not self.cutmix

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
        """The endless stream of shuffled, augmented batches, see `pipeline.training`."""
        how = dict(workers=self.workers, threads=self.threads)
        return pipeline.training(self.train_reader, batch, seed, start, process, **how)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Batches:
        """Every evaluation image once and in order, see `pipeline.evaluation`.

        Raises:
          UserError: also while iterating, for an image that cannot be decoded.
        """
        how = dict(workers=self.workers, threads=self.threads)
        return pipeline.evaluation(self.eval_reader, batch, process, **how)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """All batches have one shape."""
        shapes = {
            "image": ((rows, *self.shape), jnp.uint8),
            "label": ((rows,), jnp.int32),
            "mask": ((rows,), jnp.bool_),
        }
        return [{k: jax.ShapeDtypeStruct(*spec) for k, spec in shapes.items()}]

    def inputs(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Normalised images, float32 [b, h, w, c]."""
        return self.normalise(batch["image"])

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)

    def normalise(self, images):
        """(x / 255 - mean) / std of [b, h, w, c] pixels 0..255 of any dtype; a jnp function, float32."""
        return normalised(images, self.mean, self.std)

    def augment(self, key, batch):
        """mixup and CutMix under jit, see `mix.augment`; labels become float32 [b, num_classes]. Identity when both are off."""
        return mix.augment(
            key,
            batch,
            num_classes=self.num_classes,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )

    def decode(self, image: bytes | str | os.PathLike, name: str = "") -> np.ndarray:
        """Returns uint8 [h, w, c] of an encoded image, or of a file by its path, as evaluation sees it.

        Raises:
          UserError: no such file, or no image; calls it by its path, or bytes by `name`.
        """
        return photos.decode(image, self.view, name)

    def predict(self, given: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the five likeliest labels of each image file, also in folders, or why it has no answer.

        Raises:
          UserError: no file; after all answers, files that have none.
        """
        files, left_out = photos.find(given)
        yield from left_out
        reasons = []
        for begin in range(0, len(files), PREDICTED):
            some = files[begin : begin + PREDICTED]
            tried = [answering.attempt(self.decode, path) for path in some]
            reasons += [reason for _, reason in tried if reason]
            if reasons and len(files) == 1:  # the error says it
                break
            good = [image for image, reason in tried if not reason]
            rows = iter(self._probabilities(good, run) if good else ())
            for path, (_, reason) in zip(some, tried, strict=True):
                yield str(path)
                if reason:
                    yield f"  {reason}"
                    continue
                row = next(rows)
                for label in np.argsort(-row)[:5]:
                    yield f"  {row[label]:6.1%}  {self.name(label)}"
        answering.check(reasons, len(files), "image")

    def _probabilities(self, images: Sequence[np.ndarray], run: Callable) -> np.ndarray:
        """Returns float32 [b, num_classes] of decoded images."""
        logits = jnp.asarray(run({"image": np.stack(images)}), jnp.float32)
        return np.asarray(jax.nn.softmax(logits))

    def name(self, label: int) -> str:
        """A label's name; a network may have more classes than the data name."""
        names = self.label_names
        return names[label] if label < len(names) else f"class {label}"
