"""Runs Python modules in child processes, and explains a child that fails.

Converters and runtimes are C++ code that may print, hang or crash. In a child process such a fault becomes an error that
names the file, and the user's terminal stays readable.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from squeeze_jax import stop
from squeeze_jax.errors import Reported, UserError

USER_ERROR = 3  # exit status of a child whose last line on stderr is an error message for the user
POLL_SECONDS = 0.5  # interval of checks whether this process should stop
_ROOT = Path(__file__).resolve().parents[2]


class Crash(Reported, RuntimeError):
    """A converter or runtime crashed, hung, or rejected a file; the message is one line that names the file."""


def run_module(
    module: str,
    *args: object,
    what: str,
    timeout: float,
    poll: Callable[[], None] = lambda: None,
) -> str:
    """Runs `python -m module args` in a child process and returns its stdout.

    The child runs on the CPU and does not inherit this process's XLA settings, such as simulated devices.

    Args:
      module: dotted name of a module with a `__main__` part.
      *args: command-line arguments, converted to strings.
      what: name of the task in error messages, such as "model.tflite in its runtime".
      timeout: seconds until the child is killed.
      poll: called twice a second while the child runs, such as to show progress.

    Raises:
      UserError: the child exited with status `USER_ERROR`.
      Crash: the child exited with another nonzero status, was killed by a signal, or did not finish in time.
      stop.Stopped: this process was asked to stop; the child is killed.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and k[:4] != "JAX_"
    }
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        env=environment | threads | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    stop.children.add(child.pid)
    with child:
        try:
            out, err = _communicate(child, what, timeout, poll)
        finally:
            child.kill()
            stop.children.discard(child.pid)
    stop.check()  # Ctrl-C on a terminal ends the child too
    if child.returncode == 0:
        return out
    reason = _reason(err)
    if child.returncode == USER_ERROR:
        raise UserError(reason.removeprefix("error: "))
    if child.returncode < 0:
        ending = f"was killed by {signal.Signals(-child.returncode).name}"
    else:
        ending = f"ended with status {child.returncode}"
    raise Crash(f"{what} {ending}: {reason}")


def _communicate(child, what: str, timeout: float, poll) -> tuple[str, str]:
    """Waits for a child to end and returns its (stdout, stderr)."""
    end = time.monotonic() + timeout
    while True:
        try:
            return child.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            stop.check()
            poll()
            if time.monotonic() > end:
                raise Crash(f"{what} gave no answer within {timeout:g} s") from None


def _reason(stderr: str) -> str:
    """Returns the most informative line of a log: the first one with "error:", as compilers print it, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if " error: " in line]
    return (errors or lines[::-1] or ["it printed nothing"])[0]
