"""Semantic segmentation: images with a class for each pixel, from a source whose examples have targets."""

import colorsys
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from squeeze_jax.data import answering, photos, pipeline, survey, vision
from squeeze_jax.data.annotations import Maps
from squeeze_jax.data.normalise import (
    check_normalisation,
    normalised,
    per_channel,
)
from squeeze_jax.data.pipeline import Batches
from squeeze_jax.data.reader import Reader, readers
from squeeze_jax.data.source import Source
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Finite, Part, Pixels, Positive, Range, Threads, Whole

ENDING = "_classes.png"  # of the files that the job predict writes
GOLDEN = 0.618034  # turns of the colour wheel from one class to the next


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
    eval_resize: Annotated[int, Range(0, 16384)] = 0,
    ignore: Annotated[int, Range(0, 255)] = 255,
    workers: Threads = 0,
    threads: Threads = 2,
    cache_mb: Whole = 512,
    corrupt: Literal["raise", "skip"] = "raise",
) -> "Segmentation":
    """Opens a data set; the parameters are the keys of `config.data`.

    Targets take the nearest pixel where images are interpolated, and the ignored label 255 where images are padded.

    Args:
      source: `{"name": a file of data/sources, ...its keys}`: one whose images have targets, such as camvid or pairs.
      size: images and targets become size x size pixels, or (height, width).
      channels, mean, std, crop, pad, scale, flip: as for images, see `tasks/images.py`.
      eval_resize: evaluation images and targets are resized to this short side, then cropped in the centre; a crop that
        reaches beyond the image is padded; 0: resized directly.
      ignore: a label in the files, beside those that the source ignores, that does not count; 255 never does.
      workers, threads, cache_mb, corrupt: as for images.

    Raises:
      UserError: an unknown or missing key, a value out of range, or what the source itself finds wrong.
    """
    opened = open_source(source)
    if opened.ignored is None:
        raise UserError(
            f"config.data.source: {source['name']!r} has {opened.annotation}, and segmentation needs targets: use pairs"
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
    if not 0 <= ignore <= 255:
        raise UserError(f"config.data.ignore = {ignore} should be 0 to 255")
    maps = Maps(view, len(opened.label_names), (*opened.ignored, ignore))
    train_reader, eval_reader = readers(
        opened,
        view,
        workers=workers,
        cache_mb=cache_mb,
        corrupt=corrupt,
        annotation=maps,
    )
    return Segmentation(
        label_names=opened.label_names,
        view=view,
        train_reader=train_reader,
        eval_reader=eval_reader,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        notes=(*survey.notes(opened, view), *_ignored(opened, ignore)),
    )


def _ignored(source: Source, ignore: int) -> tuple[str, ...]:
    """Returns a line that names the classes whose pixels do not count."""
    numbers = {*source.ignored, ignore}
    names = [name for n, name in enumerate(source.label_names) if n in numbers]
    return (f"classes that do not count: {', '.join(names)}",) if names else ()


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A data set under one view of its images, see `pipeline.Data`; `make` builds it.

    Batches are dicts of numpy arrays: "image" uint8 [b, h, w, c], "target" uint8 [b, h, w] (255: does not count), "mask"
    bool [b] (False: padding or a skipped image), "index" int64 [b].
    """

    reads = "images"
    noun = "image"
    ranges: ClassVar = {"image": (0.0, 255.0)}  # pixels, in files of integers
    objective: ClassVar = {"name": "losses.cross_entropy"}
    metrics = "segmentation"

    label_names: tuple[str, ...]
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
            f"{self.num_train:,} train + {self.num_eval:,} test images at {size} with targets,"
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
            "target": ((rows, *self.shape[:2]), jnp.uint8),
            "mask": ((rows,), jnp.bool_),
        }
        return [{k: jax.ShapeDtypeStruct(*spec) for k, spec in shapes.items()}]

    def inputs(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns normalised images, float32 [b, h, w, c]."""
        return normalised(batch["image"], self.mean, self.std)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Returns the batch as it is: the reader augments images and targets together."""
        del key
        return batch

    def predict(self, files: Sequence[str], run: Callable) -> Iterator[str]:
        """Writes each image's classes to NAME_classes.png beside it, and tells their shares of the pixels.

        The PNG has a palette, the class numbers as its pixels, and the size that the network sees.

        Raises:
          UserError: no file; after all answers, files that have none.
        """
        found, left_out = photos.find(files)
        written = [path for path in found if path.name.endswith(ENDING)]
        if written:
            names = photos.some([str(path) for path in written])
            left_out.append(f"left out: {len(written)} *{ENDING} files ({names})")
        yield from left_out
        paths = [path for path in found if path not in set(written)]
        reasons, pictures = [], {}
        for path in paths:
            image, reason = answering.attempt(photos.decode, path, self.view)
            if not reason:
                logits = np.asarray(run({"image": image[None]}))[0]
                arguments = (path, logits.argmax(-1), pictures)
                lines, reason = answering.attempt(self._write, *arguments)
            if not reason:
                yield from lines
            elif len(paths) > 1:
                yield str(path)
                yield f"  {reason}"
            reasons += [reason] if reason else []
        answering.check(reasons, len(paths), "image")

    def _write(
        self, path: Path, labels: np.ndarray, pictures: dict[Path, Path]
    ) -> list[str]:
        """Writes the classes of one image, int [h, w], and returns the lines about them.

        Args:
          path: the image.
          labels: of its pixels.
          pictures: {written file: its image}, which grows by this one.

        Raises:
          UserError: a file that cannot be written or that holds the classes of another image.
        """
        written = path.with_name(path.stem + ENDING)
        if written in pictures:
            raise UserError(
                f"{written} holds the classes of {pictures[written]}: rename one of the images"
            )
        picture = Image.fromarray(labels.astype(np.uint8))
        picture.putpalette(palette(self.num_classes))
        try:
            picture.save(written)
        except OSError as error:
            raise UserError(f"cannot write {written}: {error.strerror}") from None
        pictures[written] = path
        lines = [f"{path} -> {written}"]
        shares = np.bincount(labels.reshape(-1)) / labels.size
        for label in np.argsort(-shares, kind="stable"):
            if shares[label]:
                lines.append(f"  {shares[label]:6.1%}  {self.name(label)}")
        return lines

    def name(self, label: int) -> str:
        """Returns a label's name; a network may have more classes than the data name."""
        names = self.label_names
        return names[label] if label < len(names) else f"class {label}"


def palette(classes: int) -> list[int]:
    """Returns red, green and blue, 0..255, of one colour after another, hues as far apart as possible."""
    colours = []
    for number in range(classes):
        value = 1.0 if number % 2 == 0 else 0.7
        colour = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.75, value)
        colours += [round(255 * part) for part in colour]
    return colours
