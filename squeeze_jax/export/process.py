"""Python modules in processes of their own, and what to say when one does not come back.

Converters and runtimes are C++ that may print, hang or crash; in a process of its own such a fault becomes an error that
names the file, and the user's screen stays readable.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from squeeze_jax.errors import Reported, UserError

USER_ERROR = 3  # exit status of a child whose last line on stderr is for the user
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
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    mine = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and k[:4] != "JAX_"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            env=mine | threads | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Crash(f"{what} gave no answer within {timeout:g} s") from None
    if done.returncode == 0:
        return done.stdout
    reason = _reason(done.stderr)
    if done.returncode == USER_ERROR:
        raise UserError(reason)
    if done.returncode < 0:
        died = f"was killed by {signal.Signals(-done.returncode).name}"
    else:
        died = f"ended with status {done.returncode}"
    raise Crash(f"{what} {died}: {reason}")


def _reason(stderr: str) -> str:
    """The line of a log that says most: the first with "error:" from a compiler, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if " error: " in line]
    return (said or lines[::-1] or ["it printed nothing"])[0]
