"""The network as it is run: reparametrize → cast → intercept → apply.

Training, evaluation, teachers, export and folders all call `run`, so a masked or quantized network is the same network
everywhere. Variables are a dict:

    params        the network's parameters, and under "methods" those that methods own
    batch_stats   running statistics of the normalisations
    extra         the methods' own state, by name, and in training the shares of batches in batch_stats under
                  "batch_shares", see `BatchNorm`; may be absent
    step          updates done so far; may be absent (a network that no method depends on)
"""

import contextlib
import functools
import inspect
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Forward, Own, Tap
from squeeze_jax.nn.intercept import intercepting
from squeeze_jax.nn.layer_norm import LayerNorm, NoNorm
from squeeze_jax.nn.norm import SHARES, BatchNorm

# Layers whose parameters stay float32 in any dtype of the computation.
NORMALISATIONS = (BatchNorm, LayerNorm, NoNorm)


class Network(NamedTuple):
    """A Linen module and everything that changes how it is run.

    Attributes:
      model: inputs → (logits, endpoints).
      forwards: methods of the plug point `forward` by name, in the order they apply.
      dtype: of the computation.
      first: the step at which the phase began; methods count their steps from it.
      float32: paths of the layers whose parameters are not cast.
    """

    model: nn.Module
    forwards: Mapping[str, Forward] = {}
    dtype: str = "float32"
    first: int = 0
    float32: frozenset[str] = frozenset()


def make(
    model: nn.Module,
    example: Any,
    *,
    forwards: Mapping[str, Forward] | None = None,
    dtype: str = "float32",
    first: int = 0,
) -> Network:
    """Builds the network as it is run.

    Args:
      model: a Linen module.
      example: shapes of its inputs; where a cast needs to know the module's normalisations.
      forwards, dtype, first: see `Network`.
    """
    kept = normalisations(model, example) if dtype != "float32" else frozenset()
    return Network(model, dict(forwards or {}), dtype, first, kept)


def run(
    network: Network,
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
    **options,
) -> tuple[tuple[Any, Mapping[str, Any]], dict[str, Any]]:
    """Runs the network on a batch.

    A module may return its logits alone, and its call may have no argument `train`, see `mode`.

    Args:
      network: of `make`.
      variables: see the top of this file.
      inputs: what the module is called with; floating-point arrays are cast to the network's dtype.
      train: whether normalisations use the batch's statistics, dropout is active and methods may change their state.
      key: for the random streams "dropout" and "sample", and for methods; needed in training.
      **options: more keyword arguments of the module's call, such as carry.

    Returns:
      (logits, endpoints), logits in float32; and the changed {"batch_stats", "extra"}, which stay as they are outside of
      training.
    """
    owns = _owns(network, variables, train, key)
    params = _reparametrized(network, variables, owns)
    params = cast(params, network.dtype, network.float32)
    stats = variables.get("batch_stats", {})
    extra = dict(variables.get("extra") or {})
    rngs = {}
    if key is not None:
        rngs = {"dropout": key, "sample": jax.random.fold_in(key, 1)}
    counted = {SHARES: extra[SHARES]} if train and SHARES in extra else {}
    changes = {name: {} for name, f in network.forwards.items() if f.intercept}
    replace = functools.partial(_replaced, network.forwards, owns, changes)
    with intercepting(replace) if changes else contextlib.nullcontext():
        result, changed = network.model.apply(
            {"params": params, "batch_stats": stats, **counted},
            floats(inputs, network.dtype),
            **mode(network.model, train),
            mutable=["batch_stats", *counted] if train else [],
            rngs=rngs,
            **options,
        )
    logits, endpoints = parted(result)
    if train:
        stats = changed.get("batch_stats", stats)
        extra |= {name: changed[name] for name in counted}
        extra |= {k: extra[k] | change for k, change in changes.items() if change}
    after = {"batch_stats": stats, "extra": extra}
    return (floats(logits, jnp.float32), endpoints), after


def parted(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns what a module returns as (logits, endpoints).

    Raises:
      UserError: a tuple of something else.
    """
    if not isinstance(result, tuple):
        return result, {}
    if len(result) == 2 and isinstance(result[1], Mapping):
        return result
    raise UserError(
        f"the network returns a tuple of {len(result)}: return logits, or (logits, a dict of endpoints)"
    )


def mode(model: nn.Module, train: bool) -> dict[str, bool]:
    """Returns the argument that tells a module's call whether it is in training: the one of these names that it has.

    `train`, `training` and `is_training`; `deterministic` and `use_running_average`, which say the opposite. None of them
    is for a module that is the same in both.
    """
    parameters = inspect.signature(type(model).__call__).parameters
    for name in ("train", "training", "is_training"):
        if name in parameters:
            return {name: train}
    for name in ("deterministic", "use_running_average"):
        if name in parameters:
            return {name: not train}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {"train": train}
    return {}


@contextlib.contextmanager
def intercepted(network: Network, variables: Mapping[str, Any]) -> Iterator[None]:
    """Passes what the network's module computes within this context through the interceptions, outside of training.

    For tools that trace a module themselves, such as the counts of costs.

    Args:
      network: of `make`.
      variables: see the top of this file.
    """
    owns = _owns(network, variables, False, None)
    changes = {name: {} for name, f in network.forwards.items() if f.intercept}
    with intercepting(functools.partial(_replaced, network.forwards, owns, changes)):
        yield


def folded(
    network: Network, variables: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
    """Applies the reparametrizations; returns a network without them, and its variables.

    Where no method intercepts, the result is a plain network: {"params", "batch_stats"} of the module alone.
    """
    owns = _owns(network, variables, False, None)
    params = _reparametrized(network, variables, owns)
    own = variables["params"].get(METHODS)
    rest = {
        name: method._replace(reparametrize=None)
        for name, method in network.forwards.items()
        if method.intercept is not None
    }
    plain = {"params": params, "batch_stats": variables.get("batch_stats", {})}
    if rest:
        kept = {k: own[k] for k in rest if k in (own or {})}
        plain["params"] = params | ({METHODS: kept} if kept else {})
        plain |= {k: variables[k] for k in ("extra", "step") if k in variables}
    return network._replace(forwards=rest), plain


def parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's parameters, without those that methods own."""
    return {name: value for name, value in params.items() if name != METHODS}


def taps(
    model: nn.Module, example: Any, accepts: Sequence[Forward]
) -> list[tuple[Tap, ...]]:
    """Returns for each method the taps of a network that it accepts, in the order of use.

    Args:
      model: a Linen module.
      example: shapes of its inputs.
      accepts: the methods.
    """
    seen: dict[str, Tap] = {}

    def record(tap, x):
        seen.setdefault(tap.name, tap)
        return x

    with intercepting(record):
        _initialised(model, example)
    return [
        tuple(t for t in seen.values() if f.intercept is not None and f.taps(t.name))
        for f in accepts
    ]


def normalisations(model: nn.Module, example: Any) -> frozenset[str]:
    """Returns the paths of a network's normalisation layers."""
    paths = set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, NORMALISATIONS):
            paths.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _initialised(model, example)
    return frozenset(paths)


def _initialised(model, example):
    """Traces the initialisation anew, whatever JAX has cached of it."""
    key = jax.random.key(0)
    rngs = dict.fromkeys(("params", "dropout", "sample"), key)
    return jax.eval_shape(lambda x: model.init(rngs, x, **mode(model, False)), example)


def own(
    name: str,
    variables: Mapping[str, Any],
    *,
    first: int = 0,
    train: bool = True,
    key: jax.Array | None = None,
) -> Own:
    """Returns a method's `Own` from variables as in `run`."""
    params = variables["params"].get(METHODS, {}).get(name, {})
    step = variables.get("step")
    return Own(
        params=params,
        state=(variables.get("extra") or {}).get(name),
        key=None if key is None else jax.random.fold_in(key, _number(name)),
        step=jnp.int32(0) if step is None else step - first,
        train=train,
    )


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _owns(network, variables, train, key):
    return {
        name: own(name, variables, first=network.first, train=train, key=key)
        for name in network.forwards
    }


def _reparametrized(network, variables, owns):
    params = parameters(variables["params"])
    for name, method in network.forwards.items():
        if method.reparametrize is not None:
            params = method.reparametrize(params, owns[name])
    return params


def _replaced(forwards, owns, changes, tap, x):
    """Returns a tap's array after all interceptions, and notes the changes of their state."""
    for name in changes:
        if forwards[name].taps(tap.name):
            state = owns[name].state
            now = owns[name]._replace(state=state and state | changes[name])
            x, change = forwards[name].intercept(tap, x, now)
            changes[name] |= change
    return x


def floats(values, dtype):
    """Casts the floating-point arrays of a pytree; leaves others as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        values,
    )


def cast(params, dtype: str, float32: frozenset[str] = frozenset()):
    """Casts weights to the dtype of the computation, except those of the layers in `float32`."""
    if dtype == "float32":
        return params
    return tree.map_named(
        lambda name, w: w if name.rpartition("/")[0] in float32 else w.astype(dtype),
        params,
    )
