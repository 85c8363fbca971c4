"""Semantic segmentation: images with a class for each pixel, from a source whose examples have targets."""

import colorsys
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from squeeze_jax import files
from squeeze_jax.data import answering, image_set, photos, vision
from squeeze_jax.data.annotations import Maps
from squeeze_jax.data.image_set import ImageSet
from squeeze_jax.data.source import Source, class_name
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.ranges import (
    Part,
    PixelMean,
    Pixels,
    PixelStd,
    Range,
    Threads,
    Whole,
)

GOLDEN = 0.618034  # turns of the colour wheel from one class to the next


def make(
    source: dict,
    size: Pixels | tuple[Pixels, Pixels],
    *,
    channels: Literal[1, 3] | None = None,
    mean: PixelMean | tuple[PixelMean, ...] = 0.5,
    std: PixelStd | tuple[PixelStd, ...] = 0.5,
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
) -> ImageSet:
    """Opens a dataset; the parameters are the keys of `config.data`.

    Where images are interpolated, targets take the nearest pixel; where images are padded, targets have the ignored label 255.

    Args:
      source: `{"name": a name of --list=source, ...its keys}`; its images must have targets, as the sources camvid and pairs have.
      size: images and targets become size x size pixels, or (height, width).
      channels, mean, std, crop, pad, scale, flip: see `images.make`.
      eval_resize: evaluation images and targets are resized to this short side, then cropped in the centre; a crop that
        reaches beyond the image is padded. 0 resizes them to the size directly.
      ignore: a label in the files that does not count, in addition to those that the source ignores and to 255.
      workers, threads, cache_mb, corrupt: see `images.make`.

    Raises:
      UserError: a key is unknown or missing, a value is out of range, or the source itself raises an error.
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
    return image_set.make(
        opened,
        view,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        cache_mb=cache_mb,
        corrupt=corrupt,
        annotation=Maps(view, len(opened.label_names), (*opened.ignored, ignore)),
        arrays={"target": (view.shape[:2], jnp.uint8)},
        having=" with targets",
        objective={"name": "losses.cross_entropy"},
        metrics="segmentation",
        predict=partial(_predict, view, opened.label_names),
        notes=_ignored(opened, ignore),
    )


def _ignored(source: Source, ignore: int) -> tuple[str, ...]:
    """Returns a line that names the classes whose pixels do not count."""
    numbers = {*source.ignored, ignore}
    names = [name for n, name in enumerate(source.label_names) if n in numbers]
    return (f"classes that do not count: {', '.join(names)}",) if names else ()


def _predict(
    view: vision.View,
    label_names: Sequence[str],
    arguments: Sequence[str],
    run: Callable,
) -> Iterator[str]:
    """Writes each image's classes to NAME_classes.png beside it, and yields their shares of the pixels.

    The PNG has a palette, the class numbers as its pixels, and the size of the network's inputs. It replaces only a file that
    this function has written.

    Args:
      view: the size and the transforms.
      label_names: the names of the classes.
      arguments: image files, or folders of them.
      run: see `pipeline.Data`.

    Raises:
      UserError: there is no file; or, after all answers, a file has no answer.
    """
    listed, left_out = photos.find_images(arguments)
    written = [path for path in listed if path.name.endswith(photos.RESULT)]
    if written:
        names = photos.join_names([str(path) for path in written])
        left_out.append(f"left out: {len(written)} *{photos.RESULT} files ({names})")
    yield from left_out
    paths = [path for path in listed if path not in set(written)]
    reasons, pictures = [], {}
    for path in paths:
        image, reason = answering.attempt(photos.decode, path, view)
        if not reason:
            logits = np.asarray(run({"image": image[None]}))[0]
            labels = logits.argmax(-1)
            lines, reason = answering.attempt(
                _write, path, labels, label_names, pictures
            )
        if not reason:
            yield from lines
        elif len(paths) > 1:
            yield shortened(str(path), 2 * photos.LONGEST)
            yield f"  {reason}"
        reasons += [reason] if reason else []
    answering.check(reasons, len(paths), "image")


def _write(
    path: Path,
    labels: np.ndarray,
    label_names: Sequence[str],
    pictures: dict[Path, Path],
) -> list[str]:
    """Writes the classes of one image to a file and returns the lines about them.

    Args:
      path: of the image.
      labels: of its pixels, int [h, w].
      label_names: the names of the classes.
      pictures: {written file: its image}; this image is added.

    Raises:
      UserError: the file cannot be written, it already holds the classes of another image, or the user has a file of this name.
    """
    written = path.with_name(path.stem + photos.RESULT)
    if written in pictures:
        raise UserError(
            f"{written} holds the classes of {pictures[written]}: rename one of the images"
        )
    if os.path.lexists(written) and not _is_result(written):
        raise UserError(
            f"{written} exists and is no result of the job predict: move it away, or rename the image"
        )
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(palette(len(label_names)))
    text, content = PngInfo(), io.BytesIO()
    text.add_text(*photos.RESULT_MARK)
    picture.save(content, "PNG", pnginfo=text)
    files.write(written, content.getvalue())
    pictures[written] = path
    lines = [f"{path} -> {written}"]
    shares = np.bincount(labels.reshape(-1)) / labels.size
    for label in np.argsort(-shares, kind="stable"):
        if shares[label]:
            lines.append(f"  {shares[label]:6.1%}  {class_name(label_names, label)}")
    return lines


def _is_result(path: Path) -> bool:
    """Returns whether the job predict has written a file."""
    try:
        with files.open_file(path) as file:
            return photos.is_result(file)
    except OSError:
        return False


def palette(classes: int) -> list[int]:
    """Returns the red, green and blue values, 0..255, of one colour per class, with hues far apart from each other."""
    colours = []
    for number in range(classes):
        value = 1.0 if number % 2 == 0 else 0.7
        colour = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.75, value)
        colours += [round(255 * part) for part in colour]
    return colours
