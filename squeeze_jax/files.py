"""Paths from users and for libraries, and writing a file so that a reader finds all of it or the one before it."""

import contextlib
import errno
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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")


class DiskFull(UserError):
    """There is no space left where something is to be written."""


def is_full(error: BaseException | None) -> bool:
    """Returns whether an exception tells of a full disk, or one that led to it: libraries wrap the system's errors."""
    if error is None:
        return False
    if isinstance(error, DiskFull) or getattr(error, "errno", None) in _FULL:
        return True
    if any(words in str(error) for words in _FULL_WORDS):
        return True
    return is_full(error.__cause__ or error.__context__)


def check_utf8(path: str | Path, key: str) -> None:
    """Raises a UserError for a path that is not UTF-8, which libraries of checkpoints and records cannot open.

    Args:
      path: as the system gives it; bytes that are not UTF-8 are lone surrogates.
      key: how the error calls it, such as "--workdir".
    """
    try:
        str(Path(path).absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{key} = {str(path)!r} is not UTF-8: rename the folder or choose another"
        ) from None


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
        kind = DiskFull if is_full(error) else UserError
        raise kind(f"cannot write {path}: {error.strerror}") from None
    return path
