"""The training state: parameters, statistics and optimizer state; creates it and hands it from phase to phase."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from squeeze_jax import tree
from squeeze_jax.errors import UserError, shown
from squeeze_jax.methods import METHODS
from squeeze_jax.nn.norm import SHARES, shares
from squeeze_jax.train import forward
from squeeze_jax.weights import foreign


class State(NamedTuple):
    """Everything that a training step reads and changes. A checkpoint adds the position in the data.

    Attributes:
      step: int32 [], number of updates so far, over all phases.
      params: float32 master weights, as `{module: {name: array}}`; the parameters that methods own stand under "methods",
        by name.
      stats: float32 running statistics of the normalisation layers; may be empty.
      opt: state of the optax chain.
      ema: `{"params", "stats"}` averaged over the steps, or None.
      extra: state that methods own, by name, or None. The state of an exchange has a leading axis over the devices. The
        entry "batch_shares" holds the shares of batches in `stats`, see `nn.norm.BatchNorm`.
      carry: hidden states that a recurrent network carries from batch to batch, [batch, ...], or None.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt: Any
    ema: Any = None
    extra: Any = None
    carry: Any = None

    def variables(self, *, averaged: bool = True) -> dict[str, Any]:
        """Returns the variables for `forward.run`.

        Args:
          averaged: whether to take the averaged weights and statistics, if the state has them.
        """
        source = self.ema if averaged and self.ema else self._asdict()
        variables = {"params": source["params"], "batch_stats": source["stats"]}
        extra = {"extra": self.extra} if self.extra else {}
        return variables | extra | {"step": self.step}

    def plain(self, *, averaged: bool = True) -> dict[str, Any]:
        """Returns {"params", "batch_stats"} for `model.apply`, for a network that no method changes.

        Args:
          averaged: see `variables`.
        """
        variables = self.variables(averaged=averaged)
        params = {k: v for k, v in variables["params"].items() if k != METHODS}
        return {"params": params, "batch_stats": variables["batch_stats"]}


def _check_given(given: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Raises a UserError if pretrained values are none of a network's variables, or have another shape.

    Args:
      given: see `create`.
      variables: of the network.
    """
    for collection in given:
        if collection not in ("params", "batch_stats"):
            raise UserError(
                f"given has {shown(collection)}: it may have params and batch_stats, such as {{'params': …}}"
            )
    expected = tree.flatten({k: variables.get(k, {}) for k in given})
    values = tree.flatten(dict(given))
    values = {k: v for k, v in values.items() if not k.startswith(f"params/{METHODS}/")}
    lines = tree.differences({k: expected[k] for k in values if k in expected}, values)
    if lines:
        raise foreign.misfit(
            "given",
            lines,
            "name and shape the values as the network's own variables are",
        )


def _check_own(name: str, field: str, value: Any) -> None:
    """Raises a UserError unless a method's own parameters are nested dicts of arrays, whose keys become their names.

    Args:
      name: the method.
      field: the field of its value that made them.
      value: what that returned.
    """
    if isinstance(value, Mapping):
        wrong = next((k for k in value if not isinstance(k, str)), None)
        if wrong is not None:
            raise UserError(
                f"the method {name} has the own parameter {shown(wrong)}: {field} should return a dict with names as keys"
            )
        for key, part in value.items():
            if not hasattr(part, "shape") and not isinstance(part, int | float):
                _check_own(f"{name}/{key}", field, part)
        return
    raise UserError(
        f"the method {name} has own parameters of type {type(value).__name__}: {field} should return a dict of arrays, such as"
        " {'weight': …}"
    )


class Owner(NamedTuple):
    """The functions that create a method's own parameters and state; see `methods.py`.

    Attributes:
      init: (key, params) → the method's parameters; None for no parameters.
      state: params → the method's state; None for no state.
      devices: number of copies of the state, one per device; 0 for one state that all devices share.
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
    """Creates an initial state. The function is pure, so that `jax.jit` and `jax.eval_shape` accept it.

    Args:
      model: a Linen module, inputs → (logits, endpoints).
      tx: the optax chain.
      example: the shapes of the inputs, a pytree of `jax.ShapeDtypeStruct`s.
      key: random key of the initial weights.
      given: pretrained values that replace the initial ones, {"params", "batch_stats"}. Either key may be absent or
        have only some of the leaves; "params" may contain "methods".
      owners: the methods that own parameters or state, by name.
      ema: whether the state has averaged weights.
      carry_rows: number of examples in a batch, for the carry of a recurrent network; 0 for no carry.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example)
    variables = model.init(key, zeros, **forward.mode_argument(model, False))
    pretrained = given or {}
    _check_given(pretrained, variables)
    known_stats = pretrained.get("batch_stats", {})
    params = _replace_leaves(variables["params"], pretrained.get("params", {}))
    stats = _replace_leaves(variables.get("batch_stats", {}), known_stats)
    owned, extra = {}, {}
    for name, owner in (owners or {}).items():
        seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
        if owner.init is not None:
            owned[name] = owner.init(jax.random.fold_in(key, seed), params)
            _check_own(name, "init", owned[name])
        state = owner.state(params) if owner.state is not None else None
        if jax.tree.leaves(state):
            extra[name] = _copy_per_device(state, owner.devices)
    owned = {name: value for name, value in owned.items() if jax.tree.leaves(value)}
    if batch_shares := shares(stats, known_stats):
        extra[SHARES] = batch_shares
    if owned:
        known = pretrained.get("params", {}).get(METHODS, {})
        params[METHODS] = _replace_leaves(owned, known)
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


def _copy_per_device(state, devices: int):
    """Adds a leading axis of copies, one per device, to the arrays of a state; with `devices` 0 returns it unchanged."""
    if not devices:
        return state
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x), (devices, *jnp.shape(x))), state
    )


def _replace_leaves(whole: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts with the leaves of `whole`, replaced by the leaves of `new` where it has the same path."""
    return {
        name: _replace_leaves(value, new.get(name, {}))
        if isinstance(value, Mapping)
        else new.get(name, value)
        for name, value in whole.items()
    }


def hand_over(before: State, fresh: State) -> tuple[State, list[str]]:
    """Returns the state with which a phase begins, from the last state of the phase before.

    Weights, running statistics and averages continue. Parameters and state of a method continue if the next phase has them
    under the same name and with the same shapes. The optimizer's state continues if its structure and shapes stay the
    same, but learning-rate schedules begin anew.

    Args:
      before: the last state of the phase before, on the host, already changed by the transition.
      fresh: a newly created state of the next phase.

    Returns:
      The state, with the shapes of `fresh`; and one line of text for each part that begins anew.
    """
    lines = []

    def same_shapes(a, b):
        shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (a, b)]
        same_structure = jax.tree.structure(a) == jax.tree.structure(b)
        return same_structure and shapes[0] == shapes[1]

    def choose(name, old, new):
        if new is None or not jax.tree.leaves(new):
            return new
        if same_shapes(old, new):
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
    opt = choose("optimizer's state", before.opt, fresh.opt)
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
        name: choose(f"state of {name}", old.get(name), value)
        for name, value in (fresh.extra or {}).items()
        if name != SHARES
    }
    if batch_shares := (fresh.extra or {}).get(SHARES):
        extra[SHARES] = tree.overlaid(batch_shares, old.get(SHARES, {}))
    carry = choose("carry", before.carry, fresh.carry)
    return (
        State(before.step, params, stats, opt, ema, extra or None, carry),
        lines,
    )
