"""Images with a target each: `root/train/NAME.jpg` beside `root/trainannot/NAME.png`, in a folder or a zip archive.

A target is a PNG of one 8-bit channel: the class number of each pixel. 255 marks pixels that do not count.
"""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from squeeze_jax.data.photos import SUFFIXES
from squeeze_jax.data.source import IGNORED, Example, Source
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import PathStr, Range


def make(
    root: PathStr,
    classes: PathStr | Sequence[str],
    *,
    ignored: Sequence[Annotated[int, Range(0, 255)]] = (),
    train: PathStr = "train",
    eval: PathStr = "test",
) -> Source:
    """Lists the images under `root` that a target belongs to.

    Args:
      root: a folder, or a zip archive; `~` is expanded.
      classes: names of the classes in the order of their numbers, or a text file with one name per line.
      ignored: labels beside 255 that do not count, 0 to 255; the number of a class leaves that class out.
      train, eval: folders of the two splits; `annot` is appended for the folders of their targets.

    Raises:
      UserError: no such folder or split, an image without a target, fewer than two classes.
    """
    for label in ignored:
        if not 0 <= label <= 255:
            raise UserError(
                f"config.data.source.ignored has {label}: labels are 0 to 255"
            )
    files = Zip(root) if str(root).endswith(".zip") else Folder(root)
    splits = (train, eval)
    listed = files.names()
    pairs = {split: _pairs(files, listed, split) for split in splits}
    return Source(
        label_names=_names(classes),
        channels=3,
        train=_Pairs(files, pairs[train]),
        eval=_Pairs(files, pairs[eval]),
        ignored=(*ignored, IGNORED),
    )


def _names(classes: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        try:
            lines = Path(classes).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"config.data.source.classes = {classes!r} is no text file with a name per line: {error}"
            ) from None
        classes = [line.strip() for line in lines if line.strip()]
    names = tuple(classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"config.data.source.classes should have two or more different names, not {names}"
        )
    return names


def _pairs(files, listed: set[str], split: str) -> tuple[tuple[str, str], ...]:
    """Returns (image, target) of every image of a split, sorted."""
    images = sorted(
        name
        for name in listed
        if PurePosixPath(name).parent == PurePosixPath(split)
        and PurePosixPath(name).suffix.lower() in SUFFIXES
    )
    if not images:
        raise UserError(
            f"{files.root} has no images in {split}/ ({' '.join(SUFFIXES)})"
        )
    pairs = []
    for image in images:
        target = f"{split}annot/{PurePosixPath(image).stem}.png"
        if target not in listed:
            raise UserError(
                f"{files.root}: {image} lacks its target {target}; add the target or remove the image"
            )
        pairs.append((image, target))
    return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    files: "Folder | Zip"
    pairs: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, indices: Sequence[int]) -> list[Example]:
        examples = []
        for i in indices:
            image, target = self.pairs[i]
            name = f"{self.files.root}/{image}"
            examples.append(
                Example(self.files.read(image), 0, name, self.files.read(target))
            )
        return examples


class Folder:
    """Files below a folder, by their path from there."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(
                f"config.data.source.root = {root!r} is neither a folder nor a zip archive"
            )

    def names(self) -> set[str]:
        return {
            Path(folder, file).relative_to(self.root).as_posix()
            for folder, _, files in os.walk(self.root, followlinks=True)
            for file in files
        }

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {self.root / name}: {error.strerror}"
            ) from None


class Zip:
    """Files in a zip archive, read from there; each process opens the archive for itself."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser()
        self._open()

    def __getstate__(self):
        return {"root": self.root}

    def __setstate__(self, state):
        self.root = state["root"]
        self._open()

    def names(self) -> set[str]:
        return set(self._archive.namelist())

    def read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)  # zipfile locks the file among threads
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {name} in {self.root}: {error}") from None

    def _open(self):
        try:
            self._archive = zipfile.ZipFile(self.root)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot open the archive {self.root}: {error}") from None
