"""Runs programs one after the other where that is needed: on several CPU devices.

There XLA (jaxlib 0.10.2) does not start programs in the same order on each device. If two independent programs with
collectives are in progress, each may occupy the threads that the other waits for, until XLA ends the process.
"""

import functools
from collections.abc import Callable

import jax


def in_order(run: Callable) -> Callable:
    """Returns a function like `run` that on several CPU devices returns when its result is computed.

    Args:
      run: a jitted function, or one that returns arrays.
    """

    @functools.wraps(run)
    def wait(*args, **kwargs):
        result = run(*args, **kwargs)
        if jax.default_backend() == "cpu" and jax.device_count() > 1:
            jax.block_until_ready(result)
        return result

    return wait
