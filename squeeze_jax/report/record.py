"""Reads and writes a run's report as JSON: its rows, its config and their provenance."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files
from squeeze_jax.errors import UserError
from squeeze_jax.report import provenance


def write(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    **extra: Any,
) -> dict[str, Any]:
    """Writes `{"rows", "config", **extra, "provenance"}` atomically and returns it.

    Tuples become lists, NumPy values Python values, and paths strings. Numbers that are not finite become null, because JSON
    cannot represent them.

    Args:
      path: the file.
      rows: rows from `table.row`.
      config: the run's config.
      **extra: other keys, such as a title.

    Raises:
      UserError: the file cannot be written.
    """
    content = to_json(
        {"rows": rows, "config": config, **extra, "provenance": provenance.collect()}
    )
    files.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return content


def read(path: str | Path) -> dict[str, Any]:
    """Reads a report that `write` wrote.

    Raises:
      UserError: the file cannot be read or is not a report.
    """
    try:
        content = files.read_json(files.path(path))
        content["rows"], content["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the report {path}: {error}") from None
    return content


def to_json(value: Any) -> Any:
    """Converts a value to JSON types."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
