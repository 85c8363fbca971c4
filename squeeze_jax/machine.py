"""Explains exceptions that the machine causes, such as a full disk, or the user's own files, in one line."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from squeeze_jax import files, registry
from squeeze_jax.errors import Reported, UserError, print_any_name

_NO_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word for memory that cannot be allocated


class OutputClosed(Reported):
    """What the program prints goes nowhere: nobody reads it, as after `| head`, or its disk is full."""

    status = 128 + signal.SIGPIPE


def explain(error: BaseException) -> Reported | None:
    """Returns the line for an exception that the machine or a file of the user's own causes; None for errors of this library.

    Args:
      error: an exception that nothing has handled.
    """
    if isinstance(error, BrokenPipeError) or _fails_output(error):
        return OutputClosed(f"stopped: {describe_output(error)}")
    if files.is_full(error):
        place = _place_of(error)
        where = f" in {place}" if place else ""
        return files.DiskFull(f"no space left on the disk{where}")
    if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
        reason = (str(error).splitlines() or [""])[0].removeprefix(f"{_NO_MEMORY}: ")
        return UserError(
            f"out of memory{reason and f' ({reason})'}: choose a smaller config.batch, more parts of it by"
            " config.accumulate, or a smaller network"
        )
    if registry.is_fault_of_own(error):
        return UserError(f"{registry.describe_error(error)}; mend the file")
    if isinstance(error, OSError) and error.strerror:
        return UserError(
            ": ".join(map(str, filter(None, (error.filename, error.strerror))))
        )
    return None


def _place_of(error: BaseException | None) -> str | None:
    """Returns the file that an exception names, or one that led to it; libraries write it in their messages."""
    if error is None:
        return None
    if name := getattr(error, "filename", None):
        return os.fsdecode(name)
    named = re.search(r"(?<![\w.])/[^\s'\"\]),:]+", str(error))
    return named[0] if named else _place_of(error.__cause__ or error.__context__)


def describe_output(error: OSError) -> str:
    """Returns why the program's output failed: its reader has gone, or it cannot be written to its file."""
    if isinstance(error, BrokenPipeError):
        return "the reader of the output has gone"
    try:
        place = os.readlink(f"/proc/self/fd/{sys.__stdout__.fileno()}")
    except (OSError, ValueError):  # not Linux, or a stream without a file
        place = "its place"
    return f"cannot write the output to {place}: {error.strerror}"


def _fails_output(error: BaseException) -> bool:
    """Returns whether an exception came from printing: it names no file, and the output fails again."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    try:
        # A flush alone may succeed: what failed is not always kept.
        print(flush=True)
    except OSError:
        return True
    return False


def drop_output() -> None:
    """Sends what is printed from now on nowhere; for an output that nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno())
    os.close(nowhere)


def end(error: Reported) -> NoReturn:
    """Prints an error's line and ends the program with its status."""
    lead = "\n" if error.status > 128 else "error: "
    print(f"{lead}{error}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # at its exit Python would report it once more
        drop_output()
    if isinstance(error, files.DiskFull):
        os._exit(error.status)  # each thread of a library would report it once more
    sys.exit(error.status)


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Runs the `main` of a tool, `python -m squeeze_jax...`, and ends the program with the status that it returns.

    Ctrl-C, and what the machine causes, end it with one line.
    """
    print_any_name()
    files.expand_environment()
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (explained := explain(error)) is None:
            raise
        end(explained)
    sys.exit(status)
