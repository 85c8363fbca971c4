"""An exported file, opened: the one shape that every runtime is brought into."""

import importlib.metadata
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import registry
from squeeze_jax.errors import UserError

FORMATS = "squeeze_jax.export.formats"


class Runnable(NamedTuple):
    """A file in its runtime.

    Attributes:
      shape: (h, w, c) of the pixels it takes.
      batch: the only batch size it takes; None means any.
      run: float32 pixels [batch, h, w, c] → a tuple of float32 arrays [batch, ...].
      timed: pixels [batch, h, w, c] → a function that runs the file once on them; copying them in is not timed.
      runtime: name and version of what runs it.
    """

    shape: tuple[int, int, int]
    batch: int | None
    run: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    timed: Callable[[np.ndarray], Callable[[], Any]]
    runtime: str


def format_of(key: str) -> types.ModuleType:
    """Loads a format's file and looks for the packages that it needs.

    Raises:
      UserError: no such format, or a package is missing, as where it is not built for this kind of machine.
    """
    module = registry.load(FORMATS, key, "export format")
    for package in module.NEEDS:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"export format {key} needs the package {package}: pip install {package}, or leave {key} out of"
                " config.export.formats"
            ) from None
    return module


def opened(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a file in the runtime that its extension names.

    Raises:
      UserError: no such file, no such format, or the runtime cannot read it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no exported file at {path}: export it first")
    extension = path.suffix.removeprefix(".")
    if extension not in registry.names(FORMATS):
        raise UserError(
            f"{path} is no exported file that can be run: expected .stablehlo or .tflite"
        )
    try:
        return registry.load(FORMATS, extension).load(path, threads)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # each runtime has exceptions of its own for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be run as {extension}: {reason[0]}") from error


def outputs(
    runnable: Runnable, images: np.ndarray, batch: int
) -> tuple[np.ndarray, ...]:
    """Runs all images, in batches of one size so that a compiled program is compiled once.

    Args:
      runnable: an opened file.
      images: pixels 0..255 [n, h, w, c], any dtype.
      batch: images at a time where the file takes any number.

    Returns:
      One array [n, ...] an output.

    Raises:
      UserError: no images, or of another shape than the file takes.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != runnable.shape or not len(images):
        expected = ", ".join(map(str, runnable.shape))
        raise UserError(
            f"images are {list(images.shape)}, the file takes [n, {expected}] with n ≥ 1"
        )
    size = runnable.batch or min(batch, len(images))
    total = math.ceil(len(images) / size) * size
    parts = []
    for start in range(0, total, size):
        rows = np.arange(start, start + size).clip(max=len(images) - 1)
        parts.append(runnable.run(images[rows].astype(np.float32)))
    return tuple(
        np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True)
    )
