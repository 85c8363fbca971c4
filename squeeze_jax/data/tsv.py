"""Files of tab-separated columns, one example a line, no quoting; mistakes are named by file and line."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A file's content: rows of as many cells as the header has; `lines` says where each stands."""

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """The cells under a name, or a UserError that says which names there are."""
        if name not in self.header:
            raise UserError(
                f"{self.path} lacks the column {name!r}: it has {', '.join(self.header)}"
            )
        place = self.header.index(name)
        return [row[place] for row in self.rows]


def find(path: Path) -> Path | None:
    """The file, or the same compressed, whichever is there."""
    both = (path, path.with_name(f"{path.name}.gz"))
    return next((p for p in both if p.is_file()), None)


def read(
    path: Path, header: Sequence[str] | None = None, *, broken: bool = False
) -> Table:
    """Reads a .tsv, or .tsv.gz; UTF-8, a byte order mark is passed over.

    Args:
      path: the file.
      header: names of the columns where the file has none in its first line.
      broken: whether lines with another number of columns are left out, with a warning; otherwise they are an error.

    Raises:
      UserError: a file that cannot be read or is empty, or a line with another number of columns.
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
        elif broken:
            left_out += 1
        else:
            raise UserError(
                f"{path}:{number} has {len(cells)} columns, not {len(header)}: {', '.join(header)}"
            )
    if left_out:
        log.warning("%s: %d lines without all columns left out", path, left_out)
    return Table(path, tuple(header), rows, numbers)
