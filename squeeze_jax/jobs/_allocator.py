"""What the C library does with memory that is freed between two training steps."""

import contextlib
import ctypes

# Parameters of mallopt(3), numbered as in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step instead of giving it back to the system.

    On a CPU, XLA allocates its temporary arrays anew for each step. By default large ones are unmapped as soon as they are
    freed, and the page faults of the next step's take up to 40% of all CPU time. The price is that the process stays
    as large as it once was. Only the first arena grows without bounds, so it has to be the only one: call this before
    jax starts its threads. Other C libraries are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(ARENA_MAX, 1)
        mallopt(MMAP_MAX, 0)  # a threshold would not reach networks that take gigabytes
        mallopt(TRIM_THRESHOLD, -1)  # never
