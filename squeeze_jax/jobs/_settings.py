"""Reads the jobs' settings from a config, and brings configs into one form.

A job declares its settings in its file, as a dataclass `Settings`. The config's section has the job's name, and its keys are
the fields of the class. A job may also define `check(settings, built)`, which is called before any work starts.
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


def job_names() -> list[str]:
    """Returns the names of all jobs."""
    return registry.names(JOBS)


def jobs_with_settings() -> list[str]:
    """Returns the names of the jobs that have settings; a config may have a section for each."""
    modules = {name: importlib.import_module(f"{JOBS}.{name}") for name in job_names()}
    return [name for name, module in modules.items() if hasattr(module, "Settings")]


def job_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {job: its settings} for each job that has a section in a config.

    Raises:
      UserError: a section of a job without settings, an unknown key, or a value of another type or out of range.
    """
    settings = {}
    for name in job_names():
        if name in config and name != "seeds":  # config.seeds is a tuple of integers
            module = registry.load(JOBS, name, "job")
            if not hasattr(module, "Settings"):
                raise UserError(
                    f"unknown key config.{name}: the job {name} has no settings; leave the section out"
                )
            settings[name] = build_settings(
                module.Settings, config[name], f"config.{name}"
            )
    return settings


def job_settings(built, kind: type):
    """Returns a job's settings from the config, or their defaults if the config has no section for the job.

    Args:
      built: the experiment.
      kind: the class `Settings` of the job's file.
    """
    name = kind.__module__.rpartition(".")[2]
    return built.experiment.jobs.get(name) or kind()


def check_jobs(built) -> None:
    """Calls `check` of each job that has a section in the config, with the job's settings and the experiment."""
    for name, settings in built.experiment.jobs.items():
        module = importlib.import_module(f"{JOBS}.{name}")
        if hasattr(module, "check"):
            module.check(settings, built)


def build_settings(kind: type, section: Any, where: str):
    """Checks a section of a config, and returns it as a dataclass.

    Args:
      kind: the dataclass.
      section: its fields, as a dict.
      where: the section's name, for error messages.

    Raises:
      UserError: the section is no dict, a key is unknown, or a value has another type or is out of range.
    """
    if not isinstance(section, Mapping):
        raise UserError(f"{where} = {shown(section)} should be a dict")
    registry.check(kind, section, where)
    return kind(**section)


def canonical(value: Any, where: str = "config"):
    """Returns a config in one form, so that it is equal from Python, from JSON and from the command line.

    Lists become tuples, and paths become strings; in both, a leading ~ becomes the home directory.

    Args:
      value: a config, or a value inside it.
      where: the value's name as the user writes it, for error messages.

    Raises:
      UserError: a key is no name, JSON cannot hold a value, a path names the home directory of an unknown user, or the
        config contains itself.
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
        # A separator may be ~ itself, and so may the name of a class or of a column.
        is_name = re.search(r"(separator|classes\[\d+\]|columns\[\d+\])$", where)
        home = re.match(r"~[\w.-]*(/|$)", value) and not is_name
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


def with_tuples(value):
    """Returns a config or a value in it with tuples in place of lists, at all depths."""
    if isinstance(value, Mapping):
        return {k: with_tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(with_tuples(v) for v in value)
    return value


def with_resize(config: Mapping[str, Any], resize: str) -> dict[str, Any]:
    """Returns a config with the key `data.resize`, which decides how images of another aspect ratio are resized.

    A config whose data are no images is returned as it is.

    Args:
      config: with or without the key.
      resize: the value of the key if the config lacks it.
    """
    section = config.get("data")
    images = isinstance(section, Mapping) and section.get("name", "images") == "images"
    if not images or "source" not in section or "resize" in section:
        return dict(config)
    return {**config, "data": {**section, "resize": resize}}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of an earlier version's config, so that its work directory opens.

    Earlier versions squashed images into `data.size` unless `data.eval_resize` was set; their runs continue to do so.
    """
    upgraded = dict(config)
    if "transforms" in upgraded:
        transforms = tuple(upgraded.pop("transforms"))
        upgraded |= {"update": ("optim", *transforms)} if transforms else {}
    if "weights" in upgraded:
        weights = tuple(upgraded.pop("weights"))
        upgraded |= {"forward": weights} if weights else {}
    if upgraded.get("objective"):
        upgraded["objective"] = _upgrade_loss_names(upgraded["objective"])
    if upgraded.get("optim"):
        upgraded["optim"] = {
            k: _upgrade_rule_names(v) for k, v in upgraded["optim"].items()
        }
    return _upgrade_resize(upgraded)


def _upgrade_resize(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the key `data.resize` as earlier versions resized, also to phases that change `data.eval_resize`.

    A config that has the key is returned as it is.
    """
    resized = with_resize(config, _earlier_resize(config.get("data")))
    if resized == config:
        return config
    phases = [
        {**phase, "data": {"resize": _earlier_resize(phase["data"]), **phase["data"]}}
        if isinstance(phase, Mapping) and "eval_resize" in phase.get("data", ())
        else phase
        for phase in config.get("phases", ())
    ]
    return resized | ({"phases": tuple(phases)} if phases else {})


def _earlier_resize(section: Any) -> str:
    cropped = isinstance(section, Mapping) and section.get("eval_resize")
    return CROP if cropped else SQUASH


def _upgrade_rule_names(value):
    """Renames the losses' parameters in rules from "objective/..." to "methods/..."."""
    if isinstance(value, tuple):
        return tuple(map(_upgrade_rule_names, value))
    if isinstance(value, str):
        return re.sub(r"(?<![\w/])objective/", "methods/", value)
    return value


def _upgrade_loss_names(objective):
    """Renames losses from "train.x" to "losses.x"."""
    if not isinstance(objective, Mapping):
        return tuple(_upgrade_loss_names(section) for section in objective)
    name = objective.get("name", "")
    if isinstance(name, str) and name.startswith("train."):
        return dict(objective) | {"name": "losses." + name.removeprefix("train.")}
    return objective
