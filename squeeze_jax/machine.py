"""Explains exceptions that the machine causes, such as a full disk or too little memory, in one line."""

import os
import signal
import sys

from squeeze_jax import files
from squeeze_jax.errors import Reported, UserError

_NO_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word for memory that cannot be allocated


class OutputClosed(Reported):
    """Nobody reads what the program prints, as after `| head`."""

    status = 128 + signal.SIGPIPE


def explain(error: BaseException) -> Reported | None:
    """Returns the line for an exception that the machine causes; None for others, which are errors of the code.

    Args:
      error: an exception that nothing has handled.
    """
    if files.is_full(error):
        place = getattr(error, "filename", None)
        where = f" in {place}" if place else ""
        return files.DiskFull(f"no space left on the disk{where}")
    if isinstance(error, BrokenPipeError):
        return OutputClosed("stopped: the reader of the output has gone")
    if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
        reason = (str(error).splitlines() or [""])[0].removeprefix(f"{_NO_MEMORY}: ")
        return UserError(
            f"out of memory{reason and f' ({reason})'}: choose a smaller config.batch, more parts of it by"
            " config.accumulate, or a smaller network"
        )
    if isinstance(error, OSError) and error.strerror:
        return UserError(
            ": ".join(map(str, filter(None, (error.filename, error.strerror))))
        )
    return None


def drop_output() -> None:
    """Sends what is printed from now on nowhere; for an output that nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno())
    os.close(nowhere)
