"""Finds the parameter that a key of a config sets: its type, its range and its default."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _compilation,
    _experiment,
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
    "init": _pretrained.settings,
    "distill": _teachers.Settings,
}
_NAMED = {  # sections whose name chooses a file: the package, what its files are, the default
    "data": ("squeeze_jax.data.tasks", "kind of data", "images"),
    "model": ("squeeze_jax.models", "model", ""),
}


class Key(NamedTuple):
    """A parameter that a key sets.

    Attributes:
      hint: its annotation.
      fallback: what holds without the key, in words.
    """

    hint: Any
    fallback: str

    @property
    def optional(self) -> bool:
        """Whether None is a value of the key."""
        return registry.fits(None, self.hint)


def find(config: Mapping[str, Any], names: Sequence[str]) -> Key | None:
    """Returns the parameter that a key sets; None for a key of a method, or one that no signature has.

    Args:
      config: the whole one.
      names: of the key, such as ("optim", "lr").
    """
    if len(names) == 1:
        function = _experiment.Experiment
    elif len(names) == 2:
        function = _function(config, names[0])
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
    return Key(registry.annotations(function)[parameter.name], fallback)


def _function(config: Mapping[str, Any], section: str) -> Callable | None:
    """Returns the function or class that a section's keys are parameters of."""
    if section in SECTIONS:
        return SECTIONS[section]
    if section in _settings.with_settings():
        return registry.load(_settings.JOBS, section, "job").Settings
    if section not in _NAMED or not isinstance(config.get(section), Mapping):
        return None
    package, what, default = _NAMED[section]
    try:
        return registry.load(package, config[section].get("name", default), what).make
    except UserError:  # told where the whole config is checked
        return None
