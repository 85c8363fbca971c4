"""A folder of image files, one folder a class.

Two layouts: `root/train/CLASS/*.jpg` beside `root/test/CLASS/*.jpg` (or `val`, `validation`, `eval`), or `root/CLASS/*.jpg` of
which a fixed share is held out for evaluation. Classes are numbered in the order of their sorted names.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from squeeze_jax.data.source import Example, Source
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.ranges import PathStr, Rate

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif")
EVAL_NAMES = ("test", "val", "validation", "eval")


def make(root: PathStr, holdout: Rate = 0.0) -> Source:
    """Lists the images under `root`.

    Args:
      root: the folder; `~` is expanded.
      holdout: share of the images in (0, 1) to hold out where `root` has no `train` folder. A file is held out or not by
        the hash of its class and name alone, so that adding images moves no other.

    Raises:
      UserError: no such folder, no images, a class without images, a class that only the evaluation split has.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"config.data.source.root = {root!r} is not a folder")
    if (base / "train").is_dir():
        if holdout:
            raise UserError(
                f"config.data.source.holdout = {holdout}: {base} has its own split folders; leave holdout out"
            )
        classes, train = _scan(base / "train")
        second = next((n for n in EVAL_NAMES if (base / n).is_dir()), None)
        if second is None:
            raise UserError(
                f"{base} has a train folder but no {' or '.join(EVAL_NAMES)} folder beside it"
            )
        found, test = _scan(base / second)
        for name in found:
            if name not in classes:
                raise UserError(
                    f"{base / second / name}: class {name!r} is not in {base / 'train'}{nearest(name, classes)}"
                )
    else:
        if not 0 < holdout < 1:
            raise UserError(
                f"{base} has no train folder: add one, or hold out a share with config.data.source.holdout=0.1"
                + (f" (it is {holdout}, not between 0 and 1)" if holdout else "")
            )
        classes, files = _scan(base)
        train = [f for f in files if _share(f) >= holdout]
        test = [f for f in files if _share(f) < holdout]
    for what, files in ("training", train), ("evaluation", test):
        if not files:
            raise UserError(f"{base}: no image is left for {what}")
    label = {name: i for i, name in enumerate(classes)}
    return Source(
        label_names=tuple(classes),
        channels=_channels(train[0]),
        train=_Files(tuple((str(f), label[c]) for c, _, f in train)),
        eval=_Files(tuple((str(f), label[c]) for c, _, f in test)),
    )


def _scan(base: Path) -> tuple[list[str], list[tuple[str, str, Path]]]:
    """Returns the sorted class names and `(class, name inside the class, path)` of every image."""
    classes = sorted(
        p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    if not classes:
        raise UserError(f"{base} holds no folders: put each class's images in a folder")
    files = []
    for name in classes:
        paths = sorted(
            Path(folder, file)
            for folder, _, found in os.walk(base / name, followlinks=True)
            for file in found
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
        )
        if not paths:
            raise UserError(
                f"{base / name} holds no images ({' '.join(SUFFIXES)}): fill or remove it"
            )
        files += [(name, p.relative_to(base / name).as_posix(), p) for p in paths]
    return classes, files


def _share(file: tuple[str, str, Path]) -> float:
    """A fixed pseudo-random number in [0, 1) for a file of a class."""
    digest = hashlib.sha256(f"{file[0]}/{file[1]}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _channels(file: tuple[str, str, Path]) -> int:
    """1 for grey, 3 for anything else; an unreadable first image is met again, and named, when it is decoded."""
    try:
        with Image.open(file[2]) as image:
            return 1 if image.mode in ("1", "L", "I;16") else 3
    except OSError:
        return 3


@dataclasses.dataclass(frozen=True)
class _Files:
    files: tuple[tuple[str, int], ...]  # (path, label)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> list[Example]:
        return [
            Example(_bytes(self.files[i][0]), self.files[i][1], self.files[i][0])
            for i in indices
        ]


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
