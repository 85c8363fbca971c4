"""Image files: finds the images in a folder or archive, describes the files that are left out, and decodes single images.

Image sources and the job predict share this list of suffixes and this walk over folders.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from squeeze_jax.data import vision
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.files import read_file

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp"),
    *(".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    *(".jp2", ".j2k"),
)
# Lower-case names of folders and files that operating systems add; names with a leading dot are always hidden.
SYSTEM = (
    *("__macosx", "@eadir", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
)
RESULT = "_classes.png"  # the end of the names of files that the job predict writes
# The text in these files that tells them from the user's own files.
RESULT_MARK = ("Software", "squeeze_jax predict")
LONGEST = 200  # characters of a name in an error
NAMED = 3  # the number of files that a line names; it only counts the others


class Listing(NamedTuple):
    """The files of a folder or archive, by their paths below it.

    Attributes:
      images: the paths of images, in the order of their parts.
      left_out: the paths of all other files; a hidden folder is one path that ends in "/".
    """

    images: tuple[str, ...]
    left_out: tuple[str, ...]


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder with this name is hidden or belongs to the operating system."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Returns whether a file with this name is an image, judged by its suffix in upper or lower case."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_result(file: IO[bytes]) -> bool:
    """Returns whether the job predict has written a file."""
    key, text = RESULT_MARK
    try:
        with vision.decoding():
            return vision.open_picture(file).info.get(key) == text
    except (OSError, vision.Undecodable):
        return False


def raise_unreadable(error: OSError) -> None:
    """Raises a UserError for a folder that cannot be read."""
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")


def walk(
    folder: Path, unreadable: Callable[[OSError], None] = raise_unreadable
) -> list[str]:
    """Lists the paths of all files below a folder, and follows links.

    A hidden folder is not entered: it is one path that ends in "/". The same holds for a link to one of the folders that
    contain it.

    Args:
      folder: the folder.
      unreadable: is called for a folder that cannot be read; by default it raises a UserError.

    Returns:
      The paths, relative to `folder`.
    """
    real = Path(os.path.realpath(folder))  # which links that lead in a circle have too
    ancestors_of = {str(folder): (real, *real.parents)}
    paths = []
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        relative = PurePosixPath(Path(place).relative_to(folder).as_posix())
        ancestors = ancestors_of.pop(place)
        for name in list(folders):
            # Following a link to a folder that contains it would never end.
            target = Path(os.path.realpath(os.path.join(place, name)))
            if is_hidden(name) or target in ancestors:
                folders.remove(name)
                paths.append(f"{relative / name}/")
            else:
                ancestors_of[os.path.join(place, name)] = (target, *ancestors)
        paths += [str(relative / name) for name in files]
    return paths


def separate_images(paths: Iterable[str]) -> Listing:
    """Separates images from other files; all paths below a hidden folder become the one path of that folder.

    Args:
      paths: as `walk` returns them.
    """
    images, left_out = [], set()
    for path in paths:
        parts = path.removesuffix("/").split("/")
        cut = next((i for i, part in enumerate(parts) if is_hidden(part)), None)
        if cut is not None and cut + 1 < len(parts):
            left_out.add("/".join(parts[: cut + 1]) + "/")
        elif cut is None and not path.endswith("/") and is_image(path):
            images.append(path)
        else:
            left_out.add(path)
    ordered = (sorted(each, key=lambda p: p.split("/")) for each in (images, left_out))
    return Listing(*map(tuple, ordered))


def describe(left_out: Sequence[str]) -> str:
    """Counts and names the paths that a listing leaves out: "1 hidden folder (a/.b), 2 .txt files (a/c.txt, a/d.txt)"."""
    kinds = {}
    for path in left_out:
        kinds.setdefault(_kind(path), []).append(path.removesuffix("/"))
    return ", ".join(
        f"{len(paths)} {kind}{'s' if len(paths) > 1 else ''} ({join_names(paths)})"
        for kind, paths in kinds.items()
    )


def join_names(names: Sequence[str]) -> str:
    """Returns the first `NAMED` names joined with commas, and "..." if there are more names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def decode(
    image: bytes | str | os.PathLike, view: vision.View, name: str = ""
) -> np.ndarray:
    """Returns an image as evaluation sees it, uint8 [h, w, c].

    Args:
      image: the bytes of an encoded image, or the path of a file.
      view: the size and the transforms.
      name: the name of the bytes in errors.

    Raises:
      UserError: there is no such file, or it is not an image.
    """
    if not isinstance(image, bytes):
        name = shortened(str(image), LONGEST)
        try:
            image = read_file(image)
        except OSError as error:
            raise UserError(f"cannot read {name}: {error.strerror}") from None
    try:
        return vision.still(image, view)
    except vision.Undecodable as error:
        raise UserError(f"cannot decode image {name}: {error}") from None


def find_images(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Lists the image files for the job predict, and describes the files that it leaves out.

    Args:
      arguments: files and folders. Files may have any suffix and may be missing; folders are searched in depth.

    Returns:
      The paths in order, and for each folder a line that counts and names the files left out.

    Raises:
      UserError: there is no argument, the only argument is missing, or no folder holds an image.
    """
    if not arguments:
        raise UserError(
            "the job predict needs image files or folders: run.py --job=predict --workdir=DIR PHOTO.jpg"
        )
    files, lines = [], []
    for argument in arguments:
        # "" would be the current folder; in its quotes it is a missing file, and gets its line.
        path = Path(argument if str(argument).strip() else repr(argument))
        if not os.path.isdir(path):  # also False for a name that is too long
            if len(arguments) == 1 and not os.path.lexists(path):
                raise UserError(
                    f"no such file or folder: {shortened(str(path), LONGEST)}"
                )
            files.append(path)
            continue
        errors = []
        listing = separate_images(walk(path, errors.append))
        # A folder that cannot be read is listed as a file, so that the job prints a line about it.
        files += [Path(error.filename) for error in errors]
        if listing.left_out:
            lines.append(f"left out in {path}: {describe(listing.left_out)}")
        if not listing.images and not files and len(arguments) == 1:
            raise UserError(f"{path} holds no image{_why_no_image(listing.left_out)}")
        if not listing.images:
            lines.append(f"{path} holds no image")
        files += [path / image for image in listing.images]
    if not files:
        raise UserError(f"none of the {len(arguments)} folders holds an image")
    return files, lines


def _why_no_image(left_out: Sequence[str]) -> str:
    if left_out:
        return f": left out {describe(left_out)}; images end in {' '.join(SUFFIXES)}"
    return f" (looked for {' '.join(SUFFIXES)})"


def _kind(path: str) -> str:
    name = PurePosixPath(path).name
    if path.endswith("/"):
        return "hidden folder" if is_hidden(name) else "backward link"
    if is_hidden(name):
        return "hidden file"
    if is_image(path):
        return "misplaced image"
    return f"{PurePosixPath(path).suffix.lower()} file".lstrip()
