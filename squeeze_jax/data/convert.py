"""Converts a packed archive of images into TFDS files, once: `python -m squeeze_jax.data.convert ARCHIVE.npz --name=cifar10 --data_dir=DIR`.

An archive is a `.npz` with `classes` (the label names) and three arrays per split: `SPLIT_jpeg` (the bytes of all encoded
files, one after the other, uint8), `SPLIT_offsets` (the n + 1 positions where each file begins and the last one ends) and
`SPLIT_labels`. The result is the folder that TFDS itself would write, `DIR/NAME/1.0.0` with ArrayRecord files in the archive's
order. `squeeze_jax.data` and `tfds.builder_from_directory` read it.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from squeeze_jax import files, machine
from squeeze_jax.errors import UserError

VERSION = "1.0.0"


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
      UserError: the name is bad, the file is not such an archive, a label has no class, an image cannot be read, the folder
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
    splits, classes = _load(Path(archive).expanduser())
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
        written = _write(splits, classes, name, work, progress)
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
    try:
        # The file is opened here, because numpy does not close a file that is not an archive.
        with files.open_file(archive) as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise UserError(f"no archive {archive}") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive} is not an npz archive ({error})") from None
    names = [key.removesuffix("_jpeg") for key in arrays if key.endswith("_jpeg")]
    needed = ["classes"] + [
        f"{n}_{part}" for n in names for part in ("offsets", "labels")
    ]
    missing = [key for key in needed if key not in arrays]
    if missing or not names:
        raise UserError(
            f"{archive} lacks {', '.join(missing) or 'SPLIT_jpeg'}: it needs classes and SPLIT_jpeg, SPLIT_offsets, SPLIT_labels"
        )
    classes = tuple(str(c) for c in arrays["classes"])
    splits = {}
    for split in names:
        data, offsets, labels = (
            arrays[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels")
        )
        offsets = offsets.astype(np.int64)
        if (
            len(offsets) != len(labels) + 1
            or offsets[-1] > len(data)
            or (np.diff(offsets) < 0).any()
        ):
            raise UserError(
                f"{archive}: {split}_offsets does not fit {len(labels)} labels and {len(data)} bytes"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
        if len(wrong):
            raise UserError(
                f"{archive}: {split}[{wrong[0]}] has label {labels[wrong[0]]}, outside the {len(classes)} classes"
            )
        splits[split] = (data.tobytes(), offsets, labels)
    return splits, classes


def _write(splits, classes, name, work, progress) -> Path:
    """Makes TFDS write the dataset below `work`; returns its folder there."""
    import tensorflow_datasets as tfds

    shape = _shape(splits)

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


def _shape(splits) -> tuple[int | None, int | None, int]:
    """Returns the (h, w, c) that all images share, with None for a side that differs; reads only the files' headers."""
    shapes = set()
    for name, split in splits.items():
        for i, (image, _) in enumerate(_images(split)):
            try:
                with Image.open(io.BytesIO(image)) as opened:
                    w, h = opened.size
                    shapes.add((h, w, 1 if opened.mode in ("1", "L") else 3))
            except OSError:
                raise UserError(f"{name}[{i}] in the archive is not an image") from None
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
