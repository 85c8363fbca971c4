"""Reads the user's own tables, .csv, .tsv and .jsonl files, also gzipped; errors name the file and the line."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from squeeze_jax import files
from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError, nearest, shortened

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*SEPARATORS, *JSON_LINES)
LARGEST_CELL = 2**30  # characters; Python's own limit is 131,072


class Table(NamedTuple):
    """The rows of one file.

    Attributes:
      path: the file.
      columns: names of the columns.
      rows: one dict {column: value} per row; values are strings, or any JSON values. A row of a .jsonl file may lack columns.
      lines: the line number where each row begins in the file, from 1.
      quoted: the number of cells in a .tsv file that begin and end with quotation marks, which stay a part of the cells.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    lines: list[int]
    quoted: int = 0

    def check_column(self, name: str, key: str) -> None:
        """Raises a UserError if the table lacks the column `name`; `key` is the config key that names the column."""
        if name not in self.columns:
            raise UserError(
                f"{key} = {name!r} is no column of {self.path}{nearest(name, self.columns)}"
            )


def unzipped_suffix(path: str | Path) -> str:
    """Returns the last suffix of a file's name in lower case, without .gz, such as ".csv" of "A.CSV.GZ"."""
    suffix = files.suffix(path)
    return files.suffix(Path(path).stem) if suffix == ".gz" else suffix


def read(path: Path, separator: str | None = None) -> Table:
    """Reads a table; the end of the file's name decides its format.

    Args:
      path: a UTF-8 file. .csv: cells in quotation marks may hold line breaks; .tsv: no quoting; .jsonl or .ndjson: one JSON
        object per line. The name may also end in .gz.
      separator: the character between cells; None for the comma of .csv and the tab of .tsv.

    Raises:
      UserError: the format is unknown, the file cannot be read or has no rows, or a row has not as many cells as the first
        line.
    """
    suffix = unzipped_suffix(path)
    if suffix in JSON_LINES:
        table = _json_lines(path)
    elif suffix in SEPARATORS:
        table = _cells(path, separator or SEPARATORS[suffix], quoting=suffix == ".csv")
    else:
        raise UserError(
            f"{path} is no table: expected {', '.join((*SEPARATORS, *JSON_LINES))}, also with .gz behind"
        )
    if not table.rows:
        raise UserError(f"{path} has no rows")
    return table


def _json_lines(path: Path) -> Table:
    rows, numbers, columns = [], [], {}
    for number, line in enumerate(text_files.read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number} is not JSON: {error.msg} at column {error.colno}; each line should hold one object"
            ) from None
        except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
            reason = str(error).partition(";")[0]
            raise UserError(f"{path}:{number} cannot be read: {reason}") from None
        if not isinstance(row, dict):
            raise UserError(
                f'{path}:{number} holds {shortened(line.strip(), 60)}, not an object such as {{"text": "..."}}'
            )
        rows.append(row)
        numbers.append(number)
        columns |= dict.fromkeys(row)
    return Table(path, tuple(columns), rows, numbers)


def _cells(path: Path, separator: str, quoting: bool) -> Table:
    content = io.StringIO(text_files.read_text(path), newline="")
    limit = csv.field_size_limit(LARGEST_CELL)
    style = dict(strict=True) if quoting else dict(quoting=csv.QUOTE_NONE)
    reader = csv.reader(content, delimiter=separator, **style)
    records, begins = [], []
    begin = 1
    try:
        for record in reader:
            if record:  # an empty line is not a row
                records.append(record)
                begins.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{begin} is no row of a .csv file: {error}; a quotation mark inside a cell is written twice, and the"
            " cell stands in quotation marks"
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise UserError(f"{path} is empty: its first line should name its columns")
    columns = tuple(name.strip() for name in records[0])
    _check_columns(path, columns, separator)
    for record, line in zip(records[1:], begins[1:], strict=True):
        if len(record) != len(columns):
            raise UserError(
                f"{path}:{line} has {len(record)} cells, the first line {len(columns)}: {', '.join(columns)}"
            )
    rows = [dict(zip(columns, record, strict=True)) for record in records[1:]]
    quoted = 0
    if not quoting:
        cells = (cell for record in records for cell in record)
        quoted = sum(len(c) > 1 and c[0] == c[-1] == '"' for c in cells)
    return Table(path, columns, rows, begins[1:], quoted)


def _check_columns(path: Path, columns: Sequence[str], separator: str) -> None:
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{path} has the column {twice!r} twice: rename one of them")
    if len(columns) == 1:
        for other in ";", "\t", ",", "|":
            if other != separator and other in columns[0]:
                raise UserError(
                    f"{path} has the one column {shortened(columns[0], 60)!r}: set config.data.separator = {other!r} if that"
                    " stands between its cells"
                )
