"""Latency: what a function takes on this machine, and how several compare under the same conditions.

Wall time varies with everything else the machine does, so percentiles are reported, not means; and candidates are compared
by alternating them within one run and taking the median of the ratios, which a slow spell hits alike.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax.cost import call
from squeeze_jax.cost.timing import percentiles, times
from squeeze_jax.errors import UserError


class Candidate(NamedTuple):
    """One of several that were alternated.

    Attributes:
      median_ms: median time of a round.
      ratio: median over rounds of (time of the first candidate / this one's time): above 1 is faster than the first.
      times_ms: each round's.
    """

    median_ms: float
    ratio: float
    times_ms: tuple[float, ...]


def measure(
    fn: Callable[..., Any], *args: Any, runs: int = 100, warmup: int = 10
) -> dict[str, float]:
    """Compiles a function, warms up, and times runs until their results are there.

    Arrays that a function without arguments closes over become arguments: else XLA computes the result while it compiles.

    Args:
      fn: a jax function of the arguments; jitted here (once more costs nothing).
      *args: arrays and pytrees; they are put on the default device before.
      runs: timed runs, at least 1.
      warmup: runs before them.

    Returns:
      dict(p50, p90, p99, spread): ms, and the spread as in `percentiles`.

    Raises:
      UserError: no runs, or a function that has no arrays to compute with.
    """
    if runs < 1:
        raise UserError(f"runs = {runs}: at least one timed run is needed")
    call.check(fn, args, {})
    if not jax.tree.leaves(args):
        fn, args = call.hoisted(functools.partial(fn, *args))
    args = jax.device_put(args)
    compiled = jax.jit(fn).lower(*args).compile()
    for _ in range(warmup):
        jax.block_until_ready(compiled(*args))
    return percentiles(_times(lambda: compiled(*args), runs))


def alternate(
    thunks: Mapping[str, Callable[[], Any]], rounds: int = 10, warmup: int = 1
) -> dict[str, Candidate]:
    """Times candidates in turn, round by round, every other round in reverse order.

    Args:
      thunks: functions of nothing by name; jax results are waited for. The first is what ratios refer to. A thunk calls
        a jitted function with its arrays as arguments: XLA computes what depends on constants alone while it compiles.
      rounds: how often each is timed, at least 1.
      warmup: calls of each before, so that nothing is compiled while timing.

    Returns:
      A `Candidate` for each name, in the given order.
    """
    if rounds < 1 or not thunks:
        raise UserError(
            f"alternate needs candidates and rounds ≥ 1, got {len(thunks)} and {rounds}"
        )
    for thunk in thunks.values():
        for _ in range(warmup):
            jax.block_until_ready(thunk())
    times_ms = {name: [] for name in thunks}
    for i in range(rounds):
        for name in list(thunks)[:: -1 if i % 2 else 1]:
            times_ms[name] += _times(thunks[name], 1)
    reference = np.array(times_ms[next(iter(thunks))])
    return {
        name: Candidate(
            float(np.median(taken)),
            float(np.median(reference / np.array(taken))),
            tuple(taken),
        )
        for name, taken in times_ms.items()
    }


def _times(thunk, runs) -> list[float]:
    """Milliseconds of each run until its results are there."""
    return times(lambda: jax.block_until_ready(thunk()), runs)
