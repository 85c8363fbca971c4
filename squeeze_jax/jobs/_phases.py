"""The phases of a run: each phase runs the training loop with its own overrides of the config.

    phases = (
        dict(steps=300),
        dict(steps=200, begin=dict(name="prune.narrow", layers=(...)), optim=dict(lr=0.02)),
    )

The sections `optim` and `data` of a phase are merged with the config's; its other values replace them. Steps are counted
over all phases. Learning-rate schedules begin anew in each phase, and so do the step numbers that methods get.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from squeeze_jax.errors import UserError, nearest, shown

OVERRIDES = ("batch", "optim", "data", "update", "forward", "objective", "gradients")
OVERRIDES += ("exchange", "accumulate", "ema", "dtype")
OVERRIDES += ("log_every", "eval_every", "save_every")
MERGED = ("optim", "data")  # sections of settings; the others name methods

# Each phase shuffles its data by a different seed.
_SEED_STRIDE = 0x9E3779B1


class Phase(NamedTuple):
    """The place of a phase in its run.

    Attributes:
      index: of the phase, from 0.
      count: number of phases in the run.
      first: the number of steps in all earlier phases, which is the step at which this phase begins.
      steps: the number of steps in this phase.
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
    """Checks the phases of a config, except for the values of their overrides.

    Raises:
      UserError: a phase is no dict or has an unknown key, the first phase has the key "begin", or numbers of steps are
        missing, are not positive integers or contradict `config.steps`.
    """
    phases = config.get("phases", ())
    for number, phase in enumerate(phases):
        where = f"config.phases[{number}]"
        if not isinstance(phase, Mapping):
            raise UserError(
                f"{where} = {phase!r} should be a dict such as dict(steps=100)"
            )
        allowed = ("steps", "begin", *OVERRIDES)
        for key in phase:
            if key not in allowed:
                raise UserError(f"unknown key {where}.{key}{nearest(key, allowed)}")
        for key in MERGED:
            if not isinstance(phase.get(key, {}), Mapping):
                raise UserError(f"{where}.{key} = {shown(phase[key])} should be a dict")
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
    if phases and steps not in (None, total_steps(phases)):
        raise UserError(
            f"config.steps = {steps}, but the steps of config.phases add up to {total_steps(phases)}: leave it out"
            ", and set config.phases.0.steps and so on"
        )


def total_steps(phases) -> int:
    """Returns the number of steps of all phases together."""
    return sum(phase["steps"] for phase in phases)


def at_phase(experiment, index: int):
    """Returns (the experiment with the overrides of one phase, the `Phase`).

    Args:
      experiment: the experiment with all its phases.
      index: of the phase, from 0.

    Raises:
      UserError: there is no such phase.
    """
    phases = experiment.phases
    if not phases:
        return experiment, Phase(0, 1, 0, experiment.steps)
    if not 0 <= index < len(phases):
        raise UserError(
            f"there is no phase {index + 1}: config.phases has {len(phases)}; choose another --workdir"
        )
    overrides = {k: v for k, v in phases[index].items() if k != "begin"}
    for key in MERGED:
        if key in overrides:
            overrides[key] = {**getattr(experiment, key), **overrides[key]}
    first = total_steps(phases[:index])
    phase = Phase(index, len(phases), first, overrides["steps"])
    return dataclasses.replace(experiment, **overrides), phase


def data_seed(seed: int, phase: Phase) -> int:
    """Returns the seed that shuffles a phase's examples; in the first phase it is the run's seed."""
    return (seed + phase.index * _SEED_STRIDE) % 2**32
