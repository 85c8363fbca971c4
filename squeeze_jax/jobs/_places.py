"""Checks that a work directory has files and folders where jobs read and write them, and nothing else in their places."""

import os
import pathlib

from squeeze_jax.errors import UserError

FILES = (
    *("config.json", "model.json", "metrics.jsonl", ".lock", "seeds.json"),
    *("report.json", "report.png", "cost.csv", "cost.png"),
    *("checkpoints/scores.json", "export/files.json"),
    *("search/scored.jsonl", "search/front.json", "search/front.png"),
    *("search/fitted.json", "found.json"),
)
FOLDERS = ("checkpoints", "tensorboard", "export", "huggingface", "submission")
FOLDERS_OF_USERS = ("found",)  # whose default place is here
FOLDERS += ("search", "latency", *FOLDERS_OF_USERS)
WRITTEN = ("export/model*", "latency/*.json*")  # patterns of more files


def check(workdir: pathlib.Path) -> None:
    """Checks a work directory before any job reads or writes there.

    Raises:
      UserError: a folder stands in the place of a file, a file in the place of a folder, or a link that leads nowhere.
    """
    _check(workdir, "a folder", os.path.isdir)
    for name in FILES:
        _check(workdir / name, "a file", os.path.isfile)
    for name in FOLDERS:
        _check(workdir / name, "a folder", os.path.isdir)
    for pattern in WRITTEN:
        for path in workdir.glob(pattern):
            _check(path, "a file", os.path.isfile)
    for path in (workdir / "checkpoints").glob("[0-9]*"):
        if path.name.isdecimal():
            _check(path, "a folder", os.path.isdir)


def used_by_run(path: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of a work directory in which a path lies, if the run writes there; None for other paths."""
    place, root = (pathlib.Path(os.path.realpath(p)) for p in (path, workdir))
    if place == root:
        return root
    if root not in place.parents:
        return None
    first, *inner = place.relative_to(root).parts
    taken = {name.partition("/")[0] for name in (*FILES, *FOLDERS)}
    is_free = first in FOLDERS_OF_USERS and not inner
    return root / first if first in taken and not is_free else None


def _check(path: pathlib.Path, wanted: str, is_wanted) -> None:
    """Raises a UserError if something is at a path, but not what is wanted."""
    if is_wanted(path) or not os.path.lexists(path):
        return
    if os.path.isdir(path):
        kind = "a folder"
    elif os.path.isfile(path):
        kind = "a file"
    elif os.path.exists(path):
        kind = "a pipe, a socket or a device"
    else:
        kind = "a link that leads nowhere"
    raise UserError(
        f"{path} is {kind}, not {wanted}: move it away, or choose another work directory"
    )
