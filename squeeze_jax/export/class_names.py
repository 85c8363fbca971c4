"""Class names inside exported files.

A zip archive after a file's own bytes holds `labels.txt`, one name per line, as in TensorFlow Lite's metadata.
`unzip -p model.tflite labels.txt` prints it, and the runtimes ignore it. Names of folders that are not UTF-8 keep their bytes.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from squeeze_jax import files
from squeeze_jax.errors import UserError

NAME = "labels.txt"
DAY = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that equal names give equal bytes
BYTES = "surrogateescape"  # how Python holds bytes of a name that are not UTF-8


def check(names: Sequence[str]) -> None:
    """Raises a UserError if `read` would not return a class name: it has a line break, or characters that no file can hold."""
    for name in names:
        if f"{name}\n".splitlines() != [name]:
            raise UserError(
                f"the class name {name!r} has a line break: rename the class"
            )
        try:
            is_kept = _from_bytes(_to_bytes([name])) == (name,)
        except UnicodeEncodeError:
            is_kept = False
        if not is_kept:
            raise UserError(
                f"the class name {name!r} has half a character: rename the class"
            )


def attach(content: bytes, names: Sequence[str]) -> bytes:
    """Returns a file's content followed by an archive of its class names; unchanged if there are none."""
    if not names:
        return content
    archive = io.BytesIO(content)
    archive.seek(0, io.SEEK_END)
    with zipfile.ZipFile(archive, "a") as archive_file:
        archive_file.writestr(zipfile.ZipInfo(NAME, DAY), _to_bytes(names))
    return archive.getvalue()


def read(path: str | Path) -> tuple[str, ...]:
    """Returns the class names of an exported file, in order; () if it has none."""
    try:
        with zipfile.ZipFile(files.path(path)) as archive_file:
            return _from_bytes(archive_file.read(NAME))
    except (zipfile.BadZipFile, KeyError):
        return ()


def _to_bytes(names: Sequence[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode(errors=BYTES)


def _from_bytes(content: bytes) -> tuple[str, ...]:
    return tuple(content.decode(errors=BYTES).splitlines())
