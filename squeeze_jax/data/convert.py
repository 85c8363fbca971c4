"""Converts a packed archive of images into TFDS files, once: `python -m squeeze_jax.data.convert ARCHIVE.npz --name=cifar10 --data_dir=DIR`.

An archive is a `.npz` with `classes` (the label names, as strings or as their bytes in UTF-8) and three arrays per split:
`SPLIT_jpeg` (the bytes of all encoded files, one after the other, uint8), `SPLIT_offsets` (the n + 1 positions where each file
begins and the last one ends) and `SPLIT_labels` (the numbers of the classes). The result is the folder that TFDS itself would
write, `DIR/NAME/1.0.0` with ArrayRecord files in the archive's order. `squeeze_jax.data` and `tfds.builder_from_directory` read
it.
"""

import argparse
import contextlib
import fcntl
import io
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from squeeze_jax import files, machine
from squeeze_jax.data import vision
from squeeze_jax.errors import UserError, message_of

VERSION = "1.0.0"
_DAMAGED = (zipfile.BadZipFile, zlib.error)  # a damaged archive raises these too


def convert(
    archive: str | os.PathLike,
    name: str,
    data_dir: str | os.PathLike,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> tuple[Path, bool]:
    """Converts an archive to the folder `data_dir/name/1.0.0`, unless that folder exists.

    The files are first written to a hidden folder beside it, which is renamed at the end. So a killed run never leaves a folder
    that looks complete, and the next run removes its files.

    Args:
      archive: the `.npz`.
      name: the dataset's name in TFDS's spelling: lower case letters, digits and underscores.
      data_dir: the folder of datasets; created if needed.
      progress: is called now and then with the split, the number of images written and the split's size.

    Returns:
      The folder, and whether this call wrote it.

    Raises:
      UserError: the name is bad, the file is not such an archive, an array of it is wrong, an image cannot be read, the folder
        cannot be written, or another conversion to the same folder is running.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(
            f"--name={name}: a data set's name is lower case letters, digits and underscores"
        )
    base = Path(data_dir).expanduser()
    final = base / name / VERSION
    if final.is_dir():
        return final, False
    archive = Path(archive).expanduser()
    splits, classes = _load(archive)
    shape = _shape(archive, splits)
    work = base / f".{name}.incomplete"
    try:
        work.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {base}: {error.strerror}") from None
    with _exclusive(work):
        if final.is_dir():
            return final, False
        for leftover in work.iterdir():
            shutil.rmtree(leftover)
        written = _write(splits, classes, shape, name, work, progress)
        # Without fsync, a power failure after the rename could lose the contents.
        for path in written.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(written, final)
        shutil.rmtree(work)
    return final, True


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder; the system releases it however the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion is writing to {folder}") from None
        yield
    finally:
        os.close(handle)


def _load(archive: Path) -> tuple[dict[str, tuple], tuple[str, ...]]:
    """Returns `{split: (bytes, offsets, labels)}` and the class names, checked."""
    arrays = _read_arrays(archive)
    names = [key.removesuffix("_jpeg") for key in arrays if key.endswith("_jpeg")]
    needed = ["classes"] + [
        f"{n}_{part}" for n in names for part in ("offsets", "labels")
    ]
    missing = [key for key in needed if key not in arrays]
    if missing or not names:
        raise UserError(
            f"{archive} lacks {', '.join(missing) or 'SPLIT_jpeg'}: it needs classes and SPLIT_jpeg, SPLIT_offsets, SPLIT_labels"
        )
    for name in names:
        if name == "all" or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise UserError(
                f"{archive}: {name}_jpeg: TFDS takes no split {name!r}: use letters, digits and underscores, as in train_jpeg"
            )
    classes = _class_names(arrays["classes"], f"{archive}: classes")
    splits = {}
    for name in names:
        data, offsets, labels = (
            arrays[f"{name}_{part}"] for part in ("jpeg", "offsets", "labels")
        )
        labels = _checked_labels(labels, len(classes), f"{archive}: {name}_labels")
        if data.dtype != np.uint8 or data.ndim != 1:
            raise UserError(
                f"{archive}: {name}_jpeg is {_kind(data)}: it should be the bytes of all files, uint8 [n]"
            )
        offsets = _checked_offsets(
            offsets, len(labels), len(data), f"{archive}: {name}_offsets"
        )
        splits[name] = (data.tobytes(), offsets, labels)
    return splits, classes


def _read_arrays(archive: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an archive; raises a UserError if it is missing or is no archive."""
    key = ""
    try:
        # The file is opened here, because numpy does not close a file that is not an archive.
        with files.open_file(archive) as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {}
            for key in file.files:
                arrays[key] = np.asarray(file[key])
    except FileNotFoundError:
        raise UserError(f"no archive {archive}") from None
    except (OSError, ValueError, EOFError, AttributeError, *_DAMAGED) as error:
        if key:
            raise UserError(
                f"{archive}: {key} cannot be read ({message_of(error)}): write the archive by numpy.savez, without objects"
            ) from None
        raise UserError(
            f"{archive} is not an npz archive ({message_of(error)})"
        ) from None
    return arrays


def _class_names(classes: np.ndarray, where: str) -> tuple[str, ...]:
    """Returns the class names of an archive as TFDS keeps them: one line each, without spaces around them.

    Args:
      classes: the archive's array, of strings or of their bytes in UTF-8.
      where: the beginning of an error.

    Raises:
      UserError: the array holds no names, or a name that is blank, not unique, or not one line of UTF-8.
    """
    if classes.dtype.kind not in "SU" or classes.ndim != 1 or not classes.size:
        raise UserError(f"{where} is {_kind(classes)}: it should be strings [classes]")
    names = []
    for i, stored in enumerate(classes.tolist()):
        try:
            name = stored.decode() if isinstance(stored, bytes) else stored
            name.encode()
        except UnicodeError:
            raise UserError(
                f"{where}[{i}] is {stored!r}, which is not UTF-8: rename the class"
            ) from None
        if name.splitlines() not in ([], [name]):
            raise UserError(
                f"{where}[{i}] is {name!r}, which has a line break: rename the class"
            )
        name = name.strip()
        if not name:
            raise UserError(f"{where}[{i}] is blank: give the class a name")
        if name in names:
            raise UserError(
                f"{where}[{i}] and [{names.index(name)}] are both {name!r}: give each class another name"
            )
        names.append(name)
    return tuple(names)


def _checked_labels(labels: np.ndarray, classes: int, where: str) -> np.ndarray:
    """Returns the labels of a split as integers; `where` is the beginning of an error.

    Raises:
      UserError: the labels are no numbers [n], there are none, or one is not the number of a class.
    """
    if labels.dtype.kind not in "biuf" or labels.ndim != 1:
        raise UserError(
            f"{where} is {_kind(labels)}: it should be the numbers of the classes, integers [n]"
        )
    if not len(labels):
        raise UserError(
            f"{where} is empty: fill the split, or leave its arrays out of the archive"
        )
    # A NaN is not in the range.
    valid = (labels >= 0) & (labels < classes) & (labels == np.trunc(labels))
    if not valid.all():
        i = int(np.argmin(valid))
        raise UserError(
            f"{where}[{i}] is {labels[i]}: it should be an integer, 0 to {classes - 1} for the {classes} classes"
        )
    return labels.astype(np.int64)


def _checked_offsets(
    offsets: np.ndarray, images: int, size: int, where: str
) -> np.ndarray:
    """Returns the offsets of a split in 64 bits.

    Args:
      offsets: the archive's array.
      images: the number of labels.
      size: the number of bytes of all files.
      where: the beginning of an error.

    Raises:
      UserError: the offsets are no integers [n + 1] that rise from 0 to `size`.
    """
    wanted = f"it should be {images + 1} integers that rise from 0 to {size}, for {images} labels and {size} bytes"
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise UserError(f"{where} is {_kind(offsets)}: {wanted}")
    if len(offsets) != images + 1:
        raise UserError(f"{where} has {len(offsets)} entries: {wanted}")
    if offsets[0] != 0 or offsets[-1] != size:
        raise UserError(f"{where} goes from {offsets[0]} to {offsets[-1]}: {wanted}")
    falls = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(falls):
        i = int(falls[0])
        raise UserError(
            f"{where} goes from {offsets[i]} at {i} to {offsets[i + 1]} at {i + 1}: {wanted}"
        )
    return offsets.astype(np.int64)


def _kind(array: np.ndarray) -> str:
    """Returns an array's dtype and shape for an error."""
    return f"{array.dtype} {list(array.shape)}"


def _write(splits, classes, shape, name, work, progress) -> Path:
    """Makes TFDS write the dataset below `work`; returns its folder there."""
    import tensorflow_datasets as tfds

    class Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{name}, converted from a packed archive.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=shape),
                        "label": tfds.features.ClassLabel(names=classes),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(_images(splits[split])):
                if i % 1000 == 0:
                    progress(split, i, len(splits[split][2]))
                yield i, {"image": image, "label": label}
            progress(split, i + 1, len(splits[split][2]))

    Packed.name = name
    tfds.disable_progress_bar()
    builder = Packed(data_dir=work, file_format="array_record")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        if files.is_full(error):
            raise files.DiskFull(f"no space left on the disk of {work}") from None
        raise
    return Path(builder.data_dir)


def _images(split) -> Iterator[tuple[bytes, int]]:
    data, offsets, labels = split
    for begin, end, label in zip(offsets[:-1], offsets[1:], labels, strict=True):
        yield data[begin:end], int(label)


def _shape(archive: Path, splits) -> tuple[int | None, int | None, int]:
    """Returns the (h, w, c) that all images share, with None for a side that differs; reads only the files' headers.

    Transparency is not a channel: c is 1 if all images are grey, as for a folder of the same files.
    """
    shapes = set()
    for name, split in splits.items():
        for i, (image, _) in enumerate(_images(split)):
            try:
                with vision.decoding(), Image.open(io.BytesIO(image)) as opened:
                    w, h = opened.size
                    shapes.add((h, w, 1 if opened.mode in vision.GREY else 3))
            except vision.Undecodable as error:
                raise UserError(
                    f"{archive}: {name}_jpeg holds no image at {split[1][i]}, where {name}_offsets[{i}] begins: {error}"
                ) from None
    h, w, c = (set(sizes) for sizes in zip(*shapes, strict=True))
    return (
        h.pop() if len(h) == 1 else None,
        w.pop() if len(w) == 1 else None,
        max(c),
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m squeeze_jax.data.convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("archive", help="the packed .npz")
    parser.add_argument("--name", required=True, help="the data set's name")
    parser.add_argument(
        "--data_dir", default="~/tensorflow_datasets", help="where data sets live"
    )
    args = parser.parse_args(argv)
    started = time.perf_counter()

    def progress(split, done, total):
        line = f"\r{args.name}: {split} {done}/{total} images"
        print(line, end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        folder, new = convert(args.archive, args.name, args.data_dir, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(f"wrote {folder} in {seconds:.0f} s" if new else f"already there: {folder}")
    return 0


if __name__ == "__main__":
    machine.run_tool(main)
