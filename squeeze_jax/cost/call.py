"""A call of a function or a module as a function of weights and arrays alone, from which its costs are counted.

Arguments that hold arrays are inputs. All others, such as a string, a number, a tuple of numbers or a function, are static: the
function gets them as they are. Weights are a Linen module's variables, an NNX module's state, and those arguments of a function
that `weight_argnums` names.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax.extend import core

from squeeze_jax.errors import UserError, shown

_APPLY = ("rngs", "mutable")  # options of Linen's `apply` that `init` has not


def check(fn: Callable | nn.Module, args: tuple, kwargs: Mapping) -> None:
    """Checks that a function or a module can be called with these arguments.

    Raises:
      UserError: it is no function, an argument is missing, unknown or too many, or a module gets a shape and no array.
    """
    if not callable(fn):
        raise UserError(f"{shown(fn)} is no function and no module")
    method = kwargs.get("method") or "__call__"
    target, named = fn, dict(kwargs)
    if isinstance(fn, nn.Module):
        target = getattr(fn, method, None) if isinstance(method, str) else None
        named = {k: v for k, v in kwargs.items() if k not in (*_APPLY, "method")}
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        signature = inspect.signature(target) if target is not None else None
    except (TypeError, ValueError):  # of a function written in C
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **named)
        except TypeError as error:
            takes = ", ".join(signature.parameters)
            raise UserError(
                f"{name} takes ({takes}), and is called otherwise: {error}"
            ) from None
    if is_module(fn) and not has_arrays((args, named)):
        shape = next((a for a in args if _is_shape(a)), None)
        if shape is not None:
            raise UserError(
                f"{name} gets {shape}, which is no array: pass an array or jax.ShapeDtypeStruct({shape}, jnp.float32)"
            )


def variables(module: nn.Module, *args, **kwargs) -> dict[str, Any]:
    """Returns the shapes of a Linen module's variables, without making them."""
    check(module, args, kwargs)
    arrays, whole = _static_apart(args, kwargs)

    def init(arrays):
        positional, named = whole(arrays)
        return initialised(module, jax.random.key(0), positional, named)

    return jax.eval_shape(init, arrays)


def initialised(module: nn.Module, key, args: tuple, kwargs: Mapping) -> dict[str, Any]:
    """Returns a Linen module's variables for the arguments of its `apply`."""
    return module.init(
        key, *args, **{k: v for k, v in kwargs.items() if k not in _APPLY}
    )


def split(
    fn: Callable | nn.Module,
    args: tuple,
    kwargs: Mapping,
    first: bool,
    weight_argnums: int | Sequence[int] = (),
) -> tuple[dict[str, Any], Callable, tuple]:
    """Returns the weights, the function of (weights, arrays), and the arrays among the arguments.

    Args:
      fn: a function or a module.
      args, kwargs: its arguments.
      first: of a tuple that a module returns keep the first alone.
      weight_argnums: positions of the arguments of a function that are weights.

    Returns:
      Weights, function and arrays. The weights are shapes for a Linen module, and arrays for an NNX module or a function.

    Raises:
      UserError: a call that does not fit, a position of weights that there is not, or positions for a module.
    """
    places = (weight_argnums,) if isinstance(weight_argnums, int) else weight_argnums
    check(fn, args, kwargs)
    if is_module(fn):
        if places:
            raise UserError(
                "weight_argnums is for functions: the weights of a module are its variables"
            )
        of = _linen if isinstance(fn, nn.Module) else _nnx
        weights, call, arrays = of(fn, args, kwargs)

        def run(weights, arrays):
            found = call(weights, arrays)
            return found[0] if first and isinstance(found, tuple) else found

        return weights, run, arrays
    for place in places:
        if not 0 <= place < len(args):
            raise UserError(
                f"weight_argnums = {weight_argnums}: the function is called with {len(args)} arguments, 0 to {len(args) - 1}"
            )
    weights = {str(i): args[i] for i in places}
    others = tuple(None if i in places else a for i, a in enumerate(args))
    arrays, whole = _static_apart(others, kwargs)

    def run_function(weights, arrays):
        positional, named = whole(arrays)
        return fn(*(weights.get(str(i), x) for i, x in enumerate(positional)), **named)

    return weights, run_function, arrays


def measured(
    fn: Callable | nn.Module,
    args: tuple,
    kwargs: Mapping,
    weight_argnums: int | Sequence[int] = (),
) -> tuple[dict[str, Any], Callable, tuple]:
    """Returns what `split` does, to be compiled: of a call without arrays the weights are what the function closes over."""
    weights, run, arrays = split(fn, args, kwargs, True, weight_argnums)
    if arrays or weights:
        return weights, run, arrays
    of_constants, constants = hoisted(lambda: run({}, ()))
    weights = {f"constant{i:04}": c for i, c in enumerate(constants)}
    return weights, lambda weights, _: of_constants(*weights.values()), ()


def bound(fn: Callable, args: tuple, kwargs: Mapping) -> tuple:
    """Returns a function and its arguments without the static ones, which the function holds: (fn, *arguments)."""
    weights, run, arrays = split(fn, args, kwargs, first=False)
    return (lambda *a: run(weights, a), *arrays)


def hoisted(fn: Callable[[], Any]) -> tuple[Callable, tuple[jax.Array, ...]]:
    """Returns a function without arguments as one of the arrays that it closes over, and these arrays.

    XLA computes what depends on constants alone while it compiles, and nothing is left to measure.

    Raises:
      UserError: it closes over no array.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)()
    structure = jax.tree.structure(result)
    # Constants of functions inside that are jitted come to the surface.
    traced = jax.make_jaxpr(lambda: _evaluated(closed.jaxpr, closed.consts))()
    arrays = tuple(traced.consts)
    if not any(hasattr(c, "shape") and hasattr(c, "dtype") for c in arrays):
        raise UserError(
            "the function has no arguments and no arrays that could be some, so XLA computes its result while it compiles: pass the"
            " arrays as arguments"
        )

    def run(*arrays):
        return jax.tree.unflatten(structure, _evaluated(traced.jaxpr, arrays))

    return run, arrays


def is_module(fn: Any) -> bool:
    """Whether it is a module of Linen or of NNX."""
    nnx = sys.modules.get("flax.nnx")  # if nobody imports it, nothing is one of its
    return isinstance(fn, nn.Module) or (nnx is not None and isinstance(fn, nnx.Module))


def has_arrays(argument: Any) -> bool:
    """Whether some leaf of a pytree is an array or a `jax.ShapeDtypeStruct`."""
    return any(
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        for leaf in jax.tree.leaves(argument)
    )


def _linen(module: nn.Module, args: tuple, kwargs: Mapping):
    options = {k: v for k, v in kwargs.items() if k in _APPLY}
    kwargs = {k: v for k, v in kwargs.items() if k not in _APPLY}
    arrays, whole = _static_apart(args, kwargs)
    weights = variables(module, *args, **kwargs)

    def call(weights, arrays):
        positional, named = whole(arrays)
        return module.apply(weights, *positional, **named, **options)

    def train(weights, arrays):
        positional, named = whole(arrays)
        keys = dict.fromkeys(("params", "dropout", "sample"), jax.random.key(0))
        rngs = options.get("rngs") or {}
        rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
        streams = {"rngs": keys | dict(rngs), "mutable": True}
        # What changes is no result, and so costs nothing.
        return module.apply(weights, *positional, **named, **streams)[0]

    try:
        jax.eval_shape(call, weights, arrays)
    except (ModifyScopeVariableError, InvalidRngError, UserError):
        return weights, train, arrays  # in training mode: variables change, or it draws
    return weights, call, arrays


def _nnx(module, args: tuple, kwargs: Mapping):
    from flax import nnx

    graph, state = nnx.split(module)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    weights = {
        jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves
    }
    arrays, whole = _static_apart(args, kwargs)

    def call(weights, arrays):
        positional, named = whole(arrays)
        # Merged anew, so that it may change its statistics and random streams.
        state = jax.tree.unflatten(structure, weights.values())
        return nnx.merge(graph, state)(*positional, **named)

    return weights, call, arrays


def _static_apart(args: tuple, kwargs: Mapping) -> tuple[tuple, Callable]:
    """Returns the arguments that hold arrays, and a function that puts the static ones back: arrays → (args, kwargs)."""
    places = [i for i, a in enumerate(args) if has_arrays(a)]
    names = [k for k, v in kwargs.items() if has_arrays(v)]
    arrays = (*(args[i] for i in places), *(kwargs[k] for k in names))

    def whole(arrays):
        given = dict(zip([*places, *names], arrays, strict=True))
        positional = tuple(given.get(i, a) for i, a in enumerate(args))
        return positional, {k: given.get(k, v) for k, v in kwargs.items()}

    return arrays, whole


def _evaluated(jaxpr: core.Jaxpr, constants: Sequence, arguments: Sequence = ()):
    """Computes a jaxpr's outputs under the names of its layers; jitted functions inside become a part of it."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(v):
        return v.val if isinstance(v, core.Literal) else values[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        with jax.named_scope(str(eqn.source_info.name_stack)):
            if eqn.primitive.name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                outputs = _evaluated(inner.jaxpr, inner.consts, inputs)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                outputs = eqn.primitive.bind(*inputs, **params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _is_shape(argument: Any) -> bool:
    return (
        isinstance(argument, tuple | list)
        and len(argument) > 0
        and all(isinstance(n, int) for n in argument)
    )
