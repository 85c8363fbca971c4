"""Image files that a user names on the command line or hands to a function."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from squeeze_jax.data import vision
from squeeze_jax.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode(
    image: bytes | str | os.PathLike, view: vision.View, name: str = ""
) -> np.ndarray:
    """Returns uint8 [h, w, c] of an encoded image, or of a file by its path, as evaluation sees it.

    Raises:
      UserError: no such file, or no image; calls it by its path, or bytes by `name`.
    """
    if not isinstance(image, bytes):
        name, path = str(image), Path(image)
        try:
            image = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {name}: {error.strerror}") from None
    try:
        return vision.still(image, view)
    except vision.Undecodable as error:
        raise UserError(f"cannot decode image {name}: {error}") from None


def find(arguments: Sequence[str]) -> list[Path]:
    """Lists the image files among files and folders (searched in depth), in order.

    Raises:
      UserError: no argument, a file that does not exist, a folder without images.
    """
    if not arguments:
        raise UserError(
            "the job predict needs image files or folders: run.py --job=predict --workdir=DIR PHOTO.jpg"
        )
    files = []
    for path in map(Path, arguments):
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
        if not path.is_dir():
            files.append(path)
            continue
        images = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(f"{path} holds no image (looked for {' '.join(SUFFIXES)})")
        files += images
    return files
