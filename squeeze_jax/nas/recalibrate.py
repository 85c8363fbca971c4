"""Statistics of normalisation layers, measured anew: a network with slices of a larger one's weights needs its own.

Yu and Huang 2019, arXiv 1903.05134, section 3.3 (batch-norm calibration after training). The statistics are those of all
examples together: the mean of the batches' means, and the mean of the squares minus the square of the mean.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError


def recalibrate(
    batch_statistics: Callable[[Any], Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """Returns running statistics {layer: {"mean", "var"}} over batches of equal size.

    Args:
      batch_statistics: batch → the same of this batch alone, such as the batch_stats that a network with the momentum 0
        returns in training mode.
      batches: the batches, at least one.

    Raises:
      UserError: there is no batch.
    """
    sums, count = None, 0
    for batch in batches:
        powers = _powers(batch_statistics(batch))
        sums = powers if sums is None else _add(sums, powers)
        count += 1
    if not count:
        raise UserError("recalibrate: there is no batch: give at least one")
    return _moments(sums, count)


@jax.jit
def _powers(statistics):
    """Replaces each variance by the mean of squares."""
    return _map_layers(
        lambda mean, var: {"mean": mean, "var": var + mean * mean}, statistics
    )


@jax.jit
def _moments(sums, count):
    """Returns means and variances, from sums of means and of means of squares."""

    def moments(mean, square):
        mean, square = mean / count, square / count
        return {"mean": mean, "var": jnp.maximum(square - mean * mean, 0)}

    return _map_layers(moments, sums)


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _map_layers(fn, statistics):
    if {"mean", "var"} <= statistics.keys():
        return fn(statistics["mean"], statistics["var"])
    return {name: _map_layers(fn, value) for name, value in statistics.items()}
