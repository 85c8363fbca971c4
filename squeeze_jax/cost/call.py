"""Splits the call of a function or module into weights and arrays, from which its costs are counted.

Arguments that hold arrays are inputs. All other arguments, such as a string, a number, a tuple of numbers or a function,
are static: the function gets them unchanged. Weights are a Linen module's variables, an NNX module's state, or those
arguments of a function that `weight_argnums` names.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax.extend import core

from squeeze_jax.errors import UserError, shown

_APPLY = ("rngs", "mutable")  # arguments of Linen's `apply` that `init` does not take


def check(fn: Callable | nn.Module, args: tuple, kwargs: Mapping) -> None:
    """Checks that a function or a module can be called with these arguments.

    Raises:
      UserError: `fn` is not callable, an argument is missing, unknown or one too many, or a module gets a shape instead of
        an array.
    """
    if not callable(fn):
        raise UserError(f"{shown(fn)} is neither a function nor a module")
    if isinstance(fn, type) and issubclass(fn, nn.Module | nnx.Module):
        raise UserError(f"{fn.__name__} is a class: give a network, {fn.__name__}(…)")
    method = kwargs.get("method") or "__call__"
    target, keywords = fn, dict(kwargs)
    if isinstance(fn, nn.Module):
        if args and isinstance(args[0], Mapping) and "params" in args[0]:
            raise UserError(
                f"{type(fn).__name__} gets its variables as an input: give its inputs alone, or its apply in its place"
            )
        target = getattr(fn, method, None) if isinstance(method, str) else None
        keywords = {k: v for k, v in kwargs.items() if k not in (*_APPLY, "method")}
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        signature = inspect.signature(target) if target is not None else None
    except (TypeError, ValueError):  # of a function written in C
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            takes = ", ".join(signature.parameters)
            raise UserError(
                f"{name} takes ({takes}), and the call does not match: {error}"
            ) from None
    if is_module(fn) and not has_arrays((args, keywords)):
        shape = next((a for a in args if _is_shape(a)), None)
        if shape is not None:
            raise UserError(
                f"{name} gets {shape}, which is not an array: pass an array or jax.ShapeDtypeStruct({shape}, jnp.float32)"
            )


def variable_shapes(module: nn.Module, *args, **kwargs) -> dict[str, Any]:
    """Returns the variables of a Linen module as `jax.ShapeDtypeStruct`s, without initializing them."""
    check(module, args, kwargs)
    arrays, restore = _separate_static(args, kwargs)

    def init(arrays):
        positional, keywords = restore(arrays)
        return init_variables(module, jax.random.key(0), positional, keywords)

    return jax.eval_shape(init, arrays)


def init_variables(
    module: nn.Module, key, args: tuple, kwargs: Mapping
) -> dict[str, Any]:
    """Initializes a Linen module's variables, given the arguments of its `apply`."""
    return module.init(
        key, *args, **{k: v for k, v in kwargs.items() if k not in _APPLY}
    )


def split(
    fn: Callable | nn.Module,
    args: tuple,
    kwargs: Mapping,
    first_output: bool,
    weight_argnums: int | Sequence[int] = (),
) -> tuple[dict[str, Any], Callable, tuple]:
    """Splits a call into its weights, a function of (weights, arrays), and the arrays among the arguments.

    Args:
      fn: a function or a module.
      args, kwargs: its arguments.
      first_output: if a module returns a tuple, keep only the first element.
      weight_argnums: positions of a function's arguments that are weights.

    Returns:
      (weights, function, arrays). The weights are shapes for a Linen module, and arrays for an NNX module or a function.

    Raises:
      UserError: the arguments do not fit the call, `weight_argnums` names a position without an argument, or it is given for
        a module.
    """
    positions = (weight_argnums,) if isinstance(weight_argnums, int) else weight_argnums
    check(fn, args, kwargs)
    if is_module(fn):
        if positions:
            raise UserError(
                "weight_argnums is for functions: the weights of a module are its variables"
            )
        split_module = _split_linen if isinstance(fn, nn.Module) else _split_nnx
        weights, call, arrays = split_module(fn, args, kwargs)

        def run(weights, arrays):
            outputs = call(weights, arrays)
            keep_first = first_output and isinstance(outputs, tuple)
            return outputs[0] if keep_first else outputs

        return weights, run, arrays
    for position in positions:
        if not 0 <= position < len(args):
            raise UserError(
                f"weight_argnums = {weight_argnums}: the function is called with {len(args)} arguments, 0 to {len(args) - 1}"
            )
    weights = {str(i): args[i] for i in positions}
    others = tuple(None if i in positions else a for i, a in enumerate(args))
    arrays, restore = _separate_static(others, kwargs)

    def run_function(weights, arrays):
        positional, keywords = restore(arrays)
        return fn(
            *(weights.get(str(i), x) for i, x in enumerate(positional)), **keywords
        )

    return weights, run_function, arrays


def split_for_compilation(
    fn: Callable | nn.Module,
    args: tuple,
    kwargs: Mapping,
    weight_argnums: int | Sequence[int] = (),
) -> tuple[dict[str, Any], Callable, tuple]:
    """Splits a call as `split` does, so that compilation leaves work to measure.

    If the call has neither weights nor array arguments, the arrays that the function closes over become the weights. As
    constants they would let XLA compute the result during compilation.
    """
    weights, run, arrays = split(fn, args, kwargs, True, weight_argnums)
    if arrays or weights:
        return weights, run, arrays
    run_with_constants, constants = hoist_constants(lambda: run({}, ()))
    weights = {f"constant{i:04}": c for i, c in enumerate(constants)}
    return weights, lambda weights, _: run_with_constants(*weights.values()), ()


def bind_static(fn: Callable, args: tuple, kwargs: Mapping) -> tuple:
    """Binds a function's static arguments and returns (function of the other arguments, *other arguments)."""
    weights, run, arrays = split(fn, args, kwargs, first_output=False)
    return (lambda *a: run(weights, a), *arrays)


def hoist_constants(fn: Callable[[], Any]) -> tuple[Callable, tuple[jax.Array, ...]]:
    """Turns the arrays that a function without arguments closes over into arguments, and returns (function, arrays).

    XLA computes results that depend only on constants during compilation, and nothing would be left to measure.

    Raises:
      UserError: the function closes over no array.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)()
    structure = jax.tree.structure(result)
    # A second trace, without inner jitted functions, collects the constants of these functions as well.
    traced = jax.make_jaxpr(lambda: _evaluate(closed.jaxpr, closed.consts))()
    arrays = tuple(traced.consts)
    if not any(hasattr(c, "shape") and hasattr(c, "dtype") for c in arrays):
        raise UserError(
            "the function has no arguments and closes over no arrays, so XLA would compute its result during compilation: pass the"
            " arrays as arguments"
        )

    def run(*arrays):
        return jax.tree.unflatten(structure, _evaluate(traced.jaxpr, arrays))

    return run, arrays


def is_module(fn: Any) -> bool:
    """Returns whether `fn` is a Linen or NNX module."""
    return isinstance(fn, nn.Module) or is_nnx(fn)


def is_nnx(fn: Any) -> bool:
    """Returns whether `fn` is an NNX module."""
    nnx = sys.modules.get("flax.nnx")  # if never imported, `fn` cannot be one
    return nnx is not None and isinstance(fn, nnx.Module)


def has_arrays(argument: Any) -> bool:
    """Returns whether any leaf of a pytree is an array or a `jax.ShapeDtypeStruct`."""
    return any(
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        for leaf in jax.tree.leaves(argument)
    )


def _split_linen(module: nn.Module, args: tuple, kwargs: Mapping):
    options = {k: v for k, v in kwargs.items() if k in _APPLY}
    kwargs = {k: v for k, v in kwargs.items() if k not in _APPLY}
    arrays, restore = _separate_static(args, kwargs)
    weights = variable_shapes(module, *args, **kwargs)

    def call(weights, arrays):
        positional, keywords = restore(arrays)
        try:
            return module.apply(weights, *positional, **keywords, **options)
        except (ModifyScopeVariableError, InvalidRngError, UserError):
            pass  # it updates variables or draws random numbers
        keys = dict.fromkeys(("params", "dropout", "sample"), jax.random.key(0))
        rngs = options.get("rngs") or {}
        rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
        streams = {"rngs": keys | dict(rngs), "mutable": True}
        # Updated variables are dropped from the results, so they cost nothing.
        return module.apply(weights, *positional, **keywords, **streams)[0]

    return weights, call, arrays


def _split_nnx(module, args: tuple, kwargs: Mapping):
    from flax import nnx

    graph, state = nnx.split(module)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    weights = {
        jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves
    }
    arrays, restore = _separate_static(args, kwargs)

    def call(weights, arrays):
        positional, keywords = restore(arrays)
        # A fresh copy of the module, whose statistics and random streams may change.
        state = jax.tree.unflatten(structure, weights.values())
        return nnx.merge(graph, state)(*positional, **keywords)

    return weights, call, arrays


def _separate_static(args: tuple, kwargs: Mapping) -> tuple[tuple, Callable]:
    """Returns the arguments that hold arrays, and a function that adds the static ones again: arrays → (args, kwargs)."""
    positions = [i for i, a in enumerate(args) if has_arrays(a)]
    names = [k for k, v in kwargs.items() if has_arrays(v)]
    arrays = (*(args[i] for i in positions), *(kwargs[k] for k in names))

    def restore(arrays):
        replaced = dict(zip([*positions, *names], arrays, strict=True))
        positional = tuple(replaced.get(i, a) for i, a in enumerate(args))
        return positional, {k: replaced.get(k, v) for k, v in kwargs.items()}

    return arrays, restore


def _evaluate(jaxpr: core.Jaxpr, constants: Sequence, arguments: Sequence = ()):
    """Computes a jaxpr's outputs within the name scopes of its layers; inner jitted functions are inlined."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(v):
        return v.val if isinstance(v, core.Literal) else values[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        with jax.named_scope(str(eqn.source_info.name_stack)):
            if eqn.primitive.name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
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
