"""Text files, UTF-8, gzipped where their name ends in ".gz"; what cannot be read is named by file and line."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from squeeze_jax.errors import UserError

# What reading, and decompressing what is damaged or cut off, raise.
FAILURES = (OSError, EOFError, zlib.error)


def text(path: Path) -> str:
    """What is in a file, its ends of lines as they are; a byte order mark is passed over.

    Raises:
      UserError: a file that is not there, damaged, or no UTF-8.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FAILURES as error:
        raise _unreadable(path, error) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _foreign(path, line, error) from None


def lines(path: Path) -> Iterator[str]:
    """Lines of a file with their ends, read one after the other; otherwise as `text`."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError:
        # It says where in a part of the file; the line has to be looked for.
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise _foreign(path, number, error) from None
        raise
    except FAILURES as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot read {path}: {reason}")


def _foreign(path: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{path}:{line} is not UTF-8 text, as its byte 0x{byte:02x} tells: save the file as UTF-8"
    )
