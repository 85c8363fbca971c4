"""Sums over all positions of several arrays, which on a CPU cost what reading memory costs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying


def share(batch: int) -> int:
    """The largest divisor of the batch up to 16; 1 for a batch that is only known later."""
    if not isinstance(batch, int):
        return 1
    return next(n for n in range(16, 0, -1) if batch % n == 0)


def totals(terms: Sequence[jax.Array]) -> jax.Array:
    """Sums of several arrays [b, ..., c] over all but channels, [n, c], in one pass over what they are computed from.

    A pass adds up images `share(b)` apart, or, where the batch has no such parts, positions: with the whole batch in one
    sum the strides through memory are so long that it takes three times as long or more.
    """
    first = terms[0]
    # XLA cannot shard a reduction of several arrays: it would gather them on every device. Inside `jax.shard_map` it
    # need not, and one device has nothing to gather.
    if jax.device_count() > 1 and not varying.axes(first):
        return jnp.stack(list(map(total, terms)))
    parts, axes = share(first.shape[0]), tuple(range(1, first.ndim - 1))
    if parts > 3:
        terms = [t.reshape(-1, parts, *t.shape[1:]) for t in terms]
        axes = (1,)
    zero = varying.like(jnp.zeros((), first.dtype), first)
    sums = lax.reduce(tuple(terms), (zero,) * len(terms), _add, axes)
    return jnp.stack(sums).sum(range(1, sums[0].ndim))


def total(x: jax.Array) -> jax.Array:
    """The sum over all but channels, [c]."""
    return x.sum(range(x.ndim - 1))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))
