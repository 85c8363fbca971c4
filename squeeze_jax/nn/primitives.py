"""Primitives made of operations: for what is linear and has a quicker derivative than that of its operations."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir


def make(
    name: str, run: Callable[..., jax.Array], like: Callable[..., jax.Array]
) -> Primitive:
    """Returns a primitive without rules for derivatives and `vmap`, which its maker adds.

    Args:
      name: as it is called in a jaxpr.
      run: arrays and hashable keyword parameters → an array; what the primitive is compiled to.
      like: the same function in few operations. It is traced for the type of the result, so that dtype, sharding and
        the axes of `jax.shard_map` are what operations make of them.
    """

    def types(*arrays, **params):
        return jax.make_jaxpr(partial(like, **params))(*arrays).out_avals[0]

    def alone(*arrays, **params):
        return jax.jit(run, static_argnames=tuple(params))(*arrays, **params)

    primitive = Primitive(name)
    primitive.def_impl(alone)
    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    return primitive


def apart(fn: Callable, static: Sequence[int] = ()) -> Callable:
    """Returns a function that XLA compiles on its own, fused with nothing around it, and begins when all arrays are there.

    On a CPU XLA otherwise computes what is cheap to it, such as a sum of nine shifted images, anew in each pass that
    reads it; and it begins a gradient with what only needs activations, such as windows, long before it can be ended,
    and keeps that. By then `lax.optimization_barrier` is gone.

    Args:
      fn: of arrays.
      static: positions of hashable arguments that are no arrays.
    """
    compiled = jax.jit(fn, static_argnums=tuple(static))

    def call(*arguments):
        with set_xla_metadata(inlineable="false"):
            return compiled(*arguments)

    return call
