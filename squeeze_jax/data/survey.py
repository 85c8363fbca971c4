"""What stored images are, by their headers, before any is decoded: sizes, grey or colour, and what becomes of them."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from PIL import Image

from squeeze_jax.data import photos, vision

SAMPLE = 10_000  # files that are looked at; more are sampled evenly


class Survey(NamedTuple):
    """A dataset's images, counted.

    Attributes:
      total: images of the dataset.
      sizes: how many images have each (width, height), of those looked at.
      grey, colour: images with one channel and with more; transparency does not count.
      transparent: images with an alpha channel or a transparent colour.
      deep: images of 16 or 32 bits per channel.
      unreadable: names of files whose header cannot be read.
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
        """Returns 1 if all images are grey, otherwise 3, which loses nothing."""
        return 1 if self.grey and not self.colour else 3


def look(names: Sequence[str], opened: Callable[[str], IO[bytes]]) -> Survey:
    """Reads the headers of image files: of all, or of `SAMPLE` files evenly spaced if there are more.

    Args:
      names: of the files.
      opened: opens a file by its name.
    """
    step = max(1.0, len(names) / SAMPLE)
    chosen = [names[int(i * step)] for i in range(min(len(names), SAMPLE))]
    sizes, counts, unreadable = Counter(), Counter(), []
    for name in chosen:
        header = _header(name, opened)
        if header is None:
            unreadable.append(name)
            continue
        size, mode, transparent = header
        sizes[size] += 1
        counts["grey" if mode in vision.GREY else "colour"] += 1
        counts["transparent"] += transparent
        counts["deep"] += mode in vision.DEEP
    return Survey(len(names), dict(sizes), **counts, unreadable=tuple(unreadable))


def _header(name: str, opened: Callable) -> tuple[tuple[int, int], str, bool] | None:
    # What cannot be read is met again, and named with its reason, when it is decoded.
    with (
        contextlib.suppress(vision.Undecodable),
        vision.decoding(),
        opened(name) as file,
        Image.open(file) as image,
    ):
        return vision.upright_size(image), image.mode, vision.is_transparent(image)
    return None


def changes(survey: Survey, view: vision.View) -> list[str]:
    """Returns a phrase for each change of the stored images: their sizes, channels, transparency and depth."""
    phrases = [p for p in (_sizes(survey, view), _channels(survey, view)) if p]
    if survey.transparent:
        phrases.append(f"{survey.transparent:,} with transparency, laid on white")
    if survey.deep:
        phrases.append(f"{survey.deep:,} of 16 or 32 bits, turned into 8 bits")
    if survey.unreadable:
        phrases.append(
            f"{len(survey.unreadable):,} that cannot be read ({photos.some(survey.unreadable)})"
        )
    looked = survey.grey + survey.colour + len(survey.unreadable)
    if phrases and looked < survey.total:
        phrases.append(f"counted in a sample of {looked:,}")
    return phrases


def notes(source, view: vision.View) -> tuple[str, ...]:
    """Returns the lines that a plan prints about a source under a view: changes of its images, and files left out."""
    changed = changes(source.survey, view) if source.survey else []
    lines = [f"{source.survey.total:,} images: {'; '.join(changed)}"] if changed else []
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
    how = f"resized to {wanted}"
    other_aspect = any(w * height != h * width for w, h in sizes)
    short = view.eval_resize or (width if width == height else 0)
    if view.eval_resize or (other_aspect and view.resize == vision.CROP):
        to = f"a short side of {short}" if short else f"cover {wanted}"
        how = f"resized to {to}, of which the central {wanted} count"
    elif other_aspect:
        how += " with another aspect ratio"
    if view.crop == "random_resized":
        how += f" (in training random crops, resized to {wanted})"
    return f"{stored} pixels, {how}"


def _channels(survey: Survey, view: vision.View) -> str:
    if view.channels == 1 and survey.colour:
        other = f", beside {survey.grey:,} grey" if survey.grey else ""
        return f"{survey.colour:,} in colour, turned grey{other}"
    if view.channels == 3 and survey.grey:
        other = f", beside {survey.colour:,} in colour" if survey.colour else ""
        return f"{survey.grey:,} grey, turned into 3 equal channels{other}"
    return ""
