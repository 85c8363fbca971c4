"""Latency: the time a function takes on this machine, and fair comparisons of several functions.

Other processes disturb wall time, so percentiles are reported instead of means. To compare candidates, they run alternately
in one process and the median of the ratios counts: a slow period of the machine affects all of them alike.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from squeeze_jax.cost import call
from squeeze_jax.cost.timing import percentiles, times
from squeeze_jax.errors import UserError, shortened


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
      UserError: `runs` is below 1, `warmup` is negative, or the function is none of JAX or has no arrays to compute with.
    """
    _check_counts(runs=runs, warmup=warmup)
    if not callable(fn):
        raise UserError(
            f"{shortened(repr(fn), 60)} is no function: give a JAX function"
        )
    if isinstance(fn, nn.Module):
        raise UserError(
            "a Linen module is no function: give its apply, with the variables as the first argument"
        )
    if hasattr(fn, "runnable"):
        raise UserError(
            "an exported file runs outside of JAX: python -m squeeze_jax.export.runtime measures it"
        )
    call.check(fn, args, {})
    if not jax.tree.leaves(args):
        fn, args = call.hoist_constants(functools.partial(fn, *args))
    args = jax.device_put(args)
    compiled = jax.jit(fn).lower(*args).compile()
    for _ in range(warmup):
        jax.block_until_ready(compiled(*args))
    return percentiles(_times(lambda: compiled(*args), runs))


def _check_counts(warmup: int, **counts: int) -> None:
    """Raises a UserError for a number of warm-up runs below 0, or a number of timed runs below 1."""
    for name, count, least in (
        *((n, c, 1) for n, c in counts.items()),
        ("warmup", warmup, 0),
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise UserError(
                f"{name} = {count!r} should be a whole number, at least {least}"
            )


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
    _check_counts(rounds=rounds, warmup=warmup)
    if (
        not isinstance(thunks, Mapping)
        or not thunks
        or not all(map(callable, thunks.values()))
    ):
        raise UserError(
            f"{shortened(repr(thunks), 60)}: give a dict of functions without arguments, such as {{'mine': lambda: net(x)}}"
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
