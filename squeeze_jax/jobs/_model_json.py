"""Reads and writes `model.json` of a work directory: what other runs and jobs need to use the run's trained network.

Each checkpoint's note holds the same contents, so that a damaged file loses nothing.
"""

import contextlib
import inspect
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from squeeze_jax import files, registry
from squeeze_jax.data import Data, vision
from squeeze_jax.data.pipeline import TASKS
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _places
from squeeze_jax.jobs._settings import with_tuples
from squeeze_jax.train.checkpoint import Checkpoints

NAME = "model.json"


def write(
    workdir: pathlib.Path,
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    source: Data | None = None,
) -> None:
    """Writes the file; for the arguments see `contents`."""
    text = json.dumps(contents(options, checkpoint, source), indent=2)
    files.write(workdir / NAME, text + "\n")


def contents(
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    source: Data | None = None,
) -> dict[str, Any]:
    """Returns the contents of the file.

    Args:
      options: the arguments of `models.make` that build the network; checkpoints of later phases have options of their own.
      checkpoint: the arguments of `Checkpoints`, which select the checkpoint of the trained network.
      source: the data; the file keeps their class names, and for images the arguments of `data/sources/absent.py`.

    Returns:
      {"model": options, "checkpoint": arguments}; with data also "classes", with texts also "tokens", the digest of the tokens
      and their ids, with images also "channels", and with images that have classes also "source".
    """
    saved_model = {"model": dict(options), "checkpoint": dict(checkpoint)}
    if source is None:
        return saved_model
    saved_model["classes"] = list(source.label_names)
    if (tokens := _classes.token_digest(source)) is not None:
        saved_model["tokens"] = tokens
    segmentation = source.metrics == "segmentation"
    if source.reads != "images":
        return saved_model
    channels = saved_model["channels"] = source.example().shape[-1]
    if source.label_names and (segmentation or source.metrics == "classification"):
        absent = dict(name="absent", classes=saved_model["classes"], channels=channels)
        saved_model["source"] = absent | ({"ignored": []} if segmentation else {})
    return saved_model


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Reads the file; if it is missing or damaged, reads its contents from the newest checkpoint and warns.

    Returns:
      See `contents`; None if there is no file and no checkpoint.

    Raises:
      UserError: the file is damaged, and no checkpoint has its contents.
    """
    _places.check(workdir)
    path = workdir / NAME
    try:
        saved_model = with_tuples(files.read_json(path))
    except FileNotFoundError:
        saved_model, problem = None, f"{path} is missing"
    except ValueError as error:
        saved_model, problem = None, f"{path} is not valid JSON ({error})"
    except OSError as error:
        saved_model, problem = None, f"{path} cannot be read ({error.strerror})"
    else:
        problem = f"{path} is of another version, or damaged"
    if not _is_complete(saved_model):
        saved_model = checkpoint_note(workdir).get("noted")
        if saved_model is None and not path.exists():
            return None
        if saved_model is None:
            raise UserError(f"{problem}: run the job fit there again")
        warnings.warn(f"{problem}; the newest checkpoint's is taken", stacklevel=2)
    return saved_model


def _is_complete(saved_model: Any) -> bool:
    """Returns whether the contents of a file have the form that `contents` gives them."""
    if not isinstance(saved_model, dict):
        return False
    model, checkpoint = (saved_model.get(key) for key in ("model", "checkpoint"))
    classes = saved_model.get("classes", ())
    if not isinstance(model, dict) or not isinstance(checkpoint, dict):
        return False
    try:
        given = ("directory", "read_only")
        registry.check(Checkpoints, checkpoint, "checkpoint", given=given)
    except UserError:
        return False
    return (
        isinstance(model.get("name"), str)
        and isinstance(classes, list | tuple)
        and all(isinstance(name, str) for name in classes)
        and isinstance(saved_model.get("source", {}), dict)
    )


def checkpoint_note(workdir: pathlib.Path, **checkpoint_settings) -> dict[str, Any]:
    """Returns the note of the checkpoint that holds a run's trained network; {} if none can be read.

    Args:
      workdir: the run's work directory.
      **checkpoint_settings: arguments of `Checkpoints`; without any, the newest checkpoint is read.
    """
    directory, note = workdir / "checkpoints", None
    if directory.is_dir():
        opened = Checkpoints(directory, **checkpoint_settings, read_only=True)
        with contextlib.closing(opened) as checkpoints, contextlib.suppress(UserError):
            note = checkpoints.note()
    return with_tuples(dict(note or {}))


def config_without_examples(
    workdir: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns a run's config with random examples in place of its own, for jobs that need none.

    Images become those of `data/sources/absent.py`, and tables of texts are left out. Returns None for other data, or if
    `model.json` does not describe them.
    """
    saved_model, data = read(workdir) or {}, dict(config.get("data", {}))
    if data.get("name") == "texts" and "classes" in saved_model:
        several = data.get("target", "class") != "number"
        data |= {"train": None, "eval": None}
        data |= {"classes": saved_model["classes"]} if several else {}
    elif "source" in saved_model and "source" in data:
        data["source"] = dict(saved_model["source"])
    else:
        return None
    return dict(config) | {"data": data}


def with_channels(workdir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config whose images have the channels that the network of a work directory was trained on.

    Without this, a colour image in a folder of grey images would give the trained network another input.

    Args:
      workdir: the run's work directory.
      config: the config of the run; if it names channels, or its data take none, it stays as it is.
    """
    config, section = dict(config), config.get("data")
    if not isinstance(section, Mapping) or not (channels := _trained_channels(workdir)):
        return config
    name = section.get("name", "images")
    with contextlib.suppress(UserError):  # a faulty section is told later
        task = registry.load(
            TASKS, name if isinstance(name, str) else "", "kind of data"
        )
        takes = inspect.signature(task.make).parameters
        if "channels" in takes and section.get("channels") is None:
            config["data"] = dict(section) | {"channels": channels}
    return config


def _trained_channels(workdir: pathlib.Path) -> int | None:
    """Returns the number of channels of the images that a run was trained on; None if it is unknown."""
    try:
        saved_model = files.read_json(workdir / NAME)
    except (OSError, ValueError):
        saved_model = None
    if not _is_complete(saved_model):  # `read` warns
        saved_model = checkpoint_note(workdir).get("noted") or {}
    absent = saved_model.get("source", {})  # in earlier versions the only place
    channels = saved_model.get("channels", absent.get("channels"))
    known = isinstance(channels, int) and channels in vision.MODES
    return channels if known else None


def check_data(workdir: pathlib.Path, source: Data) -> None:
    """Raises a UserError if a run's network was trained on other classes or tokens than the data's, or in another order.

    Args:
      workdir: the run's work directory.
      source: the data.
    """
    saved_model = read(workdir) or {}
    names = source.label_names
    _classes.check_same_classes(saved_model.get("classes"), names, str(workdir))
    remedy = "train in another --workdir"
    tokens = saved_model.get("tokens")
    _classes.check_same_tokens(tokens, source, str(workdir), remedy)
