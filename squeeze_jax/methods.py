"""The five plug points of a training step: the values that methods are.

A method file has one function `make(**hyperparameters)`, which returns one of these values. `run.py` finds the file by
the name in the config (`{"name": "prune.magnitude", ...}`) or by a path (`{"name": "./my_method.py", ...}`).

    plug point   value                                  a plain function does too
    update       Update                                 an `optax.GradientTransformation`
    forward      Forward                                params → params
    objective    Objective                              (logits, endpoints, batch, params) → (scalar, metrics)
    gradients    Gradients
    exchange     Exchange                               (key, grads, axis_names) → grads

A method may own parameters, which are trained with the network and stand in `params["methods"][name]`, and state, which
stands in `State.extra[name]` (an update's state is that of its optax transform, in `State.opt`). The step hands both to
the method as an `Own`, together with a random key and the number of the step.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from squeeze_jax import tree
from squeeze_jax.errors import UserError

METHODS = "methods"  # the key in `params` of the parameters that methods own


class Own(NamedTuple):
    """A method's parameters, state, random key and step number, handed over at each call.

    Attributes:
      params: its own parameters; {} if it has none.
      state: its own state; None if it has none.
      key: a random key, different at every step and for every method; None outside of training.
      step: int32 [], the updates done so far in this phase.
      train: whether the call belongs to a training step.
    """

    params: Any
    state: Any
    key: jax.Array | None
    step: jax.Array
    train: bool


class Tap(NamedTuple):
    """A place in a network where an array can be replaced; see `nn/intercept.py`.

    Attributes:
      name: layer and role, such as "fire2/expand3x3/inputs".
      shape: of the array, batch axis included.
      dtype: of the array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any


class Update(NamedTuple):
    """A gradient transform of the ordered list `config.update`, which contains the optimizer.

    Transforms before the optimizer see gradients, those after it see updates. `tx.update` gets the extra arguments
    `grads` (the raw gradients), `key` and `step`.

    Attributes:
      tx: the optax transform; its own state stands in `State.opt`.
      project: (params, state of tx) → params; applied to the weights after each update and to the averaged weights, so
        that both are weights of the network as it is run (masked weights are zero in both). None if all weights are.
      metrics: (params, state of tx) → {name: scalar} of the weights after an update, for the training log.
      until: the step of the phase at which its schedule has taken full effect; a run that ends before it says so.
    """

    tx: optax.GradientTransformation
    project: Callable[[Any, Any], Any] | None = None
    metrics: Callable[[Any, Any], Mapping[str, jax.Array]] | None = None
    until: int = 0


class Forward(NamedTuple):
    """A change of the network as it is run: in training, evaluation, export and wherever else it serves.

    Attributes:
      reparametrize: (params, own) → params of the same structure: the weights that the network runs with.
      intercept: (tap, array, own) → (array, changes of own.state); called at each tap whose name `taps` accepts.
      taps: name of a tap → whether `intercept` wants its array.
      init: (key, params, taps) → own parameters; `params` are the network's and `taps` the accepted ones.
      state: (params, taps) → own state, nested dicts of arrays; None for no state.
      integer: whether integer files do what `intercept` does by themselves, so that they are made without it.
      until: the step of the phase at which its schedule has taken full effect; a run that ends before it says so.
    """

    reparametrize: Callable[[Any, Own], Any] | None = None
    intercept: Callable[[Tap, jax.Array, Own], tuple[jax.Array, Mapping]] | None = None
    taps: Callable[[str], bool] = lambda name: True
    init: Callable[[jax.Array, Any, tuple[Tap, ...]], Any] | None = None
    state: Callable[[Any, tuple[Tap, ...]], Any] | None = None
    integer: bool = False
    until: int = 0


class Objective(NamedTuple):
    """A term of the loss.

    Attributes:
      loss: (logits, endpoints, batch, params, own) → (scalar, metrics), or (scalar, metrics, state) for a method with
        state. `params` are the network's master weights, without those that methods own.
      init: (key, params) → own parameters.
      state: params → own state; None for no state.
      wants: outputs of teachers that the loss reads from batch["teacher"], by name.
    """

    loss: Callable[..., tuple]
    init: Callable[[jax.Array, Any], Any] | None = None
    state: Callable[[Any], Any] | None = None
    wants: tuple[str, ...] = ()


class Passes(NamedTuple):
    """The functions that a `Gradients` method computes with; all are pure.

    `stats` is an opaque dict of everything that a forward pass changes: running statistics, the methods' own state, a
    recurrent network's carry. Each pass takes the stats that the one before it returned, unless both read the batch as one
    pass, as the two of SAM do: then both take the step's own, and those of one of them are returned.

    Attributes:
      outputs: (params, stats, batch, key, **options) → (logits, endpoints, stats): one forward pass in training mode;
        options are keyword arguments of the network's call, such as width=0.5.
      objective: (logits, endpoints, batch, params, key, stats) → (scalar, metrics, stats) of the config's objective.
      loss: (params, stats, batch, key, **options) → (scalar, (stats, metrics)): both in one; metrics have "loss".
      run: (model, params, stats, inputs, key) → (outputs, endpoints, stats): a forward pass in training mode of another
        module, such as a part of the network, with the methods of the plug point `forward`.
      inputs: batch → the inputs of the network.
      named: whether a forward pass depends on the names of the layers, because methods or the dtype treat them
        differently.
    """

    outputs: Callable[..., tuple]
    objective: Callable[..., tuple]
    loss: Callable[..., tuple]
    run: Callable[..., tuple] | None = None
    inputs: Callable[[Any], Any] | None = None
    named: bool = True


class Plain(NamedTuple):
    """How a method makes networks.

    Attributes:
      make: options of `models.make` → Linen module.
      example: shapes of its inputs.
      elastic: options of `models.make` → {option: choices of each position}, see `models.elastic`.
    """

    make: Callable[[Mapping[str, Any]], Any]
    example: Any
    elastic: Callable[[Mapping[str, Any]], Mapping[str, tuple]] | None = None


class Gradients(NamedTuple):
    """How gradients are computed; without one they are `jax.value_and_grad` of one forward pass.

    Attributes:
      compute: (passes, params, stats, batch, own) → (grads, stats, metrics), metrics with "loss"; `params` have the
        methods' own parameters in `params["methods"]`, and so have the gradients. A method with state returns the new
        state as a fourth value.
      init: (key, params) → own parameters.
      state: params → own state; None for no state.
      options: keyword arguments that it calls the network with, such as ("width",).
      fused: whether `compute` may be traced as a part of one compiled step. If not, it runs as it is between the
        compiled parts of the step, and compiles what it likes itself.
      bind: (options, Plain) → Gradients: the method for the network that `models.make` builds from the options; None if the
        method does not depend on the network.
      softmax: whether networks learn from another network's softmax over the classes. A run on data whose examples may have
        several classes each is then refused.
    """

    compute: Callable[..., tuple]
    init: Callable[[jax.Array, Any], Any] | None = None
    state: Callable[[Any], Any] | None = None
    options: tuple[str, ...] = ()
    fused: bool = True
    bind: Callable[[Mapping[str, Any], Plain], Any] | None = None
    softmax: bool = False


class Exchange(NamedTuple):
    """How devices exchange gradients, inside `jax.shard_map`.

    Attributes:
      exchange: (grads, axis_names, own) → (grads, state): from a device's own gradients to their mean over the devices,
        which all devices share, such as `jax.lax.pmean(grads, axis_names)`. `own.key` differs from device to device.
      state: params → state of one device, such as the error that was not sent; None for no state. It is kept for each
        device: `State.extra[name]` has one more leading axis, over the devices.
      reshard: (states with the leading axis, number of devices) → states of so many devices, for a run that continues on
        another number of devices. None copies a state that is equal on all devices; another ends the run with an error.
    """

    exchange: Callable[[Any, Any, Own], tuple[Any, Any]]
    state: Callable[[Any], Any] | None = None
    reshard: Callable[[Any, int], Any] | None = None


class Transition(NamedTuple):
    """A change of network and training state between two phases of a run.

    Attributes:
      apply: (options, state, Plain) → (options, state): the options of `models.make` and the training state that the next
        phase begins with; pure, on host arrays.
    """

    apply: Callable[[dict[str, Any], Any, Plain], tuple[dict[str, Any], Any]]


def take(state: Any, indices: Mapping[str, Mapping[int, Any]]) -> Any:
    """Selects channels of a training state: a parameter's, and those of everything that belongs to it.

    Weights, running statistics, averages and the optimizer's state are indexed in the same way.

    Args:
      state: the training state, on the host.
      indices: {"params/conv1/kernel": {axis: indices}} of parameters, and of statistics under "batch_stats/".
    """
    parameters = tree.flatten({k: v for k, v in state.params.items() if k != METHODS})
    statistics = tree.flatten(state.stats)

    def leaf(name, array):
        for collection, arrays in ("params", parameters), ("batch_stats", statistics):
            owner = tree.owner(name, np.shape(array), arrays)
            if owner is not None:
                for axis, chosen in indices.get(f"{collection}/{owner}", {}).items():
                    array = np.take(np.asarray(array), chosen, axis)
                return array
        return array

    parts = {k: getattr(state, k) for k in ("params", "stats", "opt", "ema", "extra")}
    return state._replace(**tree.map_named(leaf, parts))


def transition(value: Any, where: str = "begin") -> Transition:
    """Returns a transition between phases; a UserError names anything else."""
    if isinstance(value, Transition):
        return value
    raise UserError(
        f"{where} makes no transition between phases but {_kind(value)}; it belongs to another key"
    )


def update(value: Any, where: str = "update") -> Update:
    """Returns a method of the plug point update, also from an optax transform; a UserError names anything else."""
    if isinstance(value, Update):
        return value
    if isinstance(value, optax.GradientTransformation):
        return Update(value)
    raise UserError(
        f"{where} makes no gradient transform but {_kind(value)}; it belongs to another key"
    )


def forward(value: Any, where: str = "forward") -> Forward:
    """Returns a method of the plug point forward, also from a function params → params."""
    if isinstance(value, Forward):
        return value
    if _takes(value, 1):
        return Forward(reparametrize=lambda params, own: value(params))
    raise UserError(
        f"{where} makes no change of the forward pass but {_kind(value)}; it belongs to another key"
    )


def objective(value: Any, where: str = "objective") -> Objective:
    """Returns a method of the plug point objective, also from a loss (logits, endpoints, batch[, params])."""
    if isinstance(value, Objective):
        return value
    if _takes(value, 4):
        return Objective(lambda *five: value(*five[:4]))
    if _takes(value, 3):
        return Objective(lambda *five: value(*five[:3]))
    raise UserError(
        f"{where} makes no loss but {_kind(value)}; it belongs to another key"
    )


def gradients(value: Any, where: str = "gradients") -> Gradients:
    """Returns a method of the plug point gradients."""
    if isinstance(value, Gradients):
        return value
    raise UserError(
        f"{where} makes no methods.Gradients but {_kind(value)}; it belongs to another key"
    )


def exchange(value: Any, where: str = "exchange") -> Exchange:
    """Returns a method of the plug point exchange, also from a function (key, grads, axis_names) → grads."""
    if isinstance(value, Exchange):
        return value
    if _takes(value, 3):
        return Exchange(
            lambda grads, axis_names, own: (value(own.key, grads, axis_names), None)
        )
    raise UserError(
        f"{where} makes no exchange of gradients but {_kind(value)}; it belongs to another key"
    )


def _takes(value: Any, count: int) -> bool:
    """Returns whether a value is a function that takes so many positional arguments; a NamedTuple is none."""
    if not callable(value) or isinstance(value, tuple):
        return False
    try:
        inspect.signature(value).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _kind(value: Any) -> str:
    name = type(value).__name__
    if not callable(value) or isinstance(value, tuple):
        return f"a {name}"
    return f"a function{inspect.signature(value)}"
