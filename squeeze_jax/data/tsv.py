"""Reads files of tab-separated columns with one example per line and no quoting; errors name the file and the line."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)


class Table(NamedTuple):
    """The content of a file.

    Attributes:
      path: the file.
      header: the names of the columns.
      rows: one list of cells per row, as many as there are columns.
      lines: the line number of each row in the file, from 1.
    """

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Returns the cells of a column; raises a UserError that lists the columns if there is no such name."""
        if name not in self.header:
            raise UserError(
                f"{self.path} lacks the column {name!r}: it has {', '.join(self.header)}"
            )
        column = self.header.index(name)
        return [row[column] for row in self.rows]


def find_file(path: Path) -> Path | None:
    """Returns `path`, or the path of the gzipped file beside it if only that exists; None if neither exists."""
    candidates = (path, path.with_name(f"{path.name}.gz"))
    return next((p for p in candidates if p.is_file()), None)


def read(
    path: Path, header: Sequence[str] | None = None, *, skip_broken: bool = False
) -> Table:
    """Reads a .tsv or .tsv.gz file in UTF-8; skips a byte order mark.

    Args:
      path: the file.
      header: the names of the columns, for a file without them; None if the first line has them.
      skip_broken: whether to leave out lines with another number of columns, with a warning; otherwise they are an error.

    Raises:
      UserError: the file cannot be read or is empty, or a line has another number of columns.
    """
    lines = [line.removesuffix("\r") for line in text_files.read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    first = 1
    if header is None:
        if not lines:
            raise UserError(f"{path} is empty: its first line should name its columns")
        header, first = lines.pop(0).split("\t"), 2
    rows, numbers, left_out = [], [], 0
    for number, line in enumerate(lines, first):
        cells = line.split("\t")
        if len(cells) == len(header):
            rows.append(cells)
            numbers.append(number)
        elif skip_broken:
            left_out += 1
        else:
            raise UserError(
                f"{path}:{number} has {len(cells)} columns, not {len(header)}: {', '.join(header)}"
            )
    if left_out:
        log.warning("%s: %d lines without all columns left out", path, left_out)
    return Table(path, tuple(header), rows, numbers)
