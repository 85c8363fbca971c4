"""Sums over all positions of several images at once, and their transpose.

Both are linear. They are primitives because each has to be the other's transpose: on a CPU XLA makes one pass over the
memory of a sum of several arrays, and several passes, many times slower, of the sums that differentiation makes of
separate broadcasts. Being linear primitives they have derivatives of every order, forward and reverse.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from squeeze_jax.nn import varying


def total(*arrays: jax.Array) -> list[jax.Array]:
    """Sums of arrays of one shape [..., c] over all axes but the last, in one pass: [c] of each."""
    return _total.bind(*arrays, at_once=_at_once(arrays[0]))


def spread(*vectors: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """Broadcasts vectors [c] to `shape` [..., c]; the gradients of all of them come from one pass."""
    return _spread.bind(*vectors, shape=tuple(shape))


def _at_once(x) -> bool:
    # XLA cannot shard a reduction of several arrays: it would gather them on every device. Inside `jax.shard_map` it
    # need not, and one device has nothing to gather.
    alone = jax.device_count() == 1 or bool(varying.axes(x))
    return jax.default_backend() == "cpu" and alone


def _sum_all(*arrays, at_once):
    if not at_once:
        return [a.sum(range(a.ndim - 1)) for a in arrays]
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    # Over the batch alone the partial sums stay in vector registers.
    sums = lax.reduce(tuple(arrays), zeros, _add, (0,))
    return [a.sum(range(a.ndim - 1)) for a in sums]


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _broadcast_all(*vectors, shape):
    return [lax.broadcast_in_dim(v, shape, (len(shape) - 1,)) for v in vectors]


def _total_transpose(cotangents, *arrays, at_once):
    shape = arrays[0].aval.shape
    return spread(*map(ad.instantiate_zeros, cotangents), shape=shape)


def _spread_transpose(cotangents, *vectors, shape):
    return total(*map(ad.instantiate_zeros, cotangents))


def _total_batched(arrays, dims, at_once):
    """Under `vmap` plain sums, of which XLA makes what it can."""
    out = [
        a.sum(range(a.ndim - 1))
        if d is None
        else jnp.moveaxis(a, d, 0).sum(range(1, a.ndim - 1))
        for a, d in zip(arrays, dims, strict=True)
    ]
    return out, [None if d is None else 0 for d in dims]


def _spread_batched(vectors, dims, shape):
    out = [
        jnp.broadcast_to(v, shape)
        if d is None
        else lax.broadcast_in_dim(
            jnp.moveaxis(v, d, 0), (v.shape[d], *shape), (0, len(shape))
        )
        for v, d in zip(vectors, dims, strict=True)
    ]
    return out, [None if d is None else 0 for d in dims]


def _primitive(name, run, transpose, batched) -> Primitive:
    def types(*inputs, **params):
        # Traced, so that dtypes, shardings and the axes of `jax.shard_map` are what the operations make of them.
        return jax.make_jaxpr(partial(run, **params))(*inputs).out_avals

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    ad.deflinear2(primitive, transpose)
    batching.primitive_batchers[primitive] = batched
    return primitive


_total = _primitive("positions_total", _sum_all, _total_transpose, _total_batched)
_spread = _primitive(
    "positions_spread",
    _broadcast_all,
    _spread_transpose,
    _spread_batched,
)
