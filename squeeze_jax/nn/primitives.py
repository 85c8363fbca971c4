"""JAX primitives that are made of JAX operations, and functions that XLA compiles without fusing them.

A primitive has derivative rules of its own. It serves linear functions whose derivatives can be computed faster than by
differentiating their operations.
"""

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
    """Returns a primitive that runs one function on a CPU and another one on all other platforms.

    The caller adds the rules for derivatives and for `jax.vmap`.

    Args:
      name: name of the primitive in jaxprs.
      on_cpu: the function for a CPU: (arrays, hashable keyword parameters) → an array.
      elsewhere: the same function for every other platform.
      like: the same function in few operations; None for `elsewhere`. It is traced only to get the type of the result: its
        dtype, its sharding and the axes of `jax.shard_map` over which it varies.
    """

    def result_type(*arrays, **params):
        function = partial(like or elsewhere, **params)
        return jax.make_jaxpr(function)(*arrays).out_avals[0]

    primitive = Primitive(name)

    def run_eagerly(*arrays, **params):
        return jax.jit(primitive.bind, static_argnames=tuple(params))(*arrays, **params)

    primitive.def_impl(run_eagerly)
    primitive.def_abstract_eval(result_type)
    # The platform is the one that a program is compiled for, which may differ from this machine's.
    for rule, platform in ((elsewhere, None), (on_cpu, "cpu")):
        lowered = mlir.lower_fun(rule, multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform=platform)
    return primitive


def compiled_alone(fn: Callable, static: Sequence[int] = ()) -> Callable:
    """Returns a function that XLA does not fuse with the operations around it, and that starts once all arguments exist.

    Without it, XLA on a CPU recomputes what it considers cheap, such as a sum of nine shifted images, in each pass that reads
    it. It also computes the parts of a gradient that need only activations, such as the windows of an image, long before the
    gradient can be completed, and keeps them in memory until then. `lax.optimization_barrier` prevents neither, because XLA
    removes it before it fuses and orders operations.

    Args:
      fn: function of arrays and of hashable arguments.
      static: positions of the arguments that are not arrays.
    """
    compiled = jax.jit(fn, static_argnums=tuple(static))

    def call(*arguments):
        with set_xla_metadata(inlineable="false"):
            return compiled(*arguments)

    return call
