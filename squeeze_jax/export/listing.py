"""`files.json` beside exported files: what each is, which step it is of, how closely it agrees, and its checksum.

A damaged file may still run and answer wrongly, so a file is compared with its checksum before it is run.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squeeze_jax import files
from squeeze_jax.errors import UserError

NAME = "files.json"


def record(directory: Path, key: str, entry: Mapping[str, Any], *paths: Path) -> None:
    """Writes down what is known of a format's files; replaces what was known before.

    Args:
      directory: of the files.
      key: the format.
      entry: {"path": file name, "step", ...}.
      *paths: files whose checksums are kept.
    """
    known = read(directory)
    if known is None:
        warnings.warn(
            f"{directory / NAME} is damaged and written anew: export formats again that it does not list",
            stacklevel=2,
        )
    sums = {path.name: _sum(path) for path in paths}
    text = json.dumps((known or {}) | {key: {**entry, "sha256": sums}}, indent=2)
    files.write(directory / NAME, text + "\n")


def read(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Returns what is known by format: {} without a listing, None if it is damaged."""
    path = directory / NAME
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or not all(
        isinstance(each, dict) and "step" in each for each in known.values()
    ):
        return None
    return known


def verify(path: Path) -> None:
    """Raises a UserError for a file that is not as it was written; one without a checksum passes."""
    for entry in (read(path.parent) or {}).values():
        expected = (entry.get("sha256") or {}).get(path.name)
        if expected is not None and expected != _sum(path):
            raise UserError(
                f"{path} is damaged: its checksum is not that of {path.parent / NAME}; export it again"
            )


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
