"""A training run's complete state at one moment."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from squeeze_jax import tree
from squeeze_jax.methods import METHODS
from squeeze_jax.nn.norm import SHARES, shares
from squeeze_jax.train import forward


class State(NamedTuple):
    """Everything that a step reads and changes; only the position in the data is kept beside it.

    Attributes:
      step: int32 [], updates done so far, over all phases.
      params: float32 master weights, as `{module: {name: array}}`; under "methods" those that methods own, by name.
      stats: running statistics of the normalisations, in float32; may be empty.
      opt: the state of the optax chain.
      ema: `{"params", "stats"}` averaged over the steps, or None.
      extra: state that methods own, by name, or None; that of the exchange has a leading axis over the devices. Under
        "batch_shares" the shares of batches in `stats`, see `nn.norm.BatchNorm`.
      carry: what a recurrent network carries from batch to batch, [batch, ...], or None.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt: Any
    ema: Any = None
    extra: Any = None
    carry: Any = None

    def variables(self, *, averaged: bool = True) -> dict[str, Any]:
        """Returns the variables for `forward.run`, to evaluate and export; averaged weights if there are any."""
        source = self.ema if averaged and self.ema else self._asdict()
        variables = {"params": source["params"], "batch_stats": source["stats"]}
        extra = {"extra": self.extra} if self.extra else {}
        return variables | extra | {"step": self.step}

    def plain(self, *, averaged: bool = True) -> dict[str, Any]:
        """Returns {"params", "batch_stats"} for `model.apply`, for a network that no method changes."""
        whole = self.variables(averaged=averaged)
        params = {k: v for k, v in whole["params"].items() if k != METHODS}
        return {"params": params, "batch_stats": whole["batch_stats"]}


class Owner(NamedTuple):
    """What a method owns beside the network; see `methods.py`.

    Attributes:
      init: (key, params) → its parameters, or None.
      state: params → its state, or None.
      devices: how many copies of the state there are, one a device; 0 for one state that all share.
    """

    init: Callable | None = None
    state: Callable | None = None
    devices: int = 0


def create(
    model: nn.Module,
    tx: optax.GradientTransformation,
    example: Any,
    key: jax.Array,
    *,
    given: Mapping[str, Any] | None = None,
    owners: Mapping[str, Owner] | None = None,
    ema: bool = False,
    carry_rows: int = 0,
) -> State:
    """Initialises a state; pure, so that it can be jitted and `eval_shape`d.

    Args:
      model: maps what `example` is of to (logits, endpoints).
      tx: the optimizer's chain.
      example: pytree of `jax.ShapeDtypeStruct`s, what the network is called with.
      key: the seed of the initial weights.
      given: {"params", "batch_stats"}, either may be left out or have only some of the leaves: what to begin with
        instead; "params" may have "methods" as well.
      owners: what methods own, by name.
      ema: whether to carry averaged weights.
      carry_rows: examples of a batch, for a recurrent network's carry; 0 for none.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example)
    variables = model.init(key, zeros, **forward.mode(model, False))
    begin = given or {}
    params = _merged(variables["params"], begin.get("params", {}))
    stats = _merged(variables.get("batch_stats", {}), begin.get("batch_stats", {}))
    owned, extra = {}, {}
    for name, owner in (owners or {}).items():
        fold = zlib.crc32(name.encode()) & 0x7FFFFFFF
        if owner.init is not None:
            owned[name] = owner.init(jax.random.fold_in(key, fold), params)
        state = owner.state(params) if owner.state is not None else None
        if jax.tree.leaves(state):
            extra[name] = _copies(state, owner.devices)
    owned = {name: value for name, value in owned.items() if jax.tree.leaves(value)}
    if counted := shares(stats, begin.get("batch_stats")):
        extra[SHARES] = counted
    if owned:
        params[METHODS] = _merged(owned, begin.get("params", {}).get(METHODS, {}))
    average = jax.tree.map(jnp.copy, {"params": params, "stats": stats})
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        opt=tx.init(params),
        ema=average if ema else None,
        extra=extra or None,
        carry=model.initial_carry(carry_rows) if carry_rows else None,
    )


def _copies(state, devices: int):
    if not devices:
        return state
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x), (devices, *jnp.shape(x))), state
    )


def _merged(whole: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the leaves of a tree by those that are given."""
    return {
        name: _merged(value, given.get(name, {}))
        if isinstance(value, Mapping)
        else given.get(name, value)
        for name, value in whole.items()
    }


def handed_over(before: State, fresh: State) -> tuple[State, list[str]]:
    """Returns the state that a phase begins with, from the state that the phase before ended with.

    Weights, statistics and averages go on; what methods own goes on under the same name and of the same shapes. The
    optimizer's state goes on if it is of the same kind, but learning-rate schedules begin anew.

    Args:
      before: the last state, already changed by the transition; host arrays.
      fresh: a new state of the next phase's shapes.

    Returns:
      The state, with the shapes of `fresh`; and a line for what begins anew.
    """
    lines = []

    def same(a, b):
        shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (a, b)]
        alike = jax.tree.structure(a) == jax.tree.structure(b)
        return alike and shapes[0] == shapes[1]

    def continued(name, old, new):
        if new is None or not jax.tree.leaves(new):
            return new
        if same(old, new):
            return old
        if old is not None and jax.tree.leaves(old):
            lines.append(f"the {name} begins anew: its shapes are others")
        return new

    params = tree.overlaid(fresh.params, before.params)
    owned = tree.flatten(before.params.get(METHODS, {}))
    for name, value in tree.flatten(fresh.params.get(METHODS, {})).items():
        if name in owned and owned[name].shape != value.shape:
            lines.append(
                f"the parameter {name} of a method begins anew: its shape is another"
            )
    stats = tree.overlaid(fresh.stats, before.stats)
    ema = None
    if fresh.ema is not None:
        source = before.ema or {"params": before.params, "stats": before.stats}
        ema = tree.overlaid({"params": params, "stats": stats}, source)
    opt = continued("optimizer's state", before.opt, fresh.opt)
    opt = jax.tree.map(
        lambda s: (
            s._replace(count=0 * s.count)
            if isinstance(s, optax.ScaleByScheduleState)
            else s
        ),
        opt,
        is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState),
    )
    old = before.extra or {}
    extra = {
        name: continued(f"state of {name}", old.get(name), value)
        for name, value in (fresh.extra or {}).items()
        if name != SHARES
    }
    if counted := (fresh.extra or {}).get(SHARES):
        extra[SHARES] = tree.overlaid(counted, old.get(SHARES, {}))
    carry = continued("carry", before.carry, fresh.carry)
    return (
        State(before.step, params, stats, opt, ema, extra or None, carry),
        lines,
    )
