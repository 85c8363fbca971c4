"""Leads a run from one phase to the next, and rehearses that before training."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from squeeze_jax import methods, models, tree
from squeeze_jax.jobs import _classes, _experiment, _plugs, _settings
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.state import State, hand_over


def resumed(built: Built, checkpoints: Checkpoints) -> tuple[Built, Restored | None]:
    """Returns the experiment in the phase of the newest whole checkpoint, and that checkpoint or None."""
    current = [built]

    def like(note):
        phase, options = note.get("phase", 0), note.get("options")
        current[0] = built
        if phase != built.phase.index:
            current[0] = _experiment.build(
                built.whole, phase, _settings.tuples(options)
            )
        return current[0].abstract()

    restored = checkpoints.restore(like)
    return current[0], restored


def next_phase(built: Built, state: State, say: Callable) -> tuple[Built, State]:
    """Returns the experiment in its next phase, and the state that the phase begins with.

    Args:
      built: the phase that has ended.
      state: its last state.
      say: prints a line.
    """
    after, changed = _transition(built, fetched(state))
    shapes = forward.parameters(changed.params)
    fresh = after.create({"params": shapes, "batch_stats": changed.stats})
    begun, lines = hand_over(changed, fetched(fresh))
    for line in lines:
        say(f"{after.phase.label}  {line}")
    placed = jax.tree.map(lambda x: x.sharding, after.abstract())
    return after, jax.device_put(begun, placed)


def fetched(state: State) -> State:
    """Copies a state to the host, whole on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(state, tiled=True)
    return jax.device_get(state)


def rehearsed(built: Built) -> list[str]:
    """Goes through the later phases on zeros, so that what does not fit is known before the first has trained.

    Returns:
      A line for each of them.
    """
    lines = []
    while built.phase.end < built.whole.steps:
        shapes = built.abstract()
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        built, _ = _transition(built, zeros)
        size = tree.size(forward.parameters(built.abstract().params))
        begin = built.whole.phases[built.phase.index].get("begin")
        how = f", begins with {begin['name']}" if begin else ""
        lines.append(
            f"{'later':<10} {built.phase.label}: {built.phase.steps:,} steps{how}, {size:,} parameters"
        )
    return lines


def _transition(built: Built, state: State) -> tuple[Built, State]:
    """Applies the next phase's transition; returns the experiment in that phase, and the changed state as host arrays."""
    index = built.phase.index + 1
    section, options = built.whole.phases[index].get("begin"), built.options
    if section is not None:
        where = f"config.phases[{index}].begin"
        transition = methods.transition(_plugs.method(section, where), where)
        plain = methods.Plain(
            lambda options: models.make(**options), built.data.example()
        )
        options, state = transition.apply(dict(options), state, plain)
    after = _experiment.build(built.whole, index, options)
    before, now = built.data.label_names, after.data.label_names
    _classes.check_same(before, now, built.phase.label)
    return after, state
