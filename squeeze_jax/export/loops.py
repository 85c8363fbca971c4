"""Unrolls loops, for runtimes that do not support them.

`lax.scan`, `flax.linen.RNN` and `lax.fori_loop` with fixed bounds run a known number of iterations. Unrolled, they become
plain operations that LiteRT's converter supports. A loop that ends on a condition cannot be unrolled.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from squeeze_jax.cost import program

# The most iterations of all loops together: the file stores the operations of each iteration.
MAX_ITERATIONS = 512
# Primitives without a LiteRT operation, or that its converter leaves unconverted.
_UNSUPPORTED = {
    *("cholesky", "eig", "eigh", "fft", "lu", "qr", "svd", "triangular_solve"),
    *("sort", "scan", "while", "random_bits", "threefry2x32", "rng_bit_generator"),
}


def unroll_loops(fn: Callable, input_shapes: Any) -> Callable:
    """Returns a function that computes the same as `fn`, with all loops of known length unrolled.

    Args:
      fn: a function of one pytree that JAX can trace.
      input_shapes: shapes of its argument, as `jax.ShapeDtypeStruct`s.

    Returns:
      `fn` itself if it has no such loop, or if its loops have more than MAX_ITERATIONS iterations.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(input_shapes)
    if not 0 < _count_iterations(closed.jaxpr) <= MAX_ITERATIONS:
        return fn
    structure = jax.tree.structure(shapes)
    run = core.jaxpr_as_fun(closed.replace(jaxpr=_unroll(closed.jaxpr)))
    return lambda x: jax.tree.unflatten(structure, run(*jax.tree.leaves(x)))


def narrow_floats(fn: Callable, input_shapes: Any) -> dict[str, str]:
    """Returns {dtype: the first operation that computes in it} of the floats other than float32 in a function.

    Args:
      fn, input_shapes: as for `unroll_loops`.
    """
    first: dict[str, str] = {}
    for op, _, _ in program.executions(program.trace(fn, input_shapes), _no_cost):
        for dtype in (output.dtype for output in op.outputs):
            if jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float32:
                where = op.layer or "the function itself"
                first.setdefault(str(dtype), f"{op.name} in {where}")
    return first


def unsupported_operations(fn: Callable, input_shapes: Any) -> list[str]:
    """Returns descriptions of the operations that a LiteRT file cannot hold, such as "fft in encoder/mix".

    Args:
      fn, input_shapes: as for `unroll_loops`.
    """
    operations = [
        op for op, _, _ in program.executions(program.trace(fn, input_shapes), _no_cost)
    ]
    return list(
        dict.fromkeys(
            f"{_describe(op)} in {op.layer or 'the function itself'}"
            for op in operations
            if (op.name in _UNSUPPORTED and not _is_unrolled(op))
            or any(str(v.dtype).startswith("complex") for v in op.outputs)
        )
    )


def _no_cost(op) -> int:
    return 0


def _is_unrolled(op) -> bool:
    return op.name == "scan" and op.params["unroll"] == op.params["length"]


def _describe(op) -> str:
    """Describes an unsupported operation for an error message."""
    if op.name == "while":
        return "a loop that ends on a condition"
    if op.name == "scan":
        return f"a loop of {op.params['length']} turns"
    return op.name if op.name in _UNSUPPORTED else "complex numbers"


def _count_iterations(jaxpr: core.Jaxpr) -> int:
    """Returns the iterations of all scans; the iterations of nested scans are multiplied."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = sum(map(_count_iterations, core.jaxprs_in_params(eqn.params)))
        if eqn.primitive.name == "scan":
            total += eqn.params["length"] * max(1, inside)
        else:
            total += inside
    return total


def _unroll(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Returns the jaxpr with each scan unrolled over its whole length."""
    equations = []
    for eqn in jaxpr.eqns:
        params = {name: _unroll_parameter(value) for name, value in eqn.params.items()}
        if eqn.primitive.name == "scan":
            params["unroll"] = params["length"]
        equations.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=equations)


def _unroll_parameter(value: Any) -> Any:
    """Returns an equation's parameter with the scans of every jaxpr in it unrolled."""
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_unroll(value.jaxpr))
    if isinstance(value, core.Jaxpr):
        return _unroll(value)
    if type(value) in (tuple, list):
        return type(value)(map(_unroll_parameter, value))
    return value
