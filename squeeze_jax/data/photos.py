"""Image files: which files of a folder or archive are images, which are left out, and decoding one by its path.

Training, pairs and the job predict share this list of suffixes and this walk over folders.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import vision
from squeeze_jax.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp"),
    *(".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    *(".jp2", ".j2k"),
)
# Folders and files, in lower case, that systems put among the user's; names with a leading dot are hidden anyway.
SYSTEM = (
    *("__macosx", "@eadir", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
)
NAMED = 3  # files that a line names before it only counts


class Listing(NamedTuple):
    """The files of a folder or archive, by their paths below it.

    Attributes:
      images: the paths of images, in the order of their parts.
      left_out: the paths of all other files; a hidden folder is one path that ends in "/".
    """

    images: tuple[str, ...]
    left_out: tuple[str, ...]


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden or belongs to the operating system."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Whether a file of that name is an image by its suffix, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def refuse(error: OSError) -> None:
    """Raises a UserError for a folder that the system does not let us read."""
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")


def walk(folder: Path, unreadable: Callable[[OSError], None] = refuse) -> list[str]:
    """Lists the paths of all files below a folder, links followed; a hidden folder is one path that ends in "/".

    A link to one of the folders around it is listed like a hidden folder.

    Args:
      folder: where to begin.
      unreadable: is called for a folder that cannot be read, and is a UserError unless given.
    """
    real = folder.resolve()
    around = {str(folder): (real, *real.parents)}
    paths = []
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        below = PurePosixPath(Path(place).relative_to(folder).as_posix())
        above = around.pop(place)
        for name in list(folders):
            # A link to a folder around it would be walked without end.
            inside = Path(place, name).resolve()
            if hidden(name) or inside in above:
                folders.remove(name)
                paths.append(f"{below / name}/")
            else:
                around[os.path.join(place, name)] = (inside, *above)
        paths += [str(below / name) for name in files]
    return paths


def listed(paths: Iterable[str]) -> Listing:
    """Separates images from other files; everything below a hidden folder counts as that folder."""
    images, left_out = [], set()
    for path in paths:
        parts = path.removesuffix("/").split("/")
        cut = next((i for i, part in enumerate(parts) if hidden(part)), None)
        if cut is not None and cut + 1 < len(parts):
            left_out.add("/".join(parts[: cut + 1]) + "/")
        elif cut is None and not path.endswith("/") and is_image(path):
            images.append(path)
        else:
            left_out.add(path)
    ordered = (sorted(each, key=lambda p: p.split("/")) for each in (images, left_out))
    return Listing(*map(tuple, ordered))


def describe(left_out: Sequence[str]) -> str:
    """Counts and names what a listing leaves out, such as "1 hidden folder (a/.b), 2 .txt files (a/c.txt, a/d.txt)"."""
    kinds = {}
    for path in left_out:
        kinds.setdefault(_kind(path), []).append(path.removesuffix("/"))
    return ", ".join(
        f"{len(paths)} {kind}{'s' if len(paths) > 1 else ''} ({some(paths)})"
        for kind, paths in kinds.items()
    )


def some(names: Sequence[str]) -> str:
    """Joins the first names with commas, and dots if there are more."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


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


def find(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Lists the files that the job predict answers, and what it leaves out.

    Args:
      arguments: files, which need no suffix of images and may be missing, and folders, which are searched in depth.

    Returns:
      The paths in order, and for each folder a line that counts and names the files in it that are not listed.

    Raises:
      UserError: no argument, an empty one, only one and that is missing, folders without images.
    """
    if not arguments:
        raise UserError(
            "the job predict needs image files or folders: run.py --job=predict --workdir=DIR PHOTO.jpg"
        )
    files, lines = [], []
    for argument in arguments:
        if not str(argument):
            raise UserError("the name of an image file is empty: name a file or folder")
        path = Path(argument)
        if not os.path.isdir(path):  # False also of a name that is too long
            if len(arguments) == 1 and not os.path.lexists(path):
                raise UserError(f"no such file or folder: {path}")
            files.append(path)
            continue
        closed = []
        listing = listed(walk(path, closed.append))
        # A folder that cannot be read has its line among the answers.
        files += [Path(error.filename) for error in closed]
        if listing.left_out:
            lines.append(f"left out in {path}: {describe(listing.left_out)}")
        if not listing.images and not files and len(arguments) == 1:
            raise UserError(f"{path} holds no image{_instead(listing.left_out)}")
        if not listing.images:
            lines.append(f"{path} holds no image")
        files += [path / image for image in listing.images]
    if not files:
        raise UserError(f"none of the {len(arguments)} folders holds an image")
    return files, lines


def _instead(left_out: Sequence[str]) -> str:
    if left_out:
        return f": left out {describe(left_out)}; images end in {' '.join(SUFFIXES)}"
    return f" (looked for {' '.join(SUFFIXES)})"


def _kind(path: str) -> str:
    name = PurePosixPath(path).name
    if path.endswith("/"):
        return "hidden folder" if hidden(name) else "backward link"
    if hidden(name):
        return "hidden file"
    if is_image(path):
        return "misplaced image"
    return f"{PurePosixPath(path).suffix.lower()} file".lstrip()
