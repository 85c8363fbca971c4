"""Programs without loops, for runtimes that have none.

`lax.scan`, `flax.linen.RNN` and `lax.fori_loop` between fixed bounds run a known number of turns: written out one after
the other, they are the plain operations that LiteRT's converter knows. A loop that ends on a condition cannot be written
out.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from squeeze_jax.cost import program

MOST_TURNS = 512  # of all loops together; each turn's operations are a part of the file
# Primitives that LiteRT has no operation for, or that its converter leaves as they are.
_LACKING = {
    *("cholesky", "eig", "eigh", "fft", "lu", "qr", "svd", "triangular_solve"),
    *("sort", "scan", "while", "random_bits", "threefry2x32", "rng_bit_generator"),
}


def written_out(fn: Callable, given: Any) -> Callable:
    """Returns a function that computes what `fn` does, without its loops of known length.

    Args:
      fn: a function of one pytree that JAX can trace.
      given: shapes of its argument.

    Returns:
      `fn` itself where it has no such loop, or where its loops have more than MOST_TURNS turns.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(given)
    if not 0 < _turns(closed.jaxpr) <= MOST_TURNS:
        return fn
    structure = jax.tree.structure(shapes)
    run = core.jaxpr_as_fun(closed.replace(jaxpr=_unrolled(closed.jaxpr)))
    return lambda x: jax.tree.unflatten(structure, run(*jax.tree.leaves(x)))


def lacking(fn: Callable, given: Any) -> list[str]:
    """Names what a function computes that LiteRT's files cannot hold, such as "fft in encoder/mix".

    Args:
      fn, given: as of `written_out`.
    """
    operations = [
        op for op, _, _ in program.executions(program.trace(fn, given), _nothing)
    ]
    return list(
        dict.fromkeys(
            f"{_called(op)} in {op.layer or 'the function itself'}"
            for op in operations
            if (op.name in _LACKING and not _written_out(op))
            or any(str(v.dtype).startswith("complex") for v in op.outputs)
        )
    )


def _nothing(op) -> int:
    return 0


def _written_out(op) -> bool:
    return op.name == "scan" and op.params["unroll"] == op.params["length"]


def _called(op) -> str:
    if op.name == "while":
        return "a loop that ends on a condition"
    if op.name == "scan":
        return f"a loop of {op.params['length']} turns"
    return op.name if op.name in _LACKING else "complex numbers"


def _turns(jaxpr: core.Jaxpr) -> int:
    """The turns of all scans, those inside others multiplied."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = sum(map(_turns, core.jaxprs_in_params(eqn.params)))
        if eqn.primitive.name == "scan":
            total += eqn.params["length"] * max(1, inside)
        else:
            total += inside
    return total


def _unrolled(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same with each scan in one turn that holds all."""
    equations = []
    for eqn in jaxpr.eqns:
        params = {name: _replaced(value) for name, value in eqn.params.items()}
        if eqn.primitive.name == "scan":
            params["unroll"] = params["length"]
        equations.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=equations)


def _replaced(value: Any) -> Any:
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_unrolled(value.jaxpr))
    if isinstance(value, core.Jaxpr):
        return _unrolled(value)
    if type(value) in (tuple, list):
        return type(value)(map(_replaced, value))
    return value
