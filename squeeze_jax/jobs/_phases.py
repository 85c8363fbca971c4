"""The phases of a run: each phase runs the training loop with its own overrides of the config.

    phases = (
        dict(steps=300),
        dict(steps=200, begin=dict(name="prune.narrow", layers=(...)), optim=dict(lr=0.02)),
    )

A phase's sections (dicts) are merged with the config's, its other values replace them. Steps count on over the phases;
schedules, and the steps that methods see, begin anew in each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from squeeze_jax.errors import UserError, nearest

OVERRIDES = ("batch", "optim", "data", "update", "forward", "objective", "gradients")
OVERRIDES += ("exchange", "accumulate", "ema", "dtype")
OVERRIDES += ("log_every", "eval_every", "save_every")
MERGED = ("optim", "data")  # sections of settings; the others name methods

# Each phase shuffles its data by a different seed.
_SEED = 0x9E3779B1


class Phase(NamedTuple):
    """Where a phase stands in its run.

    Attributes:
      index: from 0.
      count: phases of the run.
      first: steps of the phases before it.
      steps: its own.
    """

    index: int
    count: int
    first: int
    steps: int

    @property
    def end(self) -> int:
        """Returns the phase's last step, counted over all phases."""
        return self.first + self.steps

    @property
    def label(self) -> str:
        """Returns a label such as "phase 1/2"; "" for a run of one phase."""
        return f"phase {self.index + 1}/{self.count}" if self.count > 1 else ""


def check(config: Mapping[str, Any]) -> None:
    """Checks the phases of a config, but for the values of their overrides.

    Raises:
      UserError: a phase that is no dict, unknown keys, steps that are missing, or given twice.
    """
    phases = config.get("phases", ())
    for number, phase in enumerate(phases):
        where = f"config.phases[{number}]"
        if not isinstance(phase, Mapping):
            raise UserError(
                f"{where} = {phase!r} should be a dict such as dict(steps=100)"
            )
        known = ("steps", "begin", *OVERRIDES)
        for key in phase:
            if key not in known:
                raise UserError(f"unknown key {where}.{key}{nearest(key, known)}")
        steps = phase.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(
                f"{where}.steps = {steps!r} should be an integer of at least 1"
            )
        if number == 0 and "begin" in phase:
            raise UserError(
                f"{where}.begin: a transition stands between two phases; leave it out of the first"
            )
    steps = config.get("steps")
    if not phases and steps is None:
        raise UserError("missing key config.steps: add it to the config")
    if phases and steps not in (None, total(phases)):
        raise UserError(
            f"config.steps = {steps}, but the steps of config.phases add up to {total(phases)}: leave it out"
            ", and set config.phases.0.steps and so on"
        )


def total(phases) -> int:
    """Returns the number of steps of all phases."""
    return sum(phase["steps"] for phase in phases)


def of(experiment, index: int):
    """Returns (the experiment as it is in a phase, the phase).

    Args:
      experiment: the whole one.
      index: of the phase, from 0.
    """
    phases = experiment.phases
    if not phases:
        return experiment, Phase(0, 1, 0, experiment.steps)
    if not 0 <= index < len(phases):
        raise UserError(
            f"there is no phase {index + 1}: config.phases has {len(phases)}; choose another --workdir"
        )
    changes = {k: v for k, v in phases[index].items() if k != "begin"}
    for key in MERGED:
        if key in changes:
            changes[key] = {**getattr(experiment, key), **changes[key]}
    first = total(phases[:index])
    phase = Phase(index, len(phases), first, changes["steps"])
    return dataclasses.replace(experiment, **changes), phase


def data_seed(seed: int, phase: Phase) -> int:
    """Returns the seed that shuffles a phase's examples; in the first phase it is the run's seed."""
    return (seed + phase.index * _SEED) % 2**32
