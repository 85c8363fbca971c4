"""A request to stop (Ctrl-C or SIGTERM): a flag that long work looks at in safe places.

An exception raised by a signal handler can come up in any line, also in a callback of a library, which may drop it or
crash. So the first request only sets a flag, which `check` turns into `Stopped` between two steps, files or examples. A
second request ends the process at once; files are written whole (`files.write`), so what is on disk is whole either way.
Signals that come together are one request: `timeout` and some schedulers send two.

Python runs its signal handlers between two of its own instructions, and not while a compiler works. So a thread watches
the signals: the second request is heard at any time.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from squeeze_jax.errors import Reported

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 0.03  # seconds
_NOTE = b"\nstopping at the next safe place; once more to end at once\n"

children: set[int] = set()  # processes that end with this one

_received = 0
_reason = ""
_listening = False


class Stopped(Reported):
    """The work was asked to stop, and left nothing half done."""

    def __init__(
        self,
        number: int,
        message: str = "stopped; the same command goes on from what was saved",
    ):
        super().__init__(_reason + message)
        self.status = 128 + number


def request(number: int, reason: str = "") -> None:
    """Asks the work to stop, as the signal of that number would.

    Args:
      number: of the signal.
      reason: why, for the line that ends the program.
    """
    global _received, _reason
    if not _received:
        _received, _reason = number, f"{reason}; " if reason else ""


def reason() -> str:
    """Returns why the work was asked to stop, ready to begin a line: "" or a text that ends in "; "."""
    return _reason


def requested() -> int:
    """Returns the number of the signal that asks to stop; 0 for none."""
    return _received


def check() -> None:
    """Raises `Stopped` where a stop was requested; to be called where nothing is half done."""
    if _received:
        raise Stopped(_received)


def check_done() -> None:
    """Raises `Stopped` where a stop was requested too late, because all work is done."""
    if _received:
        raise Stopped(
            _received, "asked to stop when all was done; nothing is left to do"
        )


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into the flag within this context.

    Outside of the main thread signals stay with whoever handles them.
    """
    global _listening, _received, _reason
    if _listening:
        listen_again()
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {n: signal.signal(n, _ignored) for n in SIGNALS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read,), daemon=True)
    watcher.start()
    _listening, _received, _reason = True, 0, ""
    try:
        yield
    finally:
        _listening, _received, _reason = False, 0, ""
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        watcher.join()


def listen_again() -> None:
    """Takes the signals back within `listening`; JAX' service of several processes takes SIGTERM for itself."""
    if _listening and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _ignored)


def _ignored(number, frame):
    """Handles a signal by doing nothing, because `_watch` reads the signal's byte from the pipe."""


def _watch(read: int) -> None:
    """Notes the first request and ends the process at the second, until the other end is closed."""
    global _received
    first = 0.0
    with os.fdopen(read, "rb", buffering=0) as signals:
        while numbers := signals.read(64):
            number = next((n for n in numbers if n in SIGNALS), 0)
            if not number:
                continue
            if not _received:
                _received, first = number, time.monotonic()
                with contextlib.suppress(OSError):
                    os.write(2, _NOTE)
            elif time.monotonic() - first > TOGETHER:
                for child in tuple(children):
                    with contextlib.suppress(OSError):
                        os.kill(child, signal.SIGKILL)
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                os._exit(128 + number)
