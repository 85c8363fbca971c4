"""Runs a network in four steps: reparametrize → cast → intercept → apply.

Training, evaluation, teachers, export and folders of `transformers` all call `run`, so that a masked or quantized network
is the same network everywhere. The variables of a network are a dict:

    params        the network's parameters, and under "methods" the parameters that methods own
    batch_stats   running statistics of the normalisation layers
    extra         the methods' own state, by name; in training also the shares of batches in batch_stats, under
                  "batch_shares", see `BatchNorm`. May be absent
    step          number of updates so far; may be absent if no method depends on it
"""

import contextlib
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.errors import UserError, shortened, shown
from squeeze_jax.methods import METHODS, Forward, Own, Tap
from squeeze_jax.nn.intercept import intercepting
from squeeze_jax.nn.layer_norm import LayerNorm, NoNorm
from squeeze_jax.nn.mode import mode_argument
from squeeze_jax.nn.norm import SHARES, BatchNorm

# The parameters of these layers stay float32, whatever the dtype of the computation is.
NORMALISATIONS = (BatchNorm, LayerNorm, NoNorm)


class Network(NamedTuple):
    """A Linen module and everything that changes how it runs.

    Attributes:
      model: the module: inputs → (logits, endpoints).
      forwards: methods of the plug point `forward` by name, in the order in which they apply.
      dtype: dtype of the computation.
      first: the step at which the phase began; methods count their steps from there.
      float32: paths of the layers whose parameters are not cast to `dtype`.
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
    """Builds a `Network`.

    Args:
      model: a Linen module.
      example: shapes of its inputs. A dtype other than float32 needs them, to find the normalisation layers.
      forwards, dtype, first: see `Network`.

    Raises:
      UserError: the model is no module, or the dtype no floating-point one.
    """
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise UserError(
            f"dtype = {shown(dtype)} should be float32, bfloat16 or float16: the dtype of the computation"
        )
    dtype = str(jnp.dtype(dtype))
    model = as_network(model).model
    float32 = normalisation_paths(model, example) if dtype != "float32" else ()
    return Network(model, dict(forwards or {}), dtype, first, frozenset(float32))


def run(
    network: Network | nn.Module,
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    train: bool = False,
    key: jax.Array | None = None,
    **options,
) -> tuple[tuple[Any, Mapping[str, Any]], dict[str, Any]]:
    """Runs the network on a batch.

    The module may return its logits alone, without endpoints. Its call may lack an argument `train`, see `mode_argument`.

    Args:
      network: the network that `make` built, or a Linen module.
      variables: see the top of this file.
      inputs: the inputs of the module; floating-point arrays are cast to the network's dtype.
      train: whether normalisations use the batch's statistics, dropout is active and methods may change their state.
      key: random key for the streams "dropout" and "sample", and for methods; training needs it.
      **options: further keyword arguments of the module's call, such as `carry`.

    Returns:
      ((logits, endpoints), changed). Logits are float32. `changed` holds the new "batch_stats" and "extra", which only
      training changes.

    Raises:
      UserError: the network is no module, or the variables have no "params".
    """
    network = as_network(network)
    _check_variables(variables)
    owns = _owns(network, variables, train, key)
    params = _reparametrize(network, variables, owns)
    params = cast_parameters(params, network.dtype, network.float32)
    stats = variables.get("batch_stats", {})
    extra = dict(variables.get("extra") or {})
    rngs = {}
    if key is not None:
        rngs = {"dropout": key, "sample": jax.random.fold_in(key, 1)}
    shares = {SHARES: extra[SHARES]} if train and SHARES in extra else {}
    changes = {name: {} for name, f in network.forwards.items() if f.intercept}
    replace = functools.partial(_intercept, network.forwards, owns, changes)
    with intercepting(replace) if changes else contextlib.nullcontext():
        result, changed = network.model.apply(
            {"params": params, "batch_stats": stats, **shares},
            cast_floats(inputs, network.dtype),
            **mode_argument(network.model, train),
            mutable=["batch_stats", *shares] if train else [],
            rngs=rngs,
            **options,
        )
    logits, endpoints = split_outputs(result)
    if train:
        stats = changed.get("batch_stats", stats)
        extra |= {name: changed[name] for name in shares}
        extra |= {k: extra[k] | change for k, change in changes.items() if change}
    after = {"batch_stats": stats, "extra": extra}
    return (cast_floats(logits, jnp.float32), endpoints), after


def as_network(network: Any) -> Network:
    """Returns a `Network` unchanged, and a Linen module as one without methods.

    Raises:
      UserError: it is neither, such as a module's class.
    """
    if not isinstance(network, Network):
        network = Network(network)
    if isinstance(network.model, type) or not hasattr(network.model, "init"):
        raise UserError(
            f"the network is {shortened(repr(network.model), 60)}: give a Linen module, such as Net(), or an NNX module by"
            " from_nnx"
        )
    return network


def _check_variables(variables: Any) -> None:
    """Raises a UserError unless variables are a dict with "params"."""
    if isinstance(variables, Mapping) and "params" in variables:
        return
    if hasattr(variables, "variables"):
        problem = f"a {type(variables).__name__}: give its variables()"
    elif isinstance(variables, Mapping):
        names = ", ".join(map(str, variables)) or "nothing"
        problem = f"a dict with {names} and no 'params': give {{'params': …}}, as init returns it"
    else:
        problem = (
            f"a {type(variables).__name__}: give {{'params': …}}, as init returns it"
        )
    raise UserError(f"the variables are {problem}")


def split_outputs(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """Splits the outputs of a module into (logits, endpoints); endpoints are {} if the module returns logits alone.

    Raises:
      UserError: the module returns a tuple other than (logits, dict).
    """
    if not isinstance(result, tuple):
        return result, {}
    if len(result) == 2 and isinstance(result[1], Mapping):
        return result
    raise UserError(
        f"the network returns a tuple of {len(result)}: return logits, or (logits, a dict of endpoints)"
    )


@contextlib.contextmanager
def applying_interceptions(
    network: Network, variables: Mapping[str, Any]
) -> Iterator[None]:
    """Applies the interceptions of the network's methods to its module within this context, in evaluation mode.

    Serves tools that trace the module themselves, such as those that count costs.

    Args:
      network: the network that `make` built.
      variables: see the top of this file.
    """
    owns = _owns(network, variables, False, None)
    changes = {name: {} for name, f in network.forwards.items() if f.intercept}
    with intercepting(functools.partial(_intercept, network.forwards, owns, changes)):
        yield


def fold_reparametrizations(
    network: Network, variables: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
    """Applies the reparametrizations to the parameters once; returns a network without them, and its variables.

    If no method intercepts, the variables are {"params", "batch_stats"} of the module alone.

    Args:
      network: the network that `make` built.
      variables: see the top of this file.
    """
    owns = _owns(network, variables, False, None)
    params = _reparametrize(network, variables, owns)
    own = variables["params"].get(METHODS)
    interceptors = {
        name: method._replace(reparametrize=None)
        for name, method in network.forwards.items()
        if method.intercept is not None
    }
    plain = {"params": params, "batch_stats": variables.get("batch_stats", {})}
    if interceptors:
        kept = {k: own[k] for k in interceptors if k in (own or {})}
        plain["params"] = params | ({METHODS: kept} if kept else {})
        plain |= {k: variables[k] for k in ("extra", "step") if k in variables}
    return network._replace(forwards=interceptors), plain


def parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's parameters, without the parameters that methods own."""
    return {name: value for name, value in params.items() if name != METHODS}


def accepted_taps(
    model: nn.Module, example: Any, forwards: Sequence[Forward]
) -> list[tuple[Tap, ...]]:
    """Returns for each method the taps of a module that it accepts, in the order in which the module uses them.

    Args:
      model: a Linen module.
      example: shapes of its inputs.
      forwards: the methods.
    """
    taps: dict[str, Tap] = {}

    def record(tap, x):
        taps.setdefault(tap.name, tap)
        return x

    with intercepting(record):
        _trace_init(model, example)
    return [
        tuple(t for t in taps.values() if f.intercept is not None and f.taps(t.name))
        for f in forwards
    ]


def normalisation_paths(model: nn.Module, example: Any) -> frozenset[str]:
    """Returns the paths of a module's normalisation layers, such as "block1/norm"."""
    paths = set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, NORMALISATIONS):
            paths.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _trace_init(model, example)
    return frozenset(paths)


def _trace_init(model, example):
    """Traces the module's initialisation; returns the shapes of its variables.

    Each call passes a new function to `jax.eval_shape`, so that JAX cannot skip the trace because it has cached one.
    """
    key = jax.random.key(0)
    rngs = dict.fromkeys(("params", "dropout", "sample"), key)
    return jax.eval_shape(
        lambda x: model.init(rngs, x, **mode_argument(model, False)), example
    )


def own(
    name: str,
    variables: Mapping[str, Any],
    *,
    first: int = 0,
    train: bool = True,
    key: jax.Array | None = None,
) -> Own:
    """Returns a method's `Own`: its parameters, state, random key and step.

    Args:
      name: name of the method.
      variables: see the top of this file.
      first: the step at which the phase began.
      train: whether the call belongs to a training step.
      key: random key of the step; the method's key is derived from it and the method's name.
    """
    params = variables["params"].get(METHODS, {}).get(name, {})
    step = variables.get("step")
    return Own(
        params=params,
        state=(variables.get("extra") or {}).get(name),
        key=None if key is None else jax.random.fold_in(key, _seed(name)),
        step=jnp.int32(0) if step is None else step - first,
        train=train,
    )


def _seed(name: str) -> int:
    """Returns a number that `jax.random.fold_in` accepts, and that the name alone determines."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _owns(network, variables, train, key):
    """Returns the `Own` of each method of the plug point `forward`, by name."""
    return {
        name: own(name, variables, first=network.first, train=train, key=key)
        for name in network.forwards
    }


def _reparametrize(network, variables, owns):
    """Returns the network's parameters after the reparametrizations of all methods."""
    params = parameters(variables["params"])
    for name, method in network.forwards.items():
        if method.reparametrize is not None:
            params = method.reparametrize(params, owns[name])
    return params


def _intercept(forwards, owns, changes, tap, x):
    """Returns the array of a tap after the interceptions of all methods.

    Args:
      forwards: all methods by name.
      owns: the `Own` of each method.
      changes: {name: {}} of the methods that intercept; collects the changes of their states.
      tap: the tap.
      x: its array.
    """
    for name in changes:
        if forwards[name].taps(tap.name):
            state = owns[name].state
            now = owns[name]._replace(state=state and state | changes[name])
            x, change = forwards[name].intercept(tap, x, now)
            changes[name] |= change
    return x


def cast_floats(values, dtype):
    """Casts the floating-point arrays of a pytree to a dtype; leaves all other arrays as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        values,
    )


def cast_parameters(params, dtype: str, float32: frozenset[str] = frozenset()):
    """Casts parameters to the dtype of the computation, except those of the layers whose paths are in `float32`."""
    if dtype == "float32":
        return params
    return tree.map_named(
        lambda name, w: w if name.rpartition("/")[0] in float32 else w.astype(dtype),
        params,
    )
