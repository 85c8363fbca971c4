"""The report of a run as JSON: its rows, its config and where they come from."""

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
    **more: Any,
) -> dict[str, Any]:
    """Writes `{"rows", "config", **more, "provenance"}` atomically and returns it.

    Tuples become lists, numpy values Python's, paths text; numbers that are not finite become null, which JSON lacks.

    Args:
      path: the file.
      rows: of `table.row`.
      config: the run's config.
      **more: other keys, such as a title.

    Raises:
      UserError: the place cannot be written to.
    """
    content = plain(
        {"rows": rows, "config": config, **more, "provenance": provenance.collect()}
    )
    files.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return content


def read(path: str | Path) -> dict[str, Any]:
    """Reads what `write` wrote.

    Raises:
      UserError: no such file, or not such a file.
    """
    try:
        content = json.loads(files.path(path).read_text())
        content["rows"], content["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the report {path}: {error}") from None
    return content


def plain(value: Any) -> Any:
    """A value made of JSON's types only."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
