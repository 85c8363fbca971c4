"""Python modules in processes of their own, and what to say when one does not come back.

Converters and runtimes are C++ that may print, hang or crash; in a process of its own such a fault becomes an error that
names the file, and the user's screen stays readable.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from squeeze_jax import stop
from squeeze_jax.errors import Reported, UserError

USER_ERROR = 3  # exit status of a child whose last line on stderr is for the user
LOOK = 0.5  # seconds between looks whether to stop
_ROOT = Path(__file__).resolve().parents[2]


class Crash(Reported, RuntimeError):
    """A converter or a runtime died, hung, or refused a file; the message is one line that names the file."""


def python(module: str, *args: object, what: str, timeout: float) -> str:
    """Runs `python -m module args` and returns what it printed on stdout.

    The child is on the CPU and inherits no settings of XLA's from this process, such as simulated devices.

    Args:
      module: dotted name of a module with a `__main__` part.
      *args: command line, made strings.
      what: how an error calls it, such as "model.tflite in its runtime".
      timeout: seconds until it is killed.

    Raises:
      UserError: the child ended with the status `USER_ERROR`.
      Crash: it ended with any other status but 0, by a signal, or not in time.
      stop.Stopped: this process was asked to stop; the child is killed.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    mine = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and k[:4] != "JAX_"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        env=mine | threads | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    stop.children.add(child.pid)
    with child:
        try:
            out, err = _communicate(child, what, timeout)
        finally:
            child.kill()
            stop.children.discard(child.pid)
    stop.check()  # Ctrl-C on a terminal ends the child too
    if child.returncode == 0:
        return out
    reason = _reason(err)
    if child.returncode == USER_ERROR:
        raise UserError(reason)
    if child.returncode < 0:
        died = f"was killed by {signal.Signals(-child.returncode).name}"
    else:
        died = f"ended with status {child.returncode}"
    raise Crash(f"{what} {died}: {reason}")


def _communicate(child, what: str, timeout: float) -> tuple[str, str]:
    """Returns what a child prints until it ends: (stdout, stderr)."""
    end = time.monotonic() + timeout
    while True:
        try:
            return child.communicate(timeout=LOOK)
        except subprocess.TimeoutExpired:
            stop.check()
            if time.monotonic() > end:
                raise Crash(f"{what} gave no answer within {timeout:g} s") from None


def _reason(stderr: str) -> str:
    """The line of a log that says most: the first with "error:" from a compiler, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if " error: " in line]
    return (said or lines[::-1] or ["it printed nothing"])[0]
