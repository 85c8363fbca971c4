"""Caches teacher outputs on disk, computed once for all students and epochs; they become `batch["teacher"]`.

This file has no loss. A cache is a folder with these files:

    NAME.npy         one file per output, [count, ...], which is memory-mapped
    written.npy      uint8 [count], 1 for the examples whose outputs are written
    manifest.json    the fingerprint of teacher and data, the number of examples, and the shapes and dtypes

Writing may be interrupted at any time and continues later, because an example counts as written only after its outputs are
on disk. One process writes; any number of processes read.
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
# Number of bytes of outputs after which they are flushed to disk; an interruption loses at most as much.
_FLUSH_BYTES = 256 << 20
# Values below this are the attention scores of masked keys, near the lowest float32. float16 stores them as -inf.
_MASKED_SCORE = np.finfo(np.float32).min / 2


class Cached:
    """The outputs of one teacher for `count` examples; a context manager that flushes at the end.

    `Cached.write` and `Cached.read` open one.

    Attributes:
      folder: the folder of the cache.
      fingerprint: a line that identifies the teacher and the data.
      count: number of examples.
      shapes: {name: (shape for one example, dtype)}; heads of logits have names such as "logits/start".
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], mode: str):
        """Memory-maps the files of a folder.

        Args:
          folder: a folder with all files of the manifest.
          manifest: content of `manifest.json`.
          mode: mode of `np.load`: "r" to read, "r+" to write.
        """
        self.folder = folder
        self.fingerprint, self.count = manifest["fingerprint"], manifest["count"]
        self.shapes = {
            name: (tuple(shape), dtype)
            for name, (shape, dtype) in manifest["arrays"].items()
        }
        self._arrays = {
            name: _open_mapped(folder / _file_name(name), (self.count, *shape), mode)
            for name, (shape, _) in self.shapes.items()
        }
        # The flags of written examples: on disk, and a copy that runs ahead of the disk until the next flush.
        self._written_on_disk = _open_mapped(folder / _WRITTEN, (self.count,), mode)
        self._is_written = np.array(self._written_on_disk)
        self._unflushed_bytes = 0

    @classmethod
    def write(
        cls,
        folder: str | Path,
        outputs: Mapping[str, Any],
        count: int,
        fingerprint: str,
        dtype: str = "float16",
    ) -> "Cached":
        """Opens a cache for writing: a new one, or one whose writing was interrupted.

        Args:
          folder: the folder; it is created if it does not exist.
          outputs: {name: anything with a `shape`} of the outputs for ONE example. Values may be dicts, for heads of
            logits. If sequences have several lengths, the shapes are those of the longest.
          count: number of examples.
          fingerprint: a line that distinguishes the teacher and the data settings from all others.
          dtype: dtype of the stored outputs, "float16" or "float32".

        Raises:
          UserError: the folder holds something else, or the disk has too little space.
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
        manifest = {"fingerprint": fingerprint, "count": count, "arrays": arrays}
        if (folder / _MANIFEST).exists():
            _check_manifest(folder, _read_manifest(folder), manifest)
        else:
            _create_folder(folder, manifest)
        _create_files(folder, manifest)
        return cls(folder, manifest, "r+")

    @classmethod
    def read(cls, folder: str | Path, fingerprint: str | None = None) -> "Cached":
        """Opens a complete cache for reading.

        Args:
          folder: the folder of the cache.
          fingerprint: the fingerprint that the cache must have; None accepts any.

        Raises:
          UserError: there is no cache, it has another fingerprint, or outputs are missing.
        """
        folder = files.path(folder)
        manifest = _read_manifest(folder)
        expected = fingerprint or manifest["fingerprint"]
        _check_manifest(folder, manifest, manifest | {"fingerprint": expected})
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
        """Returns the indices of the examples that are not written, int64, in ascending order."""
        return np.flatnonzero(self._is_written == 0)

    @property
    def complete(self) -> bool:
        """Returns whether all examples are written."""
        return bool(self._is_written.all())

    def lacks(self, index: np.ndarray) -> bool:
        """Returns whether any of the examples `index`, int [n], is not written; negative indices are padding."""
        return not self._is_written[self._without_padding(index)[0]].all()

    def put(self, index: np.ndarray, outputs: Mapping[str, Any]) -> None:
        """Writes the outputs of some examples.

        Args:
          index: int [n], the examples; negative indices are padding, and their outputs are left out.
          outputs: {name: array [n, ...]}, see `write`. Arrays have the shapes of the cache, or smaller ones for shorter
            sequences; the remaining entries become 0.

        Raises:
          UserError: an output is missing or too large, or has a value that the dtype cannot hold.
        """
        index, is_real = self._without_padding(index)
        arrays = tree.flatten(dict(outputs))
        for name, (shape, dtype) in self.shapes.items():
            if name not in arrays:
                raise UserError(
                    f"{self.folder} needs {name}, the outputs have {', '.join(arrays)}"
                )
            rows = np.asarray(arrays[name])[is_real]
            sizes = rows.shape[1:]
            if len(sizes) != len(shape) or any(
                size > limit for size, limit in zip(sizes, shape, strict=True)
            ):
                raise UserError(
                    f"{self.folder}: {name} is {sizes}, the cache holds {shape}"
                )
            rows = _convert(rows, dtype, f"{self.folder}: {name}")
            mapped = self._arrays[name]
            if sizes != shape:
                mapped[index] = 0
            mapped[(index, *(slice(size) for size in sizes))] = rows
            self._unflushed_bytes += rows.nbytes
        self._is_written[index] = 1
        if self._unflushed_bytes > _FLUSH_BYTES:
            self.flush()

    def rows(
        self, index: np.ndarray, lengths: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Reads the outputs of some examples.

        Args:
          index: int [n], the examples; negative indices are padding and give zeros.
          lengths: {name: anything with a `shape` [n, ...]}, the shapes to cut the outputs to, such as those of a batch of
            shorter sequences; None for the shapes of the cache.

        Returns:
          {name: array [n, ...]} in the dtype of the cache; heads of logits are in a dict of their own.

        Raises:
          UserError: an example is not written.
        """
        count = len(index)
        index, is_real = self._without_padding(index)
        if not self._is_written[index].all():
            raise UserError(f"{self.folder} is incomplete: write it to the end")
        cut_shapes = tree.flatten(dict(lengths or {}))
        outputs: dict[str, Any] = {}
        for name, (shape, dtype) in self.shapes.items():
            shape = tuple(cut_shapes[name].shape[1:]) if name in cut_shapes else shape
            rows = np.zeros((count, *shape), dtype)
            corner = tuple(slice(size) for size in shape)
            rows[is_real] = self._arrays[name][(index, *corner)]
            *outer, last = name.split("/")
            parent = outputs
            for key in outer:
                parent = parent.setdefault(key, {})
            parent[last] = rows
        return outputs

    def _without_padding(self, index):
        """Returns the indices that are not negative, and bool [n]: which of the entries of `index` they are.

        Raises:
          UserError: an index is as large as the number of examples, or larger.
        """
        index = np.asarray(index)
        if index.size and index.max() >= self.count:
            raise UserError(
                f"{self.folder} holds {self.count:,} examples, there is none of the index {index.max()}"
            )
        is_real = index >= 0
        return index[is_real], is_real

    def flush(self) -> None:
        """Writes everything that `put` got to disk: first the outputs, then the flags that they are written."""
        if not self._unflushed_bytes:
            return
        for array in self._arrays.values():
            array.flush()
        self._written_on_disk[:] = self._is_written
        self._written_on_disk.flush()
        self._unflushed_bytes = 0

    def __enter__(self) -> "Cached":
        return self

    def __exit__(self, *raised) -> None:
        self.flush()


def _file_name(name: str) -> str:
    return name.replace("/", ".") + ".npy"


def _open_mapped(path: Path, shape: tuple[int, ...], mode: str) -> np.ndarray:
    """Memory-maps a `.npy` file; raises a UserError if it is absent or damaged, or has another shape."""
    try:
        array = np.load(path, mmap_mode=mode)
    except (OSError, ValueError, EOFError):
        array = None
    if array is None or array.shape != shape:
        raise UserError(
            f"{path} is absent or damaged: delete {path.parent} and write it again"
        )
    return array


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `manifest.json`; raises a UserError if it is absent or damaged."""
    path = folder / _MANIFEST
    try:
        manifest = files.read_json(path)
        return {key: manifest[key] for key in ("fingerprint", "count", "arrays")}
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no teacher's outputs: {path} is absent"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged: delete {folder} and write it again"
        ) from None


def _check_manifest(
    folder: Path, actual: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raises a UserError if the manifest of a folder differs from the expected one."""
    for key in "fingerprint", "count":
        if actual[key] != expected[key]:
            what = "outputs of" if key == "fingerprint" else "a count of"
            raise UserError(
                f"{folder} holds {what} {actual[key]!r}, not {expected[key]!r}: give another folder, or delete this one"
            )
    if actual["arrays"] != expected["arrays"]:
        actual_arrays, expected_arrays = (
            ", ".join(
                f"{name} {tuple(shape)} {dtype}"
                for name, (shape, dtype) in manifest["arrays"].items()
            )
            for manifest in (actual, expected)
        )
        raise UserError(
            f"{folder} holds {actual_arrays}, not {expected_arrays}: give another folder, or delete this one"
        )


def _foreign_files(folder: Path) -> list[Path]:
    """Returns the files of a folder, except temporary manifests that a killed process left."""
    return [p for p in folder.iterdir() if not p.name.startswith(f".{_MANIFEST}.")]


def _create_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Creates the folder and writes its manifest atomically.

    Raises:
      UserError: the folder holds other files, or the disk has too little space.
    """
    if folder.exists() and (not folder.is_dir() or any(_foreign_files(folder))):
        raise UserError(
            f"{folder} exists and holds no teacher's outputs: give another folder"
        )
    sizes = [
        np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize
        for shape, dtype in manifest["arrays"].values()
    ]
    needed = int(sum(sizes)) * manifest["count"]
    if needed > _free_bytes(folder):
        raise _disk_full(folder, needed)
    files.write(folder / _MANIFEST, json.dumps(manifest, indent=1))


def _create_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Creates the files that do not exist, `written.npy` last.

    If a file of outputs had to be created, `written.npy` is created anew, because no example is complete.
    """
    count, created = manifest["count"], False
    arrays = {
        folder / _file_name(name): ((count, *shape), dtype)
        for name, (shape, dtype) in manifest["arrays"].items()
    }
    for path, (shape, dtype) in arrays.items():
        if not path.exists():
            created = True
            _allocate(path, shape, dtype)
    if created or not (folder / _WRITTEN).exists():
        _allocate(folder / _WRITTEN, (count,), "uint8")


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Creates a `.npy` file of zeros and reserves its disk space.

    Without the reservation a full disk would kill the process when it writes to the memory-mapped file.

    Raises:
      UserError: the disk has too little space.
    """
    temporary = path.with_suffix(".part")
    array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    size = temporary.stat().st_size
    del array
    try:
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path.parent, size) from None
        raise
    temporary.replace(path)


def _disk_full(folder: Path, needed: int) -> UserError:
    """Returns the error for a disk that lacks `needed` bytes."""
    return UserError(
        f"{folder}: the disk is full: {needed / 1e9:.3g} GB are needed, {_free_bytes(folder) / 1e9:.3g} GB are free; keep"
        " fewer layers, float16, or give another folder"
    )


def _free_bytes(folder: Path) -> int:
    """Returns the free bytes of the disk of a folder, which need not exist yet."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _convert(rows: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Converts outputs to the dtype of the cache; only the scores of masked attention keys may become -inf.

    Args:
      rows: the outputs, any float dtype.
      dtype: "float16" or "float32".
      what: name of the outputs, for the error.

    Raises:
      UserError: the dtype cannot hold a value.
    """
    rows = rows.astype(np.float32)
    with np.errstate(over="ignore"):
        converted = rows.astype(dtype)
    is_lost = ~np.isfinite(converted) & (rows > _MASKED_SCORE)
    is_lost |= np.isnan(converted)
    if is_lost.any():
        first = rows.flat[np.flatnonzero(is_lost)[0]]
        raise UserError(
            f"{what} has the value {first:.3g}, which {dtype} cannot hold"
            + (
                "; keep it as float32, config.distill.cache_dtype"
                if np.isfinite(first)
                else ""
            )
        )
    return converted
