"""The weighted mean that losses and metrics use, for a whole batch or for one part of a batch.

A training step can split a batch into parts: over devices, or over accumulation steps. It averages the parts' losses,
weighted by their shares of the examples. For a mean over tokens that average is wrong, because parts with the same number of
examples may have different numbers of tokens. So in a part, `mean` divides by the sum of weights of the whole batch. The step
finds these sums first: `record_weight_sums` collects the sum of weights of each call of `mean`, and `divide_by` hands the
totals back to the same calls in the same order.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.core import tracers

from squeeze_jax.errors import UserError


class Divisors(NamedTuple):
    """The divisors of the calls of `mean` in one part of a batch.

    Attributes:
      totals: sum of weights over the whole batch for each call of `mean`, in the order of the calls; float32 [] each.
      share: the part's share of the batch's examples, float32 [].
    """

    totals: tuple[jax.Array, ...]
    share: jax.Array


# {sum of weights → divisor}, the function that the enclosing context gives to `mean`; None outside of the contexts.
_divisor = contextvars.ContextVar("means", default=None)


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted mean of values, float32 []; 0 if all weights are 0.

    Args:
      values: float array.
      weights: bool or float array of the same shape, not negative; 0 or False for values that do not count.

    Raises:
      UserError: the shapes differ; or the batch is split into parts, and this is called inside a transform such as `jax.vmap`.
    """
    if jnp.shape(values) != jnp.shape(weights):
        raise UserError(
            f"a mean over values {list(jnp.shape(values))} has weights {list(jnp.shape(weights))}: give one weight for each"
            " value, such as a mask [b] for losses [b]"
        )
    weights = jnp.asarray(weights).astype(jnp.float32)
    total, weight_sum = jnp.sum(values * weights), jnp.sum(weights)
    divisor = _divisor.get()
    if divisor is None:
        return total / one_if_zero(weight_sum)
    return total / divisor(weight_sum)


def one_if_zero(weight_sum: jax.Array) -> jax.Array:
    """Returns a sum of weights as a divisor: 1 in place of 0."""
    return jnp.where(weight_sum > 0, weight_sum, 1.0)


@contextlib.contextmanager
def record_weight_sums() -> Iterator[list[jax.Array]]:
    """Yields a list to which each call of `mean` inside this context appends its sum of weights."""
    weight_sums, outside = [], tracers.current_trace()

    def record(weight_sum):
        if tracers.current_trace() != outside:
            raise UserError(
                "squeeze_jax.nn.means.mean is called inside jax.vmap, jax.checkpoint, jax.jit or a loop, from where a batch of"
                " several parts cannot take its sum of weights: call it outside, or set config.accumulate = 1 and leave out"
                " config.exchange"
            )
        weight_sums.append(weight_sum)
        return one_if_zero(weight_sum)

    with _divisor_set(record):
        yield weight_sums


@contextlib.contextmanager
def divide_by(divisors: Divisors | None) -> Iterator[None]:
    """Makes each call of `mean` inside this context return one part's contribution to the mean over the whole batch.

    The mean over the whole batch is the average of the parts' contributions, weighted by their shares of the examples.

    Args:
      divisors: divisors of this part; None changes nothing.
    """
    if divisors is None:
        yield
        return
    totals = iter(divisors.totals)

    def divisor(weight_sum):
        del weight_sum
        # A part without examples adds nothing.
        return one_if_zero(next(totals) * divisors.share)

    with _divisor_set(divisor):
        yield


@contextlib.contextmanager
def _divisor_set(divisor):
    token = _divisor.set(divisor)
    try:
        yield
    finally:
        _divisor.reset(token)
