"""Paths from users, and writing a file so that a reader finds all of it or the one before it, never a part."""

import contextlib
import os
from pathlib import Path

from squeeze_jax.errors import UserError, shown
from squeeze_jax.ranges import Usable


def path(text: str | os.PathLike, where: str = "") -> Path:
    """Returns a path from a user, with ~ and ~name replaced by the home directory; $VARIABLES are not expanded.

    Args:
      text: as the user wrote it.
      where: the name of the value in an error, such as "--workdir".

    Raises:
      UserError: an empty path, no such user, or a path that no system has.
    """
    text = os.fspath(text)
    where = f"{where} = {shown(text)}" if where else shown(text)
    if wrong := Usable().fault(text):
        raise UserError(f"{where} {wrong}")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        user = text.partition("/")[0]
        raise UserError(
            f"{where}: there is no home directory {user}; write ./{user} for a folder of this name"
        )
    return Path(expanded)


def write(path: str | Path, content: bytes | str) -> Path:
    """Writes a file under a temporary name on the same disk, then renames it.

    Args:
      path: where it goes; missing folders are made.
      content: bytes, or text that is written as UTF-8.

    Returns:
      The path.

    Raises:
      UserError: the place cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # as where a folder on the way is a file
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
