"""Datasets of images: the parts that all image tasks share.

An image task in `data/tasks` makes one `ImageSet`. The task decides which annotation its images have, which arrays a batch
holds in addition to the pixels, how training batches are augmented, and how predictions are printed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data import photos, pipeline, survey, vision
from squeeze_jax.data.annotations import Annotation
from squeeze_jax.data.normalise import check_normalisation, normalised, per_channel
from squeeze_jax.data.pipeline import Batch, Batches
from squeeze_jax.data.reader import ImageReader, readers
from squeeze_jax.data.source import Source, hold_out


def unchanged(key: jax.Array, batch: dict) -> dict:
    """Returns a training batch as it is, because the reader has already augmented it."""
    del key
    return batch


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A dataset of images, see `pipeline.Data`; `make` builds it.

    Batches are dicts of numpy arrays: "image" uint8 [b, h, w, c], the `arrays` of the task, "mask" bool [b] (False: padding
    or a skipped image), "index" int64 [b].

    Attributes:
      label_names: the names of the classes.
      view: the size and the transforms of the images.
      train_reader, eval_reader: read the two splits.
      validation_reader: reads the training images that were held out; None if there are none.
      mean, std: of the pixels, see `inputs`.
      workers, threads: the numbers of processes and threads that prepare batches.
      arrays: {name: (shape of one row, dtype)} of the batch arrays that go to the devices, besides "image" and "mask".
      having: the kind of annotation, for `describe`, such as " with boxes".
      objective, metrics: see `pipeline.Data`.
      augment: (key, batch) → batch, changes a training batch at random under jit.
      fixed: whether a training example is the same each time it comes.
      predict: see `pipeline.Data`; None if the task prints no predictions.
      notes: lines of the plan that is printed before training.
      unreadable: see `pipeline.Data`.
    """

    reads = "images"
    noun = "image"
    ranges: ClassVar = {"image": (0.0, 255.0)}  # pixels, in files of integers

    label_names: tuple[str, ...]
    view: vision.View
    train_reader: ImageReader
    eval_reader: ImageReader
    validation_reader: ImageReader | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    threads: int
    arrays: Mapping[str, tuple[tuple[int, ...], Any]]
    having: str
    objective: Mapping[str, Any]
    metrics: str
    augment: Callable[[jax.Array, dict], dict]
    fixed: bool
    predict: Callable[[Sequence[str], Callable], Iterator[str]] | None
    notes: tuple[str, ...]
    unreadable: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.label_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        return self.view.shape

    @property
    def model(self) -> dict[str, Any]:
        """Options of the model that follow from the data, see `pipeline.Data`."""
        return {"num_classes": self.num_classes}

    @property
    def describe(self) -> str:
        """A phrase about the dataset."""
        size = "{}x{}x{}".format(*self.shape)
        held_out = (
            f" + {self.num_validation:,} validation" if self.num_validation else ""
        )
        return (
            f"{self.num_train:,} train{held_out} + {self.num_eval:,} test images at {size}{self.having},"
            f" {self.num_classes} classes"
        )

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an exported file's inputs, without the batch axis."""
        return {"image": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    @property
    def num_train(self) -> int:
        """The number of training images."""
        return len(self.train_reader)

    @property
    def num_eval(self) -> int:
        """The number of evaluation images."""
        return len(self.eval_reader)

    @property
    def num_validation(self) -> int:
        """The number of training images that were held out."""
        return len(self.validation_reader) if self.validation_reader else 0

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Batches:
        """Returns the endless stream of shuffled, augmented batches, see `pipeline.training`."""
        options = dict(workers=self.workers, threads=self.threads)
        return pipeline.training(
            self.train_reader, batch, seed, start, process, **options
        )

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Batches:
        """Returns each evaluation image once and in order, see `pipeline.evaluation`.

        Raises:
          UserError: the processes cannot share the batch evenly; or, while iterating, an image cannot be decoded.
        """
        options = dict(workers=self.workers, threads=self.threads)
        return pipeline.evaluation(self.eval_reader, batch, process, **options)

    def validate(self, batch: int, process: tuple[int, int] = (0, 1)) -> Batches:
        """Returns each held-out training image once and in order, as evaluation sees it; see `eval`."""
        options = dict(workers=self.workers, threads=self.threads)
        return pipeline.evaluation(self.validation_reader, batch, process, **options)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the one shape that all batches have."""
        row = {"image": (self.shape, jnp.uint8), **self.arrays, "mask": ((), jnp.bool_)}
        return [
            {
                k: jax.ShapeDtypeStruct((rows, *s), dtype)
                for k, (s, dtype) in row.items()
            }
        ]

    def inputs(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the normalised pixels of a batch, (x / 255 - mean) / std, float32 [b, h, w, c]."""
        return normalised(batch["image"], self.mean, self.std)

    def example(self) -> jax.ShapeDtypeStruct:
        """Returns the shapes and dtypes of the network inputs for a batch of one example."""
        return jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)

    def decode(self, image: bytes | str | os.PathLike, name: str = "") -> np.ndarray:
        """Returns an image as evaluation sees it, uint8 [h, w, c].

        Args:
          image: the bytes of an encoded image, or the path of a file.
          name: the name of the bytes in errors.

        Raises:
          UserError: there is no such file, or it is not an image.
        """
        return photos.decode(image, self.view, name)


def make(
    source: Source,
    view: vision.View,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    workers: int,
    threads: int,
    cache_mb: int,
    corrupt: str,
    arrays: Mapping[str, tuple[tuple[int, ...], Any]],
    objective: Mapping[str, Any],
    metrics: str,
    annotation: Annotation | None = None,
    having: str = "",
    augment: Callable[[jax.Array, Batch], Batch] = unchanged,
    predict: Callable[[Sequence[str], Callable], Iterator[str]] | None = None,
    notes: Sequence[str] = (),
    validation: float = 0.0,
) -> ImageSet:
    """Makes a dataset of the images of a source under a view.

    Args:
      source: the images.
      view: the size and the transforms of the images.
      mean, std: of the pixels in units of 0..1, one number or one per channel.
      workers, threads, cache_mb, corrupt: see `tasks.images.make`.
      arrays, objective, metrics, having, augment, predict: see `ImageSet`.
      annotation: the kind of annotation that moves with the pixels; None for images that have a label.
      notes: further lines of the plan, after those about files left out and changes of the stored images.
      validation: share of the training images that is held out, see `ImageSet.validate`.

    Raises:
      UserError: the number of means or deviations does not fit the channels, or a deviation is not positive.
    """
    mean, std = per_channel(mean), per_channel(std)
    check_normalisation(mean, std, view.channels)
    reading = dict(workers=workers, cache_mb=cache_mb, corrupt=corrupt)
    notes = (*survey.plan_notes(source, view), *notes)
    source, held_out = hold_out(source, validation)
    train, evaluated = readers(source, view, annotation=annotation, **reading)
    validated = None
    if held_out:
        split = dataclasses.replace(source, train=held_out, eval=held_out)
        _, validated = readers(split, view, annotation=annotation, **reading)
    still = view.crop == "none" and not view.flip and not view.randaugment
    return ImageSet(
        label_names=source.label_names,
        view=view,
        train_reader=train,
        eval_reader=evaluated,
        validation_reader=validated,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        arrays=arrays,
        having=having,
        objective=objective,
        metrics=metrics,
        augment=augment,
        fixed=still and augment is unchanged,
        predict=predict,
        notes=notes,
        unreadable=survey.describe_unreadable(source, skip=corrupt == "skip"),
    )
