"""Finds the function parameter that a config key sets, with its type, range and default."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from squeeze_jax import registry
from squeeze_jax.data.source import SOURCES
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _compilation,
    _experiment,
    _phases,
    _plugs,
    _pretrained,
    _settings,
    _teachers,
)
from squeeze_jax.train import optim, sharding
from squeeze_jax.train.checkpoint import Checkpoints

SECTIONS = {
    "optim": optim.make,
    "sharding": sharding.make_mesh,
    "checkpoint": Checkpoints,
    "compilation": _compilation.enable,
    "init": _pretrained.network_from_init,
    "distill": _teachers.Settings,
}
# Sections that name methods, alone or in a tuple.
_METHODS = ("update", "forward", "objective", "gradients", "exchange")
# Sections whose key "name" chooses a file: (package, what its files are, default name).
_NAMED_SECTIONS = {
    "data": ("squeeze_jax.data.tasks", "kind of data", "images"),
    "model": ("squeeze_jax.models", "model", ""),
}


class Parameter(NamedTuple):
    """The function parameter that a config key sets.

    Attributes:
      hint: its annotation, with the range of its values.
      fallback: the value that it has without the key, in words.
    """

    hint: Any
    fallback: str

    @property
    def optional(self) -> bool:
        """Returns whether the key may be None."""
        return registry.fits(None, self.hint)


def find_parameter(config: Mapping[str, Any], names: Sequence[str]) -> Parameter | None:
    """Returns the function parameter that a config key sets.

    Args:
      config: the whole config.
      names: the key and the sections that it is in, such as ("optim", "lr").

    Returns:
      None if no signature has the key, or if the key lies in a method's section.
    """
    if len(names) == 1:
        function = _experiment.Experiment
    elif len(names) == 2:
        function = _section_function(config, names[0])
    else:
        return None
    parameter = function and inspect.signature(function).parameters.get(names[-1])
    if not parameter or parameter.name not in registry.annotations(function):
        return None
    default = parameter.default
    fallback = f"its default, {default!r}"
    if names[-1] == "steps" and config.get("phases"):
        fallback = "the sum over config.phases"
    elif default is parameter.empty:
        fallback = "nothing: the config needs it"
    elif not isinstance(default, str | int | float | tuple | None):
        fallback = "an empty section"
    return Parameter(registry.annotations(function)[parameter.name], fallback)


def find_type(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns the annotation of the function parameter that a config key sets, also in sections of phases, sources and methods.

    Args:
      config, names: see `find_parameter`; a number is a place in a tuple.

    Returns:
      None if no signature has the key.
    """
    first, *others = names
    if first == "phases" and len(others) > 1 and others[1] != "begin":
        phase = _entry(config, names[:2])
        if not isinstance(phase, Mapping):
            return None
        merged = {
            k: {**config[k], **v} if k in _phases.MERGED and k in config else v
            for k, v in phase.items()
        }
        return find_type({**config, **merged}, others[1:])
    section = _entry(config, names[:-1])
    if not isinstance(section, Mapping):
        return None
    try:
        if names[:-1] == ["data", "source"]:
            function = registry.load(SOURCES, section.get("name", ""), "source").make
        elif first in _METHODS or "begin" in names[:-1]:
            function = _plugs.load_file(section.get("name", ""), first).make
        else:
            declared = find_parameter(config, names)
            return declared and declared.hint
    except (
        UserError,
        AttributeError,
        TypeError,
    ):  # the check of the whole config reports it
        return None
    return registry.annotations(function).get(names[-1])


def _entry(config: Any, names: Sequence[str]) -> Any:
    """Returns what names lead to in a config; None if there is nothing."""
    for name in names:
        if isinstance(config, tuple | list) and name.isdecimal():
            config = config[int(name)] if int(name) < len(config) else None
        else:
            config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _section_function(config: Mapping[str, Any], section: str) -> Callable | None:
    """Returns the function or class whose parameters a section's keys are; None if there is none or its file is unknown."""
    if section in SECTIONS:
        return SECTIONS[section]
    if section in _settings.jobs_with_settings():
        return registry.load(_settings.JOBS, section, "job").Settings
    if section not in _NAMED_SECTIONS or not isinstance(config.get(section), Mapping):
        return None
    package, what, default = _NAMED_SECTIONS[section]
    try:
        return registry.load(package, config[section].get("name", default), what).make
    except UserError:  # the check of the whole config reports it
        return None
