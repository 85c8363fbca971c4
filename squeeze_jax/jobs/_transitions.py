"""Moves a run from one phase to the next, and rehearses all transitions before training."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from squeeze_jax import methods, tree
from squeeze_jax.jobs import _classes, _experiment, _plugs, _settings
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.state import State, hand_over


def resume(built: Built, checkpoints: Checkpoints) -> tuple[Built, Restored | None]:
    """Restores the newest undamaged checkpoint, and builds the experiment in the checkpoint's phase.

    Args:
      built: the experiment in its first phase.
      checkpoints: of the run.

    Returns:
      The experiment, and the checkpoint; `built` and None if there is none.
    """
    current = [built]

    def abstract_state(note):
        phase, options = note.get("phase", 0), note.get("options")
        current[0] = built
        if phase != built.phase.index:
            current[0] = _experiment.build(
                built.whole, phase, _settings.with_tuples(options)
            )
        return current[0].abstract()

    restored = checkpoints.restore(abstract_state)
    return current[0], restored


def next_phase(built: Built, state: State, say: Callable) -> tuple[Built, State]:
    """Returns the experiment in its next phase, and the state that the phase begins with.

    Args:
      built: the phase that has ended.
      state: its last state.
      say: prints a line.
    """
    next_built, changed = _apply_transition(built, to_host(state))
    shapes = forward.parameters(changed.params)
    fresh = next_built.create({"params": shapes, "batch_stats": changed.stats})
    initial, lines = hand_over(changed, to_host(fresh))
    for line in lines:
        say(f"{next_built.phase.label}  {line}")
    shardings = jax.tree.map(lambda x: x.sharding, next_built.abstract())
    return next_built, jax.device_put(initial, shardings)


def to_host(state: State) -> State:
    """Copies a state to the host; every process gets all of it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(state, tiled=True)
    return jax.device_get(state)


def rehearse(built: Built) -> list[str]:
    """Builds all later phases on a state of zeros, so that an error in them shows before the first phase trains.

    Returns:
      One line for each later phase.
    """
    lines = []
    while built.phase.end < built.whole.steps:
        shapes = built.abstract()
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        built, _ = _apply_transition(built, zeros)
        size = tree.size(forward.parameters(built.abstract().params))
        section = built.whole.phases[built.phase.index].get("begin")
        transition = f", begins with {section['name']}" if section else ""
        lines.append(
            f"{'later':<10} {built.phase.label}: {built.phase.steps:,} steps{transition}, {size:,} parameters"
        )
    return lines


def _apply_transition(built: Built, state: State) -> tuple[Built, State]:
    """Applies the next phase's transition, which may change the network.

    Args:
      built: the phase that has ended.
      state: its last state, as host arrays.

    Returns:
      The experiment in the next phase, and the changed state as host arrays.
    """
    index = built.phase.index + 1
    section, options = built.whole.phases[index].get("begin"), built.options
    if section is not None:
        where = f"config.phases[{index}].begin"
        transition = methods.transition(_plugs.make_method(section, where), where)
        plain = _plugs.plain(built.data.example())
        options, state = transition.apply(dict(options), state, plain)
    next_built = _experiment.build(built.whole, index, options)
    before, after = built.data.label_names, next_built.data.label_names
    _classes.check_same_classes(before, after, built.phase.label)
    return next_built, state
