"""Paths from users and for libraries, reading files alone, and writing a file so that a reader finds all of it or the one before it."""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

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


# Variables of the environment that name folders. Shells expand ~ in them only without quotes, and libraries do not.
_FOLDERS = (
    *("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    *("XDG_DATA_HOME", "MPLCONFIGDIR", "TFDS_DATA_DIR"),
)


def expand_environment() -> None:
    """Replaces ~ in the variables of the environment that name folders, before a library makes a folder of this name."""
    for name in _FOLDERS:
        if os.environ.get(name, "").startswith("~"):
            os.environ[name] = os.path.expanduser(os.environ[name])


# What a path may lead to in place of a file or a folder.
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file for reading; refuses a pipe, a socket or a device, which may never end.

    Raises:
      OSError: the path cannot be opened, or is no file; its `strerror` says why.
    """
    kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))
    return open(path, "rb")


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the content of a file; raises the errors of `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file.

    Raises:
      OSError: see `open_file`.
      ValueError: the file is no JSON, or is nested too deep.
    """
    return parse_json(read_file(path))


def parse_json(text: bytes | str) -> Any:
    """Returns what JSON stands for; raises a ValueError for anything else, also if it is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Not enough disk space",
)


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see `written_name`
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


def digest(content: Any) -> str:
    """Returns a short text that is the same for equal content of JSON's types."""
    return hashlib.sha1(json.dumps(content).encode()).hexdigest()


def suffix(path: str | Path) -> str:
    """Returns the last suffix of a file's name in lower case, such as ".npz" of "A.NPZ"; "" if it has none."""
    return Path(path).suffix.lower()


def written_name(path: Path) -> str:
    """Returns the name of the file that `write` was writing under a temporary name when it was killed; "" for other files."""
    written = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
    return written[1] if written else ""


def check_writable(path: str | Path, key: str) -> None:
    """Raises a UserError if `write` could not write a file, so that no work is lost; writes nothing.

    Args:
      path: where the file would go.
      key: how the error calls it, such as "--outputs".
    """
    path = Path(path).absolute()
    folder = next(place for place in path.parents if os.path.lexists(place))
    if os.path.isdir(path):
        reason = "it is a folder"
    elif not os.path.isdir(folder):
        reason = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} cannot be written to"
    else:
        return
    raise UserError(f"{key} = {str(path)!r}: {reason}; choose another file")


def check_new_folder(path: str | Path, key: str, suffix: str = "") -> None:
    """Raises a UserError if no folder can be made and filled at a path, so that no work is lost; leaves nothing there.

    Args:
      path: where the folder would be made; an empty folder may be there.
      key: how the error calls it, such as "config.search.to".
      suffix: of the folder's temporary name.
    """
    check_utf8(path, key)
    path = Path(path).absolute()
    folder = next(place for place in path.parents if os.path.lexists(place))
    probe = folder / f".{os.getpid()}.tmp"
    problem = ""
    try:
        if os.path.islink(path):
            problem = "it is a link"
        elif os.path.isdir(path):
            problem = "the folder is not empty" if os.listdir(path) else ""
        elif os.path.lexists(path):
            problem = "it is a file"
        longest = len(os.fsencode(path.name + suffix))
        if longest > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "its name is too long")
        if not problem:
            probe.mkdir()
            probe.rmdir()
    except OSError as error:
        problem = f"no folder can be made in {folder}: {error.strerror}"
    if problem:
        raise UserError(f"{key} = {str(path)!r}: {problem}; choose another folder")


def move(source: str | Path, target: str | Path) -> None:
    """Moves a written file to its place on the same disk, in one step, over an earlier file.

    Raises:
      UserError: the place is a folder, or cannot be written to.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
