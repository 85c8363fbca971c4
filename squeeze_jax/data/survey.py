"""Counts the sizes and kinds of stored images by reading their headers only, and describes how a view changes them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

from PIL import Image

from squeeze_jax.data import photos, vision

SAMPLE = 10_000  # the largest number of files whose headers are read


class Unreadable(NamedTuple):
    """A file whose header shows that it cannot be decoded.

    Attributes:
      index: position of the example; training examples come first, evaluation examples follow.
      name: of the file.
      reason: why it cannot be decoded.
    """

    index: int
    name: str
    reason: str


class Survey(NamedTuple):
    """Counts of a dataset's images.

    Attributes:
      total: the number of images in the dataset.
      sizes: {(width, height): number of images} of the images whose headers were read.
      grey, colour: the numbers of images with one channel and with more; transparency is not a channel here.
      transparent: the number of images with an alpha channel or a transparent colour.
      deep: the number of images with more than 8 bits per channel.
      unreadable: the images that cannot be decoded.
      palette: the number of images whose pixels are numbers of colours in a palette.
      rotated: the number of images that their EXIF data turn or mirror.
      frames: the number of files with several frames or pages, of which the first counts.
      modes: (Pillow's mode, number of images) of images that are neither grey nor RGB, such as (("CMYK", 2),).
      targets: the targets that cannot be decoded.
    """

    total: int
    sizes: dict[tuple[int, int], int]
    grey: int = 0
    colour: int = 0
    transparent: int = 0
    deep: int = 0
    unreadable: tuple[Unreadable, ...] = ()
    palette: int = 0
    rotated: int = 0
    frames: int = 0
    modes: tuple[tuple[str, int], ...] = ()
    targets: tuple[Unreadable, ...] = ()

    @property
    def channels(self) -> int:
        """1 if all images are grey, otherwise 3, which loses no colours."""
        return 1 if self.grey and not self.colour else 3


class _Header(NamedTuple):
    """What the header of an image's file tells; see `Survey`."""

    size: tuple[int, int]
    mode: str
    transparent: bool
    deep: bool
    rotated: bool
    frames: bool


def survey_images(
    names: Sequence[str], open_file: Callable[[str], IO[bytes]]
) -> Survey:
    """Counts images by the headers of their files: of all files, or of `SAMPLE` evenly spaced ones if there are more.

    Args:
      names: file names, of the training images first, then of the evaluation images.
      open_file: opens a file by its name.
    """
    sizes, counts, modes, unreadable = Counter(), Counter(), Counter(), []
    for header in _headers(names, open_file, _header):
        if isinstance(header, Unreadable):
            unreadable.append(header)
            continue
        sizes[header.size] += 1
        counts["grey" if header.mode in vision.GREY else "colour"] += 1
        for name in "transparent", "deep", "rotated", "frames":
            counts[name] += getattr(header, name)
        counts["palette"] += header.mode in vision.PALETTE
        if header.mode not in (*vision.GREY, *vision.COLOUR, *vision.PALETTE):
            modes[header.mode] += 1
    return Survey(
        len(names),
        dict(sizes),
        **counts,
        unreadable=tuple(unreadable),
        modes=tuple(sorted(modes.items())),
    )


def unreadable_files(
    names: Sequence[str],
    open_file: Callable[[str], IO[bytes]],
    check: Callable[[Image.Image], None],
) -> tuple[Unreadable, ...]:
    """Returns the files whose headers cannot be read, or do not pass a check, among those that `survey_images` reads.

    Args:
      names, open_file: see `survey_images`.
      check: raises `vision.Undecodable` for a picture whose header is read.
    """
    found = _headers(names, open_file, check)
    return tuple(each for each in found if isinstance(each, Unreadable))


def _headers(names: Sequence[str], open_file: Callable, look: Callable) -> Iterator:
    """Yields for each file the result of `look` on its picture, whose pixels are not read, or an `Unreadable`."""
    step = max(1.0, len(names) / SAMPLE)
    for number in range(min(len(names), SAMPLE)):
        index = int(number * step)
        try:
            with (
                vision.decoding(),
                open_file(names[index]) as file,
                vision.open_picture(file) as picture,
            ):
                result = look(picture)
        except vision.Undecodable as error:
            result = Unreadable(index, names[index], str(error))
        yield result


def _header(picture: Image.Image) -> _Header:
    vision.check_integers(picture)
    return _Header(
        vision.upright_size(picture),
        picture.mode,
        vision.is_transparent(picture),
        vision.is_deep(picture),
        vision.is_rotated(picture),
        vision.has_frames(picture),  # the last, as it may move on to the next frame
    )


def describe_changes(survey: Survey, view: vision.View) -> list[str]:
    """Returns a phrase for each way in which a view changes the stored images, such as their size, channels and depth."""
    phrases = [p for p in (_sizes(survey, view), _channels(survey, view)) if p]
    wanted = "RGB" if view.channels == 3 else "grey"
    modes = [
        (count, f"in {mode}, turned {'into ' * (view.channels == 3)}{wanted}")
        for mode, count in survey.modes
    ]
    for count, change in (
        (survey.transparent, "with transparency, laid on white"),
        (survey.deep, "of 16 or 32 bits, turned into 8 bits"),
        (survey.palette, "with a palette, replaced by its colours"),
        *modes,
        (survey.rotated, "turned upright as their EXIF data say"),
        (survey.frames, "of several frames or pages, of which the first counts"),
    ):
        if count:
            phrases.append(f"{count:,} {change}")
    if survey.unreadable:
        names = [each.name for each in survey.unreadable]
        phrases.append(
            f"{len(names):,} that cannot be read ({photos.join_names(names)})"
        )
    examined = survey.grey + survey.colour + len(survey.unreadable)
    if phrases and examined < survey.total:
        phrases.append(f"counted in a sample of {examined:,}")
    return phrases


def describe_unreadable(source, skip: bool) -> str:
    """Returns the line of an error about the images and targets that training or evaluation cannot decode; "" for none.

    Args:
      source: the dataset.
      skip: whether training skips such images, so that only evaluation images count.
    """
    if source.survey is None:
        return ""
    files = (*source.survey.unreadable, *source.survey.targets)
    first = len(source.train)
    counted = [each for each in files if not skip or each.index >= first]
    if not counted:
        return ""
    named = [f"{each.name} ({each.reason})" for each in counted]
    several = len(counted) > 1
    line = f"{len(counted):,} image{'s' * several} cannot be read: {photos.join_names(named)}; replace or remove"
    line += " them" if several else " it"
    if any(each.index < first for each in counted):
        line += ", or skip images of training by config.data.corrupt='skip'"
    return line


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
