"""Sections of a config that are settings of a job: declared in the job's file, as its class `Settings`.

A section has the name of its job, and its keys are the class's attributes. A job that has more to check than types has a
function `check(settings, built)`, called before any work starts.
"""

import importlib
import numbers
import os
import re
from collections.abc import Mapping
from typing import Any

from squeeze_jax import files, registry
from squeeze_jax.data.vision import CROP, SQUASH
from squeeze_jax.errors import UserError, shown

JOBS = "squeeze_jax.jobs"


def jobs() -> list[str]:
    """Returns the names of all jobs."""
    return registry.names(JOBS)


def with_settings() -> list[str]:
    """Returns the names of the jobs that have settings, which a config may have a section for."""
    loaded = {name: importlib.import_module(f"{JOBS}.{name}") for name in jobs()}
    return [name for name, module in loaded.items() if hasattr(module, "Settings")]


def sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of each job that a config has a section for.

    Raises:
      UserError: a job without settings, an unknown key, a value of another type.
    """
    made_of = {}
    for name in jobs():
        if name in config and name != "seeds":  # that is a key of its own
            module = registry.load(JOBS, name, "job")
            if not hasattr(module, "Settings"):
                raise UserError(
                    f"unknown key config.{name}: the job {name} has no settings; leave the section out"
                )
            made_of[name] = made(module.Settings, config[name], f"config.{name}")
    return made_of


def of(built, kind: type):
    """Returns the settings of a job from the config, or their defaults.

    Args:
      built: the experiment.
      kind: the class `Settings` of the job's file.
    """
    name = kind.__module__.rpartition(".")[2]
    return built.experiment.jobs.get(name) or kind()


def check(built) -> None:
    """Lets each job check its section against the experiment."""
    for name, settings in built.experiment.jobs.items():
        module = importlib.import_module(f"{JOBS}.{name}")
        if hasattr(module, "check"):
            module.check(settings, built)


def made(kind: type, section: Any, where: str):
    """Builds a dataclass of settings from its section."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where} = {shown(section)} should be a dict")
    registry.check(kind, section, where)
    return kind(**section)


def canonical(value: Any, where: str = "config"):
    """Returns a config as it is from Python, JSON and the command line: lists become tuples, ~ the home directory.

    Args:
      value: a config, or a value inside it.
      where: its name as the user writes it.

    Raises:
      UserError: a key that is no name, a value that a file of JSON cannot hold, a home directory of no user, or a config
        that contains itself.
    """
    try:
        return _canonical(value, where)
    except RecursionError:
        raise UserError(
            f"{where} contains itself, or is nested too deep: leave that part out"
        ) from None


def _canonical(value: Any, where: str):
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key:
                raise UserError(f"{where} has the key {shown(key)}: keys are names")
        return {k: _canonical(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_canonical(v, f"{where}[{n}]") for n, v in enumerate(value))
    if isinstance(value, str):
        home = re.match(r"~[\w.-]*(/|$)", value)
        return str(files.path(value, where)) if home else value
    if isinstance(value, os.PathLike):
        return str(files.path(value, where))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):  # numpy's numbers too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise UserError(
        f"{where} = {shown(value)} ({type(value).__name__}) should be a number, a string, True, False, None, a tuple or a"
        " dict"
    )


def tuples(value):
    """Lists become tuples all the way down, so that a config is the same from Python, JSON and the command line."""
    if isinstance(value, Mapping):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list | tuple) else value


def with_resize(config: Mapping[str, Any], resize: str) -> dict[str, Any]:
    """Returns a config that says how images of another aspect ratio are resized; only data of images have the key.

    Args:
      config: with or without the key `data.resize`.
      resize: its value where the config lacks it.
    """
    section = config.get("data")
    images = isinstance(section, Mapping) and section.get("name", "images") == "images"
    if not images or "source" not in section or "resize" in section:
        return dict(config)
    return {**config, "data": {**section, "resize": resize}}


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of an earlier version's config, so that its work directory opens.

    Earlier versions squashed images into `data.size` unless `data.eval_resize` was set, and runs of theirs still do.
    """
    now = dict(config)
    if "transforms" in now:
        transforms = tuple(now.pop("transforms"))
        now |= {"update": ("optim", *transforms)} if transforms else {}
    if "weights" in now:
        weights = tuple(now.pop("weights"))
        now |= {"forward": weights} if weights else {}
    if now.get("objective"):
        now["objective"] = _loss_names(now["objective"])
    if now.get("optim"):
        now["optim"] = {k: _rule_names(v) for k, v in now["optim"].items()}
    return _resized_as_before(now)


def _resized_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the key `data.resize`, also to phases that change `data.eval_resize`; a config that has it stays."""
    resized = with_resize(config, _resize_before(config.get("data")))
    if resized == config:
        return config
    phases = [
        {**phase, "data": {"resize": _resize_before(phase["data"]), **phase["data"]}}
        if isinstance(phase, Mapping) and "eval_resize" in phase.get("data", ())
        else phase
        for phase in config.get("phases", ())
    ]
    return resized | ({"phases": tuple(phases)} if phases else {})


def _resize_before(section: Any) -> str:
    cropped = isinstance(section, Mapping) and section.get("eval_resize")
    return CROP if cropped else SQUASH


def _rule_names(value):
    """Renames the losses' parameters in rules: they stood under "objective" before all methods could own some."""
    if isinstance(value, tuple):
        return tuple(map(_rule_names, value))
    if isinstance(value, str):
        return re.sub(r"(?<![\w/])objective/", "methods/", value)
    return value


def _loss_names(objective):
    """Renames losses: they were called "train.x" before they had their own folder."""
    if not isinstance(objective, Mapping):
        return tuple(_loss_names(section) for section in objective)
    name = objective.get("name", "")
    if isinstance(name, str) and name.startswith("train."):
        return dict(objective) | {"name": "losses." + name.removeprefix("train.")}
    return objective
