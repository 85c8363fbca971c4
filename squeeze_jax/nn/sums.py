"""Sums over all positions of several arrays, which on a CPU take no longer than reading the arrays from memory."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying


def examples_per_sum(batch: int) -> int:
    """Returns how many examples `totals` adds up first: the largest divisor of the batch size up to 16; 1 if it is symbolic."""
    if not isinstance(batch, int):
        return 1
    return next(n for n in range(16, 0, -1) if batch % n == 0)


def totals(terms: Sequence[jax.Array]) -> jax.Array:
    """Returns the sums of several arrays over all axes but the channels, in one pass over the arrays they are computed from.

    The pass adds up groups of `examples_per_sum(b)` examples, or the positions of each example if that number is 3 or less. A
    small second sum completes the result. To add up the whole batch in one sum takes three times as long or more, because its
    strides through memory are so long.

    Args:
      terms: n arrays [b, ..., c] of the same shape.

    Returns:
      [n, c].
    """
    first = terms[0]
    # XLA cannot shard a reduction of several arrays: it would gather them on every device. Inside `jax.shard_map` each device
    # reduces its own arrays, and with a single device there is nothing to gather.
    if jax.device_count() > 1 and not varying.axes(first):
        return jnp.stack(list(map(total, terms)))
    group_size, axes = examples_per_sum(first.shape[0]), tuple(range(1, first.ndim - 1))
    if group_size > 3:
        terms = [t.reshape(-1, group_size, *t.shape[1:]) for t in terms]
        axes = (1,)
    zero = varying.like(jnp.zeros((), first.dtype), first)
    sums = lax.reduce(tuple(terms), (zero,) * len(terms), _add, axes)
    return jnp.stack(sums).sum(range(1, sums[0].ndim))


def total(x: jax.Array) -> jax.Array:
    """Returns the sum of an array [..., c] over all axes but the channels, [c]."""
    return x.sum(range(x.ndim - 1))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))
