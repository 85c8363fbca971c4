"""Teachers' outputs on disk, computed once for all students and epochs; no loss, but what feeds `batch["teacher"]`.

A folder holds one `.npy` file for each array, [count, ...], which is mapped and not read; `written.npy`, which rows are
there; and `manifest.json`, of what. Writing may be interrupted at any time and goes on where it was: a row counts as
written only after its data are on disk. One process writes, any number read.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError

_MANIFEST = "manifest.json"
_WRITTEN = "written.npy"
_DTYPES = ("float16", "float32")
# Bytes of rows that an interruption may lose.
_FLUSH = 256 << 20
# What stands for scores that no key may have; float16 has no such number but infinity.
_LOWEST = np.finfo(np.float32).min / 2


class Cached:
    """Outputs of a teacher for `count` examples; made by `Cached.write` or `Cached.read`, used in a `with` statement.

    Attributes:
      folder: where it is.
      fingerprint: of the teacher and the data.
      count: how many examples.
      shapes: {name: (shape of one example, dtype)}; heads of logits are called logits/start, ….
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], mode: str):
        self.folder = folder
        self.fingerprint, self.count = manifest["fingerprint"], manifest["count"]
        self.shapes = {
            name: (tuple(shape), dtype)
            for name, (shape, dtype) in manifest["arrays"].items()
        }
        self._arrays = {
            name: _mapped(folder / _file(name), (self.count, *shape), mode)
            for name, (shape, _) in self.shapes.items()
        }
        self._on_disk = _mapped(folder / _WRITTEN, (self.count,), mode)
        self._there = np.array(self._on_disk)
        self._unflushed = 0

    @classmethod
    def write(
        cls,
        folder: str | Path,
        outputs: Mapping[str, Any],
        count: int,
        fingerprint: str,
        dtype: str = "float16",
    ) -> "Cached":
        """Opens a folder for writing, a new one or one whose writing was interrupted.

        Args:
          folder: is made where it does not exist.
          outputs: {name: shape} of ONE example, anything with `shape`; values may be such dicts, of heads of logits. Of
            sequences of several lengths the longest.
          count: of examples.
          fingerprint: a line that tells the teacher and the data settings from all others.
          dtype: "float16" or "float32".

        Raises:
          UserError: the folder holds something else, or the disk is too small.
        """
        folder = files.path(folder)
        if dtype not in _DTYPES:
            raise UserError(f"dtype = {dtype!r}: choose 'float16' or 'float32'")
        if count < 1:
            raise UserError(f"{folder}: there are no examples to keep outputs of")
        arrays = {
            name: [list(leaf.shape), dtype]
            for name, leaf in tree.flatten(dict(outputs)).items()
        }
        wanted = {"fingerprint": fingerprint, "count": count, "arrays": arrays}
        if (folder / _MANIFEST).exists():
            _check(folder, _manifest(folder), wanted)
        else:
            _start(folder, wanted)
        _allocate(folder, wanted)
        return cls(folder, wanted, "r+")

    @classmethod
    def read(cls, folder: str | Path, fingerprint: str | None = None) -> "Cached":
        """Opens a complete folder for reading.

        Args:
          folder: what `write` was given.
          fingerprint: what it should hold; None for anything.

        Raises:
          UserError: no such folder, another fingerprint, or rows are missing.
        """
        folder = files.path(folder)
        manifest = _manifest(folder)
        expected = fingerprint or manifest["fingerprint"]
        _check(folder, manifest, manifest | {"fingerprint": expected})
        if not (folder / _WRITTEN).exists():
            raise UserError(
                f"{folder} is incomplete: no row is written; write it again"
            )
        cached = cls(folder, manifest, "r")
        if not cached.complete:
            raise UserError(
                f"{folder} is incomplete: {len(cached.missing):,} of {cached.count:,} rows are missing; write it to the"
                " end"
            )
        return cached

    @property
    def missing(self) -> np.ndarray:
        """Indices of the examples that are not there, int64, ascending."""
        return np.flatnonzero(self._there == 0)

    @property
    def complete(self) -> bool:
        """Whether every example is there."""
        return bool(self._there.all())

    def lacks(self, index: np.ndarray) -> bool:
        """Whether any of these examples, int [n], is not there; negative ones are padding."""
        return not self._there[self._real(index)[0]].all()

    def put(self, index: np.ndarray, outputs: Mapping[str, Any]) -> None:
        """Writes rows.

        Args:
          index: int [n], which examples; negative ones are padding and left out.
          outputs: {name: array [n, ...]} as in `write`, of the cache's shape or, of shorter sequences, smaller; the rest of
            the row is 0.

        Raises:
          UserError: arrays that are missing or too large, or numbers that the dtype cannot hold.
        """
        index, real = self._real(index)
        given = tree.flatten(dict(outputs))
        for name, (shape, dtype) in self.shapes.items():
            if name not in given:
                raise UserError(
                    f"{self.folder} needs {name}, the outputs have {', '.join(given)}"
                )
            rows = np.asarray(given[name])[real]
            found = rows.shape[1:]
            if len(found) != len(shape) or any(
                f > s for f, s in zip(found, shape, strict=True)
            ):
                raise UserError(
                    f"{self.folder}: {name} is {found}, the cache holds {shape}"
                )
            rows = _converted(rows, dtype, f"{self.folder}: {name}")
            array = self._arrays[name]
            if found != shape:
                array[index] = 0
            array[(index, *(slice(size) for size in found))] = rows
            self._unflushed += rows.nbytes
        self._there[index] = 1
        if self._unflushed > _FLUSH:
            self.flush()

    def rows(
        self, index: np.ndarray, lengths: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Reads rows.

        Args:
          index: int [n]; negative ones give zeros.
          lengths: {name: anything with `shape` [n, ...]} to cut rows to, such as the shapes of a batch of shorter
            sequences; None for the cache's.

        Returns:
          {name: array [n, ...]} in the dtype of the cache, heads of logits in a dict of their own.

        Raises:
          UserError: rows that are not there.
        """
        count = len(index)
        index, real = self._real(index)
        if not self._there[index].all():
            raise UserError(f"{self.folder} is incomplete: write it to the end")
        cut = tree.flatten(dict(lengths or {}))
        result: dict[str, Any] = {}
        for name, (shape, dtype) in self.shapes.items():
            shape = tuple(cut[name].shape[1:]) if name in cut else shape
            rows = np.zeros((count, *shape), dtype)
            corner = tuple(slice(size) for size in shape)
            rows[real] = self._arrays[name][(index, *corner)]
            *outer, last = name.split("/")
            place = result
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = rows
        return result

    def _real(self, index):
        """The indices that are not padding, and which of those given they are."""
        index = np.asarray(index)
        if index.size and index.max() >= self.count:
            raise UserError(
                f"{self.folder} holds {self.count:,} examples, there is none of the index {index.max()}"
            )
        real = index >= 0
        return index[real], real

    def flush(self) -> None:
        """Brings what was put to the disk, first the data and then that they are there."""
        if not self._unflushed:
            return
        for array in self._arrays.values():
            array.flush()
        self._on_disk[:] = self._there
        self._on_disk.flush()
        self._unflushed = 0

    def __enter__(self) -> "Cached":
        return self

    def __exit__(self, *raised) -> None:
        self.flush()


def _file(name: str) -> str:
    return name.replace("/", ".") + ".npy"


def _mapped(path: Path, shape: tuple[int, ...], mode: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mode)
    except (OSError, ValueError, EOFError):
        array = None
    if array is None or array.shape != shape:
        raise UserError(
            f"{path} is absent or damaged: delete {path.parent} and write it again"
        )
    return array


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
        return {key: manifest[key] for key in ("fingerprint", "count", "arrays")}
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no teacher's outputs: {path} is absent"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged: delete {folder} and write it again"
        ) from None


def _check(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks that a folder holds what is wanted."""
    for key in "fingerprint", "count":
        if found[key] != wanted[key]:
            what = "outputs of" if key == "fingerprint" else "a count of"
            raise UserError(
                f"{folder} holds {what} {found[key]!r}, not {wanted[key]!r}: give another folder, or delete this one"
            )
    if found["arrays"] != wanted["arrays"]:
        said = [
            ", ".join(f"{name} {tuple(shape)} {dtype}" for name, (shape, dtype) in each)
            for each in (found["arrays"].items(), wanted["arrays"].items())
        ]
        raise UserError(
            f"{folder} holds {said[0]}, not {said[1]}: give another folder, or delete this one"
        )


def _others(folder: Path) -> list[Path]:
    """Files of a folder other than a manifest that was being written when its process died."""
    return [p for p in folder.iterdir() if not p.name.startswith(f".{_MANIFEST}.")]


def _start(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Makes the folder with its manifest, which is there as a whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(_others(folder))):
        raise UserError(
            f"{folder} exists and holds no teacher's outputs: give another folder"
        )
    sizes = [
        np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize
        for shape, dtype in manifest["arrays"].values()
    ]
    needed = int(sum(sizes)) * manifest["count"]
    if needed > _free(folder):
        raise _full(folder, needed)
    files.write(folder / _MANIFEST, json.dumps(manifest, indent=1))


def _allocate(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Makes the files that are not there; `written.npy` comes last, and anew where another did."""
    count, made = manifest["count"], False
    files = {
        folder / _file(name): ((count, *shape), dtype)
        for name, (shape, dtype) in manifest["arrays"].items()
    }
    for path, (shape, dtype) in files.items():
        if not path.exists():
            made = True
            _reserve(path, shape, dtype)
    if made or not (folder / _WRITTEN).exists():
        _reserve(folder / _WRITTEN, (count,), "uint8")


def _reserve(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """A file of zeros whose every byte has its place, because a mapped file that finds none kills the process."""
    part = path.with_suffix(".part")
    array = np.lib.format.open_memmap(part, "w+", dtype, shape)
    size = part.stat().st_size
    del array
    try:
        if hasattr(os, "posix_fallocate"):
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        part.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path.parent, size) from None
        raise
    part.replace(path)


def _full(folder: Path, needed: int) -> UserError:
    return UserError(
        f"{folder}: the disk is full: {needed / 1e9:.3g} GB are needed, {_free(folder) / 1e9:.3g} GB are free; keep fewer"
        " layers, float16, or give another folder"
    )


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _converted(rows: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Rows in the dtype they are kept in; the lowest float32 may become -inf, nothing else."""
    rows = rows.astype(np.float32)
    with np.errstate(over="ignore"):
        kept = rows.astype(dtype)
    bad = ~np.isfinite(kept) & (rows > _LOWEST)
    if bad.any() or np.isnan(kept).any():
        worst = rows.flat[np.flatnonzero(bad | np.isnan(kept))[0]]
        raise UserError(
            f"{what} has the value {worst:.3g}, which {dtype} cannot hold"
            + (
                "; keep it as float32, config.distill.cache_dtype"
                if np.isfinite(worst)
                else ""
            )
        )
    return kept
