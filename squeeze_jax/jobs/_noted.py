"""`model.json` of a work directory: what others need to begin with a run's network, to learn from it or to run it.

Each checkpoint's note has the same, so that a damaged file loses nothing.
"""

import contextlib
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from squeeze_jax import files
from squeeze_jax.data import Data
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes
from squeeze_jax.jobs._settings import tuples
from squeeze_jax.train.checkpoint import Checkpoints

MODEL = "model.json"


def write(
    workdir: pathlib.Path,
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    source: Data | None = None,
) -> None:
    """Writes the file; the arguments are those of `of`."""
    text = json.dumps(of(options, checkpoint, source), indent=2)
    files.write(workdir / MODEL, text + "\n")


def of(
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    source: Data | None = None,
) -> dict[str, Any]:
    """Returns what the file holds.

    Args:
      options: what `models.make` made the network of; checkpoints of later phases have options of their own.
      checkpoint: settings of `Checkpoints`, which say which checkpoint is the trained network.
      source: the data, whose classes are kept, and of images what `data/sources/absent.py` needs.
    """
    noted = {"model": dict(options), "checkpoint": dict(checkpoint)}
    if source is None:
        return noted
    noted["classes"] = list(source.label_names)
    targets = source.metrics == "segmentation"
    images = targets or source.metrics == "classification"
    if images and source.reads == "images" and source.label_names:
        channels = source.example().shape[-1]
        kept = dict(name="absent", classes=noted["classes"], channels=channels)
        noted["source"] = kept | ({"ignored": []} if targets else {})
    return noted


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns what the file holds, or if it is damaged what the newest checkpoint has of it; None without a file.

    Raises:
      UserError: the file is damaged, and no checkpoint has it.
    """
    path = workdir / MODEL
    try:
        noted = tuples(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        noted, wrong = None, f"{path} is not valid JSON ({error})"
    else:
        wrong = f"{path} is of another version"
    if not isinstance(noted, dict) or not {"model", "checkpoint"} <= noted.keys():
        noted = of_checkpoint(workdir).get("noted")
        if noted is None:
            raise UserError(f"{wrong}: run the job fit there again")
        warnings.warn(f"{wrong}; the newest checkpoint's is taken", stacklevel=2)
    return noted


def of_checkpoint(workdir: pathlib.Path, **settings) -> dict[str, Any]:
    """Returns the note of the checkpoint that holds a run's trained network; {} if none can be read.

    Args:
      workdir: of the run.
      **settings: of `Checkpoints`; without any the newest is meant.
    """
    directory, note = workdir / "checkpoints", None
    if directory.is_dir():
        opened = Checkpoints(directory, **settings, read_only=True)
        with contextlib.closing(opened) as checkpoints, contextlib.suppress(UserError):
            note = checkpoints.note()
    return tuples(dict(note or {}))


def without_examples(
    workdir: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns a run's config with noise in place of its images; None where a run does not know enough of them."""
    source = (read(workdir) or {}).get("source")
    if source is None or "source" not in config.get("data", {}):
        return None
    return dict(config) | {"data": dict(config["data"]) | {"source": dict(source)}}


def check_classes(workdir: pathlib.Path, names: Sequence[str]) -> None:
    """Raises a UserError for data whose classes are not those that a run's network was trained on."""
    noted = read(workdir) or {}
    _classes.check_same(noted.get("classes"), names, str(workdir))
