"""The timing loop of every measurement. It does not import JAX, so runtimes of exported files can be timed without it."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from squeeze_jax import stop


def times(run: Callable[[], Any], runs: int) -> list[float]:
    """Returns the milliseconds of each run, with Python's garbage collector off.

    Args:
      run: a function without arguments that returns when its work is done.
      runs: number of calls.

    Raises:
      stop.Stopped: the program was asked to stop.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        # Allocated before the loop, so that timing allocates nothing.
        times_ns = np.empty(runs, np.int64)
        for i in range(runs):
            stop.check()
            start = time.perf_counter_ns()
            run()
            times_ns[i] = time.perf_counter_ns() - start
        return (times_ns / 1e6).tolist()
    finally:
        if enabled:
            gc.enable()


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """Returns dict(p50, p90, p99, spread) of times in ms.

    The spread is (p90 - p10) / p50: about 0.02 on an idle machine. Above 0.5 the machine was busy and p50 is unreliable.

    Raises:
      ValueError: `times_ms` is empty.
    """
    if not len(times_ms):
        raise ValueError("no times to take percentiles of")
    p10, p50, p90, p99 = map(float, np.percentile(times_ms, [10, 50, 90, 99]))
    return dict(p50=p50, p90=p90, p99=p99, spread=(p90 - p10) / p50)
