"""Moves a run from one phase to the next, and rehearses all transitions before training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _experiment, _plugs, _settings
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import contract, forward, sharding
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.state import State, hand_over


def resume(
    built: Built, checkpoints: Checkpoints, say: Callable[[str], None]
) -> tuple[Built, Restored | None]:
    """Restores the newest undamaged checkpoint, and builds the experiment in the checkpoint's phase.

    Args:
      built: the experiment in its first phase.
      checkpoints: of the run.
      say: prints a line.

    Returns:
      The experiment, and the checkpoint; `built` and None if there is none.

    Raises:
      UserError: the checkpoint does not fit, see `Checkpoints.restore`; or the number of devices is another, and the exchange
        of gradients has no rule for its state.
    """
    current = [built]

    def abstract_state(note):
        phase, options = note.get("phase", 0), note.get("options")
        current[0] = built
        if phase != built.phase.index:
            current[0] = _experiment.build(
                built.whole, phase, _settings.with_tuples(options)
            )
        return _with_saved_devices(current[0], checkpoints, note["step"])

    restored = checkpoints.restore(abstract_state)
    if restored is not None:
        state = _reshard_exchange(current[0], restored.state, say)
        restored = restored._replace(state=state)
    return current[0], restored


def _with_saved_devices(built: Built, checkpoints: Checkpoints, step: int) -> State:
    """Returns the shapes of a phase's state, in which the exchange has as many states as the devices of a checkpoint.

    Args:
      built: the phase.
      checkpoints: of the run.
      step: of the checkpoint.
    """
    abstract, exchange = built.abstract(), built.plugs.exchange
    if exchange is None or exchange.name not in (abstract.extra or {}):
        return abstract
    replicated = sharding.replicated(built.mesh)
    saved = checkpoints.saved_shapes(replicated, step)
    saved_extra = {} if saved is None else saved.extra or {}
    saved_states = jax.tree.leaves(saved_extra.get(exchange.name))
    states = abstract.extra[exchange.name]
    devices = saved_states[0].shape[:1] if saved_states else ()
    if devices in ((), jax.tree.leaves(states)[0].shape[:1]):
        return abstract
    states = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            (*devices, *s.shape[1:]), s.dtype, sharding=replicated
        ),
        states,
    )
    return abstract._replace(extra={**abstract.extra, exchange.name: states})


def _reshard_exchange(built: Built, state: State, say: Callable[[str], None]) -> State:
    """Returns a restored state, in which the exchange has a state for each of today's devices.

    Args:
      built: the phase.
      state: as a checkpoint holds it.
      say: prints a line if the number of devices is another.

    Raises:
      UserError: the exchange has no rule for its state, or its rule returns other shapes.
    """
    exchange, expected = built.plugs.exchange, built.abstract().extra or {}
    if exchange is None or exchange.name not in expected:
        return state
    name, expected = exchange.name, expected[exchange.name]
    before, now = (
        jax.tree.leaves(states)[0].shape[0] for states in (state.extra[name], expected)
    )
    if before == now:
        return state
    reshard = exchange.method.reshard
    if reshard is None and not _equal_rows(state.extra[name]):
        raise UserError(
            f"config.exchange: {name} keeps a state on each of {before} devices, and has no rule to continue on {now}: use"
            f" {before} devices, or give its methods.Exchange a function reshard"
        )
    reshard = reshard or _copy_first
    shapes = jax.eval_shape(lambda states: reshard(states, now), state.extra[name])
    contract.check_like(shapes, expected, f"the exchange {name} reshards to a state")
    shardings = jax.tree.map(lambda s: s.sharding, expected)
    states = jax.jit(lambda states: reshard(states, now), out_shardings=shardings)(
        state.extra[name]
    )
    say(f"exchange   {name}: the states of {before} devices are carried over to {now}")
    return state._replace(extra={**state.extra, name: states})


def _equal_rows(states) -> bool:
    """Returns whether the states of all devices are equal; they have a leading axis over the devices."""
    leaves = map(np.asarray, jax.tree.leaves(states))
    return all((leaf == leaf[:1]).all() for leaf in leaves)


def _copy_first(states, devices: int):
    """Returns copies of the first device's state for a number of devices."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x[0], (devices, *x.shape[1:])), states
    )


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
    _classes.check_same_classes(before, after, built.phase.label, of_phase=True)
    return next_built, state
