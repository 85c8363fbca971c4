"""Class names inside exported files.

A zip archive behind a file's own bytes holds `labels.txt`, one name a line, where TensorFlow Lite's metadata keep it:
`unzip -p model.tflite labels.txt` prints it, and the runtimes ignore it.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from squeeze_jax.errors import UserError

NAME = "labels.txt"
DAY = (1980, 1, 1, 0, 0, 0)  # the same names make the same bytes


def check(names: Sequence[str]) -> None:
    """Raises a UserError for a name with a line break."""
    for name in names:
        if len(name.splitlines()) > 1:
            raise UserError(
                f"the class name {name!r} has a line break: rename the class"
            )


def attach(content: bytes, names: Sequence[str]) -> bytes:
    """Returns a file's content with the names of its classes behind it, or as it is without names."""
    if not names:
        return content
    archive = io.BytesIO(content)
    archive.seek(0, io.SEEK_END)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(zipfile.ZipInfo(NAME, DAY), "".join(f"{n}\n" for n in names))
    return archive.getvalue()


def read(path: str | Path) -> tuple[str, ...]:
    """Returns the names of the classes of an exported file, in order; () where it has none."""
    try:
        with zipfile.ZipFile(path) as opened:
            lines = opened.read(NAME).decode()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError):
        return ()
    return tuple(lines.splitlines())
