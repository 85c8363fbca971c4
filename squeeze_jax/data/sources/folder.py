"""Image files in folders, with one folder per class.

There are two layouts: `root/train/CLASS/*.jpg` beside `root/test/CLASS/*.jpg` (or `val`, `validation`, `eval`), or
`root/CLASS/*.jpg` with a fixed share held out for evaluation. Classes are numbered in the order of their sorted names. Hidden
files and folders, and files without the suffix of an image, are left out; a line of the plan counts and names them. The
dataset is grey if all images are grey, otherwise it is in colour.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from squeeze_jax.data import photos, survey
from squeeze_jax.data.source import Example, Source
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.files import open_file, read_file
from squeeze_jax.ranges import PathStr, Rate

EVAL_NAMES = ("test", "val", "validation", "eval")
# Folders of these names, in upper or lower case, are splits and not classes.
SPLIT_NAMES = (
    *("train", "training", "val", "valid", "validation"),
    *("dev", "eval", "evaluation", "test", "testing"),
)


def make(root: PathStr, holdout: Rate = 0.0) -> Source:
    """Lists the images under `root`.

    Args:
      root: the folder; `~` is expanded.
      holdout: the share of the images, in (0, 1), to hold out if `root` has no `train` folder. The hash of a file's class and
        name alone decides whether it is held out, so adding images does not move others.

    Raises:
      UserError: there is no such folder, it has no images, a class has no images, or only the evaluation split has a class.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"config.data.source.root = {root!r} is not a folder")
    if (base / "train").is_dir():
        if holdout:
            raise UserError(
                f"config.data.source.holdout = {holdout}: {base} has its own split folders; leave holdout out"
            )
        eval_folder = _eval_folder(base)
        classes, train, notes = _scan(base, "train")
        eval_classes, test, eval_notes = _scan(base, eval_folder)
        notes += eval_notes
        if unused := set(_folders(base)) - {"train", eval_folder}:
            notes.append(f"not read: {', '.join(sorted(unused))} in {base}")
        for name in eval_classes:
            if name not in classes:
                raise UserError(
                    f"{base / eval_folder / name}: class {name!r} is not in {base / 'train'}{nearest(name, classes)}"
                )
    else:
        _check_no_split(base)
        if not 0 < holdout < 1:
            raise UserError(
                f"{base} has no train folder: add one, or hold out a share with config.data.source.holdout=0.1"
                + (f" (it is {holdout}, not between 0 and 1)" if holdout else "")
            )
        classes, files, notes = _scan(base, "")
        train = [f for f in files if _hash(f) >= holdout]
        test = [f for f in files if _hash(f) < holdout]
    for use, files in ("training", train), ("evaluation", test):
        if not files:
            raise UserError(f"{base}: no image is left for {use}")
        present = {file[0] for file in files}
        if absent := [name for name in classes if name not in present]:
            notes.append(f"without an image for {use}: {photos.join_names(absent)}")
    label = {name: i for i, name in enumerate(classes)}
    paths = [str(path) for _, _, path in train + test]
    surveyed = survey.survey_images(paths, open_file)
    return Source(
        label_names=tuple(classes),
        channels=surveyed.channels,
        train=_Files(tuple((str(f), label[c]) for c, _, f in train)),
        eval=_Files(tuple((str(f), label[c]) for c, _, f in test)),
        survey=surveyed,
        notes=tuple(notes),
    )


def _eval_folder(base: Path) -> str:
    """Returns the name of the evaluation split's folder."""
    name = next((n for n in EVAL_NAMES if (base / n).is_dir()), None)
    if name is None:
        similar = [n for n in _splits(base) if n != "train"]
        raise UserError(
            f"{base} has a train folder but no {' or '.join(EVAL_NAMES)} folder beside it"
            + (f": rename {similar[0]}" if similar else "")
        )
    return name


def _check_no_split(base: Path) -> None:
    """Raises a UserError if a folder has splits with other names than train, which would be read as classes."""
    splits = _splits(base)
    if splits:
        raise UserError(
            f"{base} has a folder {splits[0]}, a split and not a class: rename the splits to train and test, and leave"
            " config.data.source.holdout out; or, if it is a class, put all class folders into"
            f" {base / 'train'} and {base / 'test'}"
        )


def _splits(base: Path) -> list[str]:
    return [name for name in _folders(base) if name.lower() in SPLIT_NAMES]


def _folders(base: Path) -> list[str]:
    names = sorted(p.name for p in base.iterdir() if p.is_dir())
    return [name for name in names if not photos.is_hidden(name)]


def _scan(
    base: Path, split: str
) -> tuple[list[str], list[tuple[str, str, Path]], list[str]]:
    """Returns the sorted class names, `(class, path inside the class, path)` of every image, and lines about files left out."""
    place = base / split
    listing = photos.separate_images(photos.walk(place))
    classes = sorted(
        p.name for p in place.iterdir() if p.is_dir() and not photos.is_hidden(p.name)
    )
    if not classes:
        raise UserError(
            f"{place} holds no folders: put each class's images in a folder"
        )
    if all(name.lower() in SPLIT_NAMES for name in classes):
        raise UserError(
            f"{place} holds splits and not classes ({', '.join(classes)}): move them up, or name the folder above them"
        )
    files, misplaced = [], []
    for path in map(PurePosixPath, listing.images):
        if len(path.parts) == 1:
            misplaced.append(str(path))
        else:
            name = path.parts[0]
            files.append((name, path.relative_to(name).as_posix(), place / path))
    left_out = [*listing.left_out, *misplaced]
    present = {file[0] for file in files}
    for name in classes:
        if name not in present:
            others = [path for path in left_out if path.startswith(f"{name}/")]
            raise UserError(
                f"{place / name} holds no images ({' '.join(photos.SUFFIXES)}): fill or remove it"
                + (f" (it has {photos.describe(others)})" if others else "")
            )
    notes = [f"left out in {place}: {photos.describe(left_out)}"] if left_out else []
    return classes, files, notes


def _hash(file: tuple[str, str, Path]) -> float:
    """Returns a pseudo-random number in [0, 1) that depends only on a file's class and name."""
    # A name that is not UTF-8 is hashed by its bytes.
    name = f"{file[0]}/{file[1]}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64


@dataclasses.dataclass(frozen=True)
class _Files:
    files: tuple[tuple[str, int], ...]  # (path, label)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> list[Example]:
        return [
            Example(_read_bytes(self.files[i][0]), self.files[i][1], self.files[i][0])
            for i in indices
        ]


def _read_bytes(path: str) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
