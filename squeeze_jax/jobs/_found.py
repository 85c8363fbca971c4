"""`found.json` in the work directory of a network that a search has found: the search's settings, and the predicted costs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from squeeze_jax import files
from squeeze_jax.errors import UserError, shown
from squeeze_jax.jobs import _workdir
from squeeze_jax.report import record

NAME = "found.json"
FREE = ("to", "front")  # settings that do not decide which network is found


def contents(
    settings: Mapping[str, Any], config: Mapping[str, Any], found: Mapping[str, Any]
) -> str:
    """Returns the text of the file.

    Args:
      settings: the keys of `config.search`.
      config: of the run that trained the space.
      found: the network's options, scores and costs.
    """
    content = {
        "search": {k: v for k, v in settings.items() if k not in FREE},
        "training": _workdir.training_digest(config),
        "found": found,
    }
    return json.dumps(record.to_json(content), indent=1) + "\n"


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the file.

    Raises:
      UserError: the work directory has none, or it is damaged.
    """
    path = workdir / NAME
    try:
        content = files.read_json(path)
        parts = content["search"], content["found"]["costs"]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("the settings or the costs are no dict")
        content["training"]
    except FileNotFoundError:
        raise UserError(
            f"{workdir} holds a run without {NAME}, so no search has written it: choose another config.search.to, or move the"
            " folder away"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: choose another config.search.to, or delete the folder {workdir} to search anew"
        ) from None
    return content


def check_same_search(
    workdir: pathlib.Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Raises a UserError unless the same search of the same training has written a found network's work directory.

    Args:
      workdir: the found network's work directory.
      settings, config: see `contents`.
    """
    before = read(workdir)
    now = json.loads(contents(settings, config, {}))
    remedy = f"choose another config.search.to, or delete the folder {workdir} to search anew"
    if before["training"] != now["training"]:
        raise UserError(
            f"{workdir} was found in a space of another training than this run's: {remedy}"
        )
    for key, value in now["search"].items():
        if (theirs := before["search"].get(key)) != value:
            raise UserError(
                f"{workdir} was found with config.search.{key} = {shown(theirs)}, and this command has {shown(value)}: {remedy}"
            )
