"""Reads UTF-8 text files, gzipped if their name ends in ".gz"; errors name the file and the line."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from squeeze_jax import files
from squeeze_jax.errors import UserError

# The exceptions that reading a file raises, and decompressing one that is damaged or cut off.
FAILURES = (OSError, EOFError, zlib.error)


def read_text(path: Path) -> str:
    """Returns the content of a text file, with its line ends unchanged and without a byte order mark.

    Raises:
      UserError: the file is missing, damaged, or not UTF-8.
    """
    try:
        content = files.read_file(path)
        if files.suffix(path) == ".gz":
            content = gzip.decompress(content)
    except FAILURES as error:
        raise _unreadable(path, error) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, line, error) from None


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file one after the other, each with its line end; skips a byte order mark.

    Raises:
      UserError: the file is missing, damaged, or not UTF-8.
    """
    open_text = gzip.open if files.suffix(path) == ".gz" else open
    try:
        files.open_file(path).close()
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError:
        # The error counts bytes from the start of a buffer, not of the file, so the line is searched for.
        with open_text(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number, error) from None
        raise
    except FAILURES as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot read {path}: {reason}")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{path}:{line} is not UTF-8 text, as its byte 0x{byte:02x} tells: save the file as UTF-8"
    )
