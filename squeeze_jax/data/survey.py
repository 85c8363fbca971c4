"""Counts the sizes and kinds of stored images by reading their headers only, and describes how a view changes them."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from PIL import Image

from squeeze_jax.data import photos, vision

SAMPLE = 10_000  # the largest number of files whose headers are read


class Survey(NamedTuple):
    """Counts of a dataset's images.

    Attributes:
      total: the number of images in the dataset.
      sizes: {(width, height): number of images} of the images whose headers were read.
      grey, colour: the numbers of images with one channel and with more; transparency is not a channel here.
      transparent: the number of images with an alpha channel or a transparent colour.
      deep: the number of images with 16 or 32 bits per channel.
      unreadable: the names of files whose headers cannot be read.
    """

    total: int
    sizes: dict[tuple[int, int], int]
    grey: int = 0
    colour: int = 0
    transparent: int = 0
    deep: int = 0
    unreadable: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """1 if all images are grey, otherwise 3, which loses no colours."""
        return 1 if self.grey and not self.colour else 3


def survey_images(
    names: Sequence[str], open_file: Callable[[str], IO[bytes]]
) -> Survey:
    """Counts images by the headers of their files: of all files, or of `SAMPLE` evenly spaced ones if there are more.

    Args:
      names: of the files.
      open_file: opens a file by its name.
    """
    step = max(1.0, len(names) / SAMPLE)
    chosen = [names[int(i * step)] for i in range(min(len(names), SAMPLE))]
    sizes, counts, unreadable = Counter(), Counter(), []
    for name in chosen:
        header = _header(name, open_file)
        if header is None:
            unreadable.append(name)
            continue
        size, mode, transparent = header
        sizes[size] += 1
        counts["grey" if mode in vision.GREY else "colour"] += 1
        counts["transparent"] += transparent
        counts["deep"] += mode in vision.DEEP
    return Survey(len(names), dict(sizes), **counts, unreadable=tuple(unreadable))


def _header(name: str, open_file: Callable) -> tuple[tuple[int, int], str, bool] | None:
    """Returns the (width, height), the mode and whether it is transparent; None if the header cannot be read."""
    # The error is not lost: decoding the file later raises it again, with the file's name.
    with (
        contextlib.suppress(vision.Undecodable),
        vision.decoding(),
        open_file(name) as file,
        Image.open(file) as image,
    ):
        return vision.upright_size(image), image.mode, vision.is_transparent(image)
    return None


def describe_changes(survey: Survey, view: vision.View) -> list[str]:
    """Returns a phrase for each way in which a view changes the stored images: size, channels, transparency and depth."""
    phrases = [p for p in (_sizes(survey, view), _channels(survey, view)) if p]
    if survey.transparent:
        phrases.append(f"{survey.transparent:,} with transparency, laid on white")
    if survey.deep:
        phrases.append(f"{survey.deep:,} of 16 or 32 bits, turned into 8 bits")
    if survey.unreadable:
        phrases.append(
            f"{len(survey.unreadable):,} that cannot be read ({photos.join_names(survey.unreadable)})"
        )
    examined = survey.grey + survey.colour + len(survey.unreadable)
    if phrases and examined < survey.total:
        phrases.append(f"counted in a sample of {examined:,}")
    return phrases


def plan_notes(source, view: vision.View) -> tuple[str, ...]:
    """Returns the lines that a plan prints about a source under a view: changes of its images, and files left out."""
    changes = describe_changes(source.survey, view) if source.survey else []
    lines = [f"{source.survey.total:,} images: {'; '.join(changes)}"] if changes else []
    return (*lines, *source.notes)


def _sizes(survey: Survey, view: vision.View) -> str:
    height, width, _ = view.shape
    sizes = sorted(survey.sizes)
    if not sizes or sizes == [(width, height)]:
        return ""
    stored = f"{sizes[0][0]}x{sizes[0][1]}"
    if len(sizes) > 1:
        stored += f" to {sizes[-1][0]}x{sizes[-1][1]} ({len(sizes):,} sizes)"
    wanted = f"{width}x{height}"
    change = f"resized to {wanted}"
    other_aspect = any(w * height != h * width for w, h in sizes)
    short = view.eval_resize or (width if width == height else 0)
    if view.eval_resize or (other_aspect and view.resize == vision.CROP):
        to = f"a short side of {short}" if short else f"cover {wanted}"
        change = f"resized to {to}, of which the central {wanted} count"
    elif other_aspect:
        change += " with another aspect ratio"
    if view.crop == "random_resized":
        change += f" (in training random crops, resized to {wanted})"
    return f"{stored} pixels, {change}"


def _channels(survey: Survey, view: vision.View) -> str:
    if view.channels == 1 and survey.colour:
        other = f", beside {survey.grey:,} grey" if survey.grey else ""
        return f"{survey.colour:,} in colour, turned grey{other}"
    if view.channels == 3 and survey.grey:
        other = f", beside {survey.colour:,} in colour" if survey.colour else ""
        return f"{survey.grey:,} grey, turned into 3 equal channels{other}"
    return ""
