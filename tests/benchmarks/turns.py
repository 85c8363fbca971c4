"""Candidates that take turns on one machine, each a process that is stopped while it is not its turn.

A stopped process (SIGSTOP, to the whole group of it and its workers) neither spins in a thread pool that waits for work,
as OpenMP's do by default, nor fills its queues of prepared input at the other's expense. So every candidate may use all
cores in its own best way, no setting such as OMP_WAIT_POLICY or KMP_BLOCKTIME is needed, and what input costs is paid
within the turn. For POSIX systems.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

PATIENCE = 20  # seconds


class Turns:
    """Starts a process for each candidate and lets one at a time run.

    Use as a context manager; leaving it ends the processes and whatever they started.

    Attributes:
      ready: what each candidate said first, by name.
    """

    def __init__(self, candidates: Mapping[str, tuple[Callable, tuple]]):
        """Starts the candidates, one after the other, until each has said its first word.

        Args:
          candidates: (function of a module, its arguments but the first) by name. The first argument it gets is
            `turn`: `turn(word)` hands over a picklable word and returns when it is this candidate's turn again.

        Raises:
          RuntimeError: a candidate ended; its traceback is on stderr.
        """
        self.ready, self._processes, self._pipes = {}, {}, {}
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        context = multiprocessing.get_context("spawn")
        try:
            for name, (function, arguments) in candidates.items():
                here, there = context.Pipe()
                process = context.Process(
                    target=_begin, args=(there, function, arguments), name=str(name)
                )
                process.start()
                there.close()
                self._processes[name], self._pipes[name] = process, here
                self.ready[name] = self._hear(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def take(self, name: str) -> Any:
        """Lets one candidate run until its next word, and returns that."""
        self._signal(self._processes[name], signal.SIGCONT)
        self._pipes[name].send(None)
        return self._hear(name)

    def close(self) -> None:
        """Ends all, in peace where they can, so that they remove what they have outside their memory."""
        for name, process in self._processes.items():
            self._pipes[name].close()
            self._signal(process, signal.SIGCONT)
        for process in self._processes.values():
            process.join(PATIENCE)
            self._signal(process, signal.SIGKILL)
            process.join()

    def _hear(self, name: str) -> Any:
        process = self._processes[name]
        try:
            word = self._pipes[name].recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"{name} ended with exit status {process.exitcode}"
            ) from None
        self._signal(process, signal.SIGSTOP)
        return word

    @staticmethod
    def _signal(process, number: int) -> None:
        for send in (os.killpg, os.kill):  # at first it is in no group of its own
            with contextlib.suppress(ProcessLookupError):
                return send(process.pid, number)


def once(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _begin(pipe, function: Callable, arguments: tuple) -> None:
    # In the parent's session but not its group: should the parent die, the kernel ends a stopped group by SIGHUP.
    os.setpgid(0, 0)

    def turn(word):
        pipe.send(word)
        try:
            pipe.recv()
        except EOFError:
            sys.exit()

    function(turn, *arguments)
