"""The weighted mean that losses and metrics share, over a batch or over one part of a batch.

A step that splits a batch over accumulated parts or devices averages what the parts return, each weighted by its share of
the examples. The mean over all tokens of the batch is not the average of the parts' means over their tokens. So `mean`
divides by the weights of the whole batch there, which the step adds up beforehand: `recorded` collects the sum of weights
of each call of `mean`, `divided` hands the totals back in the same order.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Divisors(NamedTuple):
    """What the calls of `mean` in one part of a batch divide by.

    Attributes:
      totals: float32 [] each, the sums of weights over the whole batch, in the order of the calls.
      share: float32 [], the share of the batch's examples that the part has.
    """

    totals: tuple[jax.Array, ...]
    share: jax.Array


_scope = contextvars.ContextVar("means", default=None)


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean over what counts, float32; 0 where nothing does.

    Args:
      values: float array.
      weights: bool or float array of the same shape: 0 for what does not count.
    """
    weights = weights.astype(jnp.float32)
    total, count = jnp.sum(values * weights), jnp.sum(weights)
    divisor = _scope.get()
    return total / (jnp.maximum(count, 1.0) if divisor is None else divisor(count))


@contextlib.contextmanager
def recorded() -> Iterator[list[jax.Array]]:
    """Yields a list that collects the sum of weights of each call of `mean` inside."""
    counts = []

    def record(count):
        counts.append(count)
        return jnp.maximum(count, 1.0)

    with _scoped(record):
        yield counts


@contextlib.contextmanager
def divided(by: Divisors | None) -> Iterator[None]:
    """Makes each call of `mean` inside return this part's contribution to the mean over the whole batch.

    The average of these, weighted by `by.share`, is the mean over the whole batch. None changes nothing.
    """
    if by is None:
        yield
        return
    left = iter(by.totals)

    def divisor(count):
        del count
        whole = jnp.maximum(next(left), 1.0) * by.share
        return jnp.where(whole > 0, whole, 1.0)  # a part without examples adds nothing

    with _scoped(divisor):
        yield


@contextlib.contextmanager
def _scoped(divisor):
    token = _scope.set(divisor)
    try:
        yield
    finally:
        _scope.reset(token)
