"""Image classification: images with one label each, from the source that `config.data.source` names."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data import answering, image_set, mix, photos, vision
from squeeze_jax.data.image_set import ImageSet, unchanged
from squeeze_jax.data.source import LABELS, class_name
from squeeze_jax.data.source import make as open_source
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.ranges import (
    NonNegative,
    Part,
    PixelMean,
    Pixels,
    PixelStd,
    Range,
    Rate,
    Threads,
    Whole,
)

PREDICTED = 32  # images in one batch of the job predict


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
    validation: Rate = 0.0,
) -> ImageSet:
    """Opens a dataset; the parameters are the keys of `config.data`.

    Args:
      source: `{"name": a name of --list=source, ...its keys}`, such as {"name": "tfds", "dataset":
        "cifar10", "data_dir": "D"}.
      size: images become size x size pixels, or (height, width).
      channels: 1 or 3; None takes those of the source: 1 if all images are grey, otherwise 3.
      mean, std: the mean and the standard deviation of pixels in units of 0..1, one number or one per channel; networks read
        (x / 255 - mean) / std.
      crop: of training images. "none": as in evaluation; "pad": the evaluation image is padded by `pad` black pixels on each
        side and cropped back at a random place; "random_resized": a crop with a random share of the original's area, between
        the two numbers of `scale`, and an aspect ratio of 3/4 to 4/3 is resized.
      pad: for crop = "pad", the width of the padding in pixels.
      scale: for crop = "random_resized", the least and the greatest share of the original's area.
      flip: whether to mirror half of the training images left to right.
      randaugment: the number of RandAugment operations for each training image, 0 to 20.
      magnitude: the strength of the RandAugment operations, 0 to 30.
      eval_resize: evaluation images are resized to this short side, then cropped in the centre, as torchvision's
        Resize(256) and CenterCrop(224) do. 0 resizes them by `resize`.
      resize: for evaluation images with another aspect ratio. "crop": they are resized until they just cover the size, and
        their centre is cropped; "squash": they are resized to the size, which changes their aspect ratio.
      mixup, cutmix: α of the Beta distributions of mixup and CutMix; 0 is off.
      workers: the number of worker processes that prepare batches; with 0, threads prepare them. Workers help only if decoding
        is slower than the training step, because the threads of one process share Python's lock for a part of the work.
      threads: the number of threads that prepare batches, in each process.
      cache_mb: a dataset whose decoded images take at most this many MiB is kept decoded in memory after its first epoch, but
        not for "random_resized" and not in worker processes. 0 is off.
      corrupt: for a training image that cannot be decoded. "raise": an error; "skip": a black image with "mask" False, and a
        warning. In evaluation it is always an error.
      validation: the share of the training images, in [0, 1), that training leaves out, so that a search can compare networks
        on them.

    Raises:
      UserError: a key is unknown or missing, a value is out of range, or the source itself raises an error.
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
    mixing = dict(num_classes=len(opened.label_names), mixup=mixup, cutmix=cutmix)
    return image_set.make(
        opened,
        view,
        mean=mean,
        std=std,
        workers=workers,
        threads=threads,
        cache_mb=cache_mb,
        corrupt=corrupt,
        arrays={"label": ((), jnp.int32)},
        objective={"name": "losses.cross_entropy"},
        metrics="classification",
        augment=partial(mix.augment, **mixing) if mixup or cutmix else unchanged,
        predict=partial(_predict, view, opened.label_names),
        validation=validation,
    )


def _predict(
    view: vision.View,
    label_names: Sequence[str],
    arguments: Sequence[str],
    run: Callable,
) -> Iterator[str]:
    """Yields the five likeliest classes of each image file, or the reason why there are none.

    Args:
      view: the size and the transforms.
      label_names: the names of the classes.
      arguments: image files, or folders of them.
      run: see `pipeline.Data`.

    Raises:
      UserError: there is no file; or, after all answers, a file has no answer.
    """
    files, left_out = photos.find_images(arguments)
    yield from left_out
    reasons = []
    for begin in range(0, len(files), PREDICTED):
        paths = files[begin : begin + PREDICTED]
        attempts = [answering.attempt(photos.decode, path, view) for path in paths]
        reasons += [reason for _, reason in attempts if reason]
        if reasons and len(files) == 1:  # the error below has the reason
            break
        images = [image for image, reason in attempts if not reason]
        rows = iter(_probabilities(images, run) if images else ())
        for path, (_, reason) in zip(paths, attempts, strict=True):
            yield shortened(str(path), 2 * photos.LONGEST)
            if reason:
                yield f"  {reason}"
                continue
            row = next(rows)
            for label in np.argsort(-row)[:5]:
                yield f"  {row[label]:6.1%}  {class_name(label_names, label)}"
    answering.check(reasons, len(files), "image")


def _probabilities(images: Sequence[np.ndarray], run: Callable) -> np.ndarray:
    """Returns the probabilities of the classes for decoded images, float32 [b, num_classes]."""
    logits = jnp.asarray(run({"image": np.stack(images)}), jnp.float32)
    return np.asarray(jax.nn.softmax(logits))
