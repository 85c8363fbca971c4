"""Pairs of an image and its target, `root/train/NAME.jpg` and `root/trainannot/NAME.png`, in a folder or a zip archive.

A target is a PNG with one channel of 1 to 8 bits, the class number of each pixel. 255 marks pixels that do not count. The suffix
may be in upper case.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

from squeeze_jax.data import photos, survey, target
from squeeze_jax.data.source import IGNORED, Example, Source
from squeeze_jax.errors import UserError
from squeeze_jax.files import open_file, read_file, suffix
from squeeze_jax.ranges import PathStr, Range


def make(
    root: PathStr,
    classes: PathStr | Sequence[str],
    *,
    ignored: Sequence[Annotated[int, Range(0, 255)]] = (),
    train: PathStr = "train",
    eval: PathStr = "test",
) -> Source:
    """Lists the images under `root` and their targets.

    Args:
      root: a folder or a zip archive; `~` is expanded. Hidden and other files are left out; a line of the plan counts and
        names them.
      classes: the names of the classes in the order of their numbers, or a text file with one name per line.
      ignored: labels that do not count, 0 to 255, in addition to 255; the number of a class leaves out that class.
      train, eval: the folders of the training and evaluation images; their targets are in folders with `annot` appended.

    Raises:
      UserError: there is no such folder or split, an image has no target, or there are fewer than two classes.
    """
    for label in ignored:
        if not 0 <= label <= 255:
            raise UserError(
                f"config.data.source.ignored has {label}: labels are 0 to 255"
            )
    files = open_root(root)
    splits = (train, eval)
    listed = files.names()
    results = [
        name
        for name in listed
        if name.endswith(photos.RESULT) and _is_result(files, name)
    ]
    names = [name for name in listed if name not in set(results)]
    pairs = {split: _pairs(files, set(names), split) for split in splits}
    images, targets = zip(*pairs[train], *pairs[eval], strict=True)
    surveyed = survey.survey_images(images, files.open)
    unreadable = survey.unreadable_files(targets, files.open, target.check_mode)
    surveyed = surveyed._replace(targets=unreadable)
    return Source(
        label_names=_names(classes),
        channels=surveyed.channels,
        train=_Pairs(files, pairs[train]),
        eval=_Pairs(files, pairs[eval]),
        ignored=(*ignored, IGNORED),
        survey=surveyed,
        notes=_notes(files, names, pairs, results),
    )


def _names(classes: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        try:
            content = read_file(Path(classes).expanduser())
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"config.data.source.classes = {classes!r} is no text file with a name per line: {error}"
            ) from None
        classes = [line.strip() for line in lines if line.strip()]
    names = tuple(classes)
    blank = [name for name in names if not name.strip()]
    if len(names) < 2 or len(set(names)) < len(names) or blank:
        raise UserError(
            f"config.data.source.classes should have two or more different names, not {names}"
        )
    return names


def _pairs(files, listed: set[str], split: str) -> tuple[tuple[str, str], ...]:
    """Returns the paths (image, target) for every image of a split, sorted."""
    images = [
        name
        for name in photos.separate_images(listed).images
        if PurePosixPath(name).parent == PurePosixPath(split)
    ]
    if not images:
        raise UserError(
            f"{files.root} has no images in {split}/ ({' '.join(photos.SUFFIXES)})"
        )
    targets = {}
    # If a target is there twice, the name in lower case comes last and counts.
    for name in sorted(listed):
        path = PurePosixPath(name)
        if path.parent == PurePosixPath(f"{split}annot") and suffix(name) == ".png":
            targets[path.stem] = name
    pairs = []
    for image in images:
        stem = PurePosixPath(image).stem
        if stem not in targets:
            raise UserError(
                f"{files.root}: {image} lacks its target {split}annot/{stem}.png; add the target or remove the image"
            )
        pairs.append((image, targets[stem]))
    return tuple(pairs)


def _is_result(files, name: str) -> bool:
    try:
        with files.open(name) as file:
            return photos.is_result(file)
    except (OSError, RuntimeError, zipfile.BadZipFile):
        return False


def _notes(
    files, names: Sequence[str], pairs: dict[str, tuple], results: Sequence[str]
) -> tuple[str, ...]:
    """Returns lines that count and name the files left out in the splits' folders: results, targets without an image, others."""
    used = {name for split in pairs.values() for pair in split for name in pair}
    targets = {PurePosixPath(f"{split}annot") for split in pairs}
    folders = {PurePosixPath(split) for split in pairs} | targets

    def is_relevant(name: str) -> bool:
        path = PurePosixPath(name)
        return bool(folders & set(path.parents)) or photos.is_hidden(path.parts[0])

    listing = photos.separate_images(
        n for n in names if n not in used and is_relevant(n)
    )
    unpaired = [n for n in listing.images if PurePosixPath(n).parent in targets]
    misplaced = [n for n in listing.images if PurePosixPath(n).parent not in targets]
    others = [*listing.left_out, *misplaced]
    notes = []
    if results:
        notes.append(
            f"left out in {files.root}: {len(results)} result{'s' if len(results) > 1 else ''} of the job predict ({photos.join_names(results)})"
        )
    if unpaired:
        notes.append(
            f"left out in {files.root}: {len(unpaired)} target{'s' if len(unpaired) > 1 else ''} without an image ({photos.join_names(unpaired)})"
        )
    if others:
        notes.append(f"left out in {files.root}: {photos.describe(others)}")
    return tuple(notes)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    files: "Folder | Zip"
    pairs: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, indices: Sequence[int]) -> list[Example]:
        examples = []
        for i in indices:
            image, label_map = self.pairs[i]
            name = f"{self.files.root}/{image}"
            examples.append(
                Example(self.files.read(image), 0, name, self.files.read(label_map))
            )
        return examples


def open_root(root: str) -> "Folder | Zip":
    """Returns the files of a zip archive, which its suffix tells, or of a folder."""
    return Zip(root) if suffix(root) == ".zip" else Folder(root)


class Folder:
    """The files below a folder, named by their paths relative to it."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(
                f"config.data.source.root = {root!r} is neither a folder nor a zip archive"
            )

    def names(self) -> list[str]:
        """Returns the paths of all files."""
        return photos.walk(self.root)

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading."""
        return open_file(self.root / name)

    def read(self, name: str) -> bytes:
        """Returns the content of a file; raises a UserError if it cannot be read."""
        try:
            return read_file(self.root / name)
        except OSError as error:
            raise UserError(
                f"cannot read {self.root / name}: {error.strerror}"
            ) from None


class Zip:
    """The files in a zip archive, named by their paths in it; each process opens the archive itself."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser()
        self._open()

    def __getstate__(self):
        return {"root": self.root}

    def __setstate__(self, state):
        self.root = state["root"]
        self._open()

    def names(self) -> list[str]:
        """Returns the paths of all files."""
        return [name for name in self._archive.namelist() if not name.endswith("/")]

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading."""
        return self._archive.open(name)

    def read(self, name: str) -> bytes:
        """Returns the content of a file; raises a UserError if it cannot be read."""
        try:
            return self._archive.read(name)  # zipfile has a lock for threads
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            # Encrypted files and unknown compressions raise a RuntimeError.
            raise UserError(f"cannot read {name} in {self.root}: {error}") from None

    def _open(self):
        try:
            self._archive = zipfile.ZipFile(self.root)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot open the archive {self.root}: {error}") from None
