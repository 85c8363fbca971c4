"""Primitives made of operations: for what is linear and has a quicker derivative than that of its operations."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir


def make(
    name: str,
    on_cpu: Callable[..., jax.Array],
    elsewhere: Callable[..., jax.Array],
    like: Callable[..., jax.Array] | None = None,
) -> Primitive:
    """Returns a primitive without rules for derivatives and `vmap`, which its maker adds.

    Args:
      name: as it is called in a jaxpr.
      on_cpu: arrays and hashable keyword parameters → an array; what the primitive is compiled to for a CPU.
      elsewhere: the same function for every other platform.
      like: the same function in few operations, `elsewhere` by default. It is traced for the type of the result, so that
        dtype, sharding and the axes of `jax.shard_map` are what operations make of them.
    """

    def types(*arrays, **params):
        function = partial(like or elsewhere, **params)
        return jax.make_jaxpr(function)(*arrays).out_avals[0]

    primitive = Primitive(name)

    def alone(*arrays, **params):
        return jax.jit(primitive.bind, static_argnames=tuple(params))(*arrays, **params)

    primitive.def_impl(alone)
    primitive.def_abstract_eval(types)
    # The platform is that of the compilation, which need not be that of this machine.
    for rule, platform in ((elsewhere, None), (on_cpu, "cpu")):
        lowered = mlir.lower_fun(rule, multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform=platform)
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
