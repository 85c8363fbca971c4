"""Latency: the time a function takes on this machine, and fair comparisons of several functions.

Other processes disturb wall time, so percentiles are reported instead of means. To compare candidates, they run alternately
in one process and the median of the ratios counts: a slow period of the machine affects all of them alike.
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
    """Timings of one of several candidates that ran alternately.

    Attributes:
      median_ms: median time over the rounds.
      ratio: speedup over the first candidate: the median over rounds of (time of the first candidate / time of this one).
        Above 1 is faster than the first.
      times_ms: time of each round.
    """

    median_ms: float
    ratio: float
    times_ms: tuple[float, ...]


def measure(
    fn: Callable[..., Any], *args: Any, runs: int = 100, warmup: int = 10
) -> dict[str, float]:
    """Compiles a function, warms up, and times runs, each until its results are ready.

    Arrays that a function without arguments closes over become arguments; otherwise XLA would compute the result during
    compilation.

    Args:
      fn: a JAX function of the arguments; it is jitted here, and may be jitted already.
      *args: arrays and pytrees; they are moved to the default device before timing.
      runs: number of timed runs, at least 1.
      warmup: number of runs before the timed ones.

    Returns:
      dict(p50, p90, p99, spread): percentiles in ms, and their spread as defined by `timing.percentiles`.

    Raises:
      UserError: `runs` is below 1, or the function has no arrays to compute with.
    """
    if runs < 1:
        raise UserError(f"runs = {runs}: at least one timed run is needed")
    call.check(fn, args, {})
    if not jax.tree.leaves(args):
        fn, args = call.hoist_constants(functools.partial(fn, *args))
    args = jax.device_put(args)
    compiled = jax.jit(fn).lower(*args).compile()
    for _ in range(warmup):
        jax.block_until_ready(compiled(*args))
    return percentiles(_times(lambda: compiled(*args), runs))


def alternate(
    thunks: Mapping[str, Callable[[], Any]], rounds: int = 10, warmup: int = 1
) -> dict[str, Candidate]:
    """Times each candidate once per round, in reverse order every other round.

    Args:
      thunks: {name: function without arguments}; a call is timed until its JAX results are ready. Ratios refer to the first
        candidate. A thunk should call a jitted function with its arrays as arguments, because XLA computes results that
        depend only on constants during compilation.
      rounds: how often each candidate is timed, at least 1.
      warmup: calls of each candidate before the first round, so that nothing is compiled while timing.

    Returns:
      {name: `Candidate`}, in the order of `thunks`.

    Raises:
      UserError: no candidates, or `rounds` is below 1.
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
            float(np.median(candidate_ms)),
            float(np.median(reference / np.array(candidate_ms))),
            tuple(candidate_ms),
        )
        for name, candidate_ms in times_ms.items()
    }


def _times(thunk, runs) -> list[float]:
    """Returns the milliseconds of each run until its results are ready."""
    return times(lambda: jax.block_until_ready(thunk()), runs)
