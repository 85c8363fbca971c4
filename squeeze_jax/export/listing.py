"""The list of exported files, `files.json` in their folder: format, training step, agreement and checksums.

A damaged file may still run and give wrong answers, so its checksum is verified before the file is run.
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
    """Adds the entry of a format to the list, or replaces it.

    Args:
      directory: folder of the exported files.
      key: the format.
      entry: {"path": file name, "step", ...}.
      *paths: files whose checksums are stored in the entry.
    """
    entries = read(directory)
    if entries is None:
        warnings.warn(
            f"{directory / NAME} is damaged and written anew: export formats again that it does not list",
            stacklevel=2,
        )
    checksums = {path.name: _checksum(path) for path in paths}
    text = json.dumps((entries or {}) | {key: {**entry, "sha256": checksums}}, indent=2)
    files.write(directory / NAME, text + "\n")


def read(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Returns {format: entry}; {} if there is no list, None if the list is damaged."""
    path = directory / NAME
    if not path.is_file():
        return {}
    try:
        entries = files.read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        return None
    return entries


def _is_entry(entry: Any) -> bool:
    """Whether the fields that are read have their types; lists of earlier versions have no checksums."""
    return (
        isinstance(entry, dict)
        and type(entry.get("step")) is int
        and isinstance(entry.get("path", ""), str)
        and isinstance(entry.get("sha256", {}), dict)
    )


def verify(path: Path) -> None:
    """Raises a UserError if a file differs from its stored checksum. Warns of a file that is listed without one."""
    for entry in (read(path.parent) or {}).values():
        expected = entry.get("sha256", {}).get(path.name)
        if expected is None and entry.get("path") == path.name:
            warnings.warn(
                f"{path} is not verified: {NAME} has no checksum of it; export it again",
                stacklevel=2,
            )
        if expected is not None and expected != _checksum(path):
            raise UserError(
                f"{path} is damaged: its checksum is not that of {path.parent / NAME}; export it again"
            )


def _checksum(path: Path) -> str:
    try:
        return hashlib.sha256(files.read_file(path)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
