"""Runs an exported file in its own runtime: in this process, or alone in a fresh one on one core to measure it.

    python -m squeeze_jax.export.runtime model.tflite --images=x.npy --runs=100
    python -m squeeze_jax.export.runtime model.tflite --examples=named_arrays.npz

**Latency**: batch 1, one core, one thread; warm-up runs, then N timed ones with Python's garbage collector off. Copying the
inputs in and quantizing them is not timed.

**Peak memory**: growth of the resident set, from just before the file is opened to its maximum after the timed runs at batch
1. The runtime's library and the examples are loaded before, and a first program is compiled where the runtime compiles, so
that growth belongs to the file: its weights, its program, its activations, and for StableHLO XLA's memory while compiling.
On Linux the kernel's high-water mark is reset before opening (`/proc/self/clear_refs`); elsewhere, and where that is
forbidden, the mark since the process began is used, and growth below an earlier maximum is not seen.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.cost import timing
from squeeze_jax.errors import UserError
from squeeze_jax.export import class_names, process
from squeeze_jax.export.runnable import Runnable, cast, fitted, opened, outputs

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class File:
    """An exported file, opened by `load`; call it with examples.

    Attributes:
      runnable: the file in its runtime.
      batch: examples at a time where the file takes any number.
      classes: names of the classes, in the order of its logits; () where the file has none.
    """

    runnable: Runnable
    batch: int
    classes: tuple[str, ...]

    def __call__(self, examples: Any) -> np.ndarray | dict[str, np.ndarray]:
        """Returns the file's output, float32 [n, ...], or {name: output} of several.

        Args:
          examples: {name: [n, ...]}, or the array alone where the file has one input, such as pixels 0..255 [n, h, w, c].

        Raises:
          UserError: other examples than the file takes.
        """
        return _alone(outputs(self.runnable, examples, self.batch))


def load(path: str | Path, *, batch: int = 64, threads: int | None = None) -> File:
    """Opens an exported file in this process.

    Args:
      path: a `.stablehlo` or `.tflite` file.
      batch: examples at a time where the file takes any number.
      threads: CPU threads of LiteRT, all cores by default.

    Returns:
      A function of examples, see `File`.

    Raises:
      UserError: the file is missing, damaged or of no known format.
    """
    return File(opened(path, threads), batch, class_names.read(path))


def _alone(found: dict[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
    """Returns the array of one output, or all by name."""
    return found if len(found) > 1 else next(iter(found.values()))


def run(
    path: str | Path, examples, *, runs=0, warmup=10, batch=1, timeout=600.0
) -> dict:
    """Runs a file on examples in a fresh process pinned to one core.

    Args:
      path: the file.
      examples: as the function that `load` returns takes them.
      runs: timed runs at batch 1; with 0 nothing is measured.
      warmup: runs before them.
      batch: examples at a time for the outputs.
      timeout: seconds until the process is killed.

    Returns:
      dict(outputs: {name: array [n, ...]}, runtime, bytes), and with runs > 0 also
      times_ms: [runs], peak_memory_mb, open_ms, core.

    Raises:
      UserError: the file is missing, damaged, of no known format, or takes other examples.
      process.Crash: the runtime died or hung.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = written(examples, scratch), Path(scratch, "found.npz")
        printed = process.python(
            "squeeze_jax.export.runtime",
            *(path, f"--examples={given}", f"--outputs={found}"),
            *(f"--runs={runs}", f"--warmup={warmup}", f"--batch={batch}"),
            what=f"{path} in its own runtime",
            timeout=timeout,
        )
        results = read(found)
    return json.loads(printed.splitlines()[-1]) | {"outputs": results}


def written(examples: Any, folder: str | Path) -> Path:
    """Writes examples for a child to `read`, and returns the file."""
    if isinstance(examples, Mapping):
        path = Path(folder, "examples.npz")
        np.savez(path, **{name: np.asarray(a) for name, a in examples.items()})
    else:
        path = Path(folder, "examples.npy")
        np.save(path, np.asarray(examples))
    return path


def read(path: str | Path) -> Any:
    """The array of a `.npy` file, or {name: array} of an `.npz` file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        found = np.load(path)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return dict(found)
    except (OSError, ValueError, EOFError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else "it is no .npy or .npz"
        raise UserError(f"cannot read examples from {path}: {said}") from None


def measure(
    path: str | Path,
    examples,
    labels=None,
    *,
    runs: int = 100,
    warmup: int = 10,
    timeout: float = 1800.0,
) -> dict:
    """Measures a file on one core of a fresh process, and its accuracy where there are labels.

    Args:
      path: the file.
      examples: as the function that `load` returns takes them.
      labels: [n] classes, or None; for a file of one output, whose last axis is the classes.
      runs: timed runs at batch 1.
      warmup: runs before them.
      timeout: seconds until the process is killed.

    Returns:
      dict(accuracy: float or None, latency_ms={p50, p90, p99}, peak_memory_mb, open_ms, bytes, runtime, core,
      outputs: [n, ...], or {name: output} of several); MB are 10^6 bytes.

    Raises:
      As `run`.
    """
    found = run(path, examples, runs=max(runs, 1), warmup=warmup, timeout=timeout)
    logits = _alone(found.pop("outputs"))
    spread = timing.percentiles(found.pop("times_ms"))
    right = None if labels is None else logits.argmax(-1) == np.asarray(labels)
    return found | {
        "accuracy": None if right is None else float(right.mean()),
        "latency_ms": {k: spread[k] for k in ("p50", "p90", "p99")},
        "outputs": logits,
    }


def main(argv: list[str] | None = None) -> int:
    """The child: prints one line of JSON, and writes the outputs where it is told."""
    parser = argparse.ArgumentParser("squeeze_jax.export.runtime", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "file", type=os.path.expanduser, help="a .stablehlo or .tflite file"
    )
    parser.add_argument(
        *("--examples", "--images"),
        type=os.path.expanduser,
        required=True,
        help=".npz of an array [n, ...] for each input, or .npy, such as pixels [n, h, w, c]",
    )
    parser.add_argument(
        "--outputs", help="runs all examples, their outputs go here, .npz"
    )
    parser.add_argument("--runs", type=int, default=100, help="timed runs at batch 1")
    parser.add_argument("--warmup", type=int, default=10, help="runs before them")
    parser.add_argument("--batch", type=int, default=1, help="examples at a time")
    args = parser.parse_args(argv)
    try:
        cores = pin()
        examples = read(args.examples)
        _wake(Path(args.file))
        found = {"bytes": _size(args.file)}
        if args.runs:
            runnable, measured = _measured(args.file, examples, args.runs, args.warmup)
            found |= measured | {"core": cores[0] if cores else None}
        else:
            runnable = opened(args.file, threads=1)
        found["runtime"] = runnable.runtime
        if args.outputs:
            np.savez(args.outputs, **outputs(runnable, examples, args.batch))
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    print(json.dumps(found))
    return 0


def _measured(path, examples, runs, warmup):
    """The opened file and dict(times_ms, open_ms, peak_memory_mb)."""
    before = _reset_peak()
    start = time.perf_counter()
    runnable = opened(path, threads=1)
    arrays = fitted(examples, runnable.inputs)
    first = cast(arrays, runnable.inputs, slice(1))
    outputs(runnable, first, 1)
    open_ms = 1e3 * (time.perf_counter() - start)
    once = runnable.timed(first)
    for _ in range(warmup):
        once()
    times_ms = timing.times(once, runs)
    peak = max(_peak() - before, 0) / MEGABYTE
    return runnable, dict(times_ms=times_ms, open_ms=open_ms, peak_memory_mb=peak)


def _size(path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def pin(cores: int = 1) -> tuple[int, ...] | None:
    """Confines this process and its later threads to some cores, the one it is on first; None where the system cannot.

    To be called before JAX is imported: its threads are then as many as the cores, and on one core operations are not split.
    """
    if cores == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    try:  # the 39th field: the scheduler has just put this process on an idle core
        first = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
        at = allowed.index(first)
    except (OSError, ValueError, IndexError):
        at = 0
    chosen = (allowed[at:] + allowed[:at])[:cores]
    os.sched_setaffinity(0, chosen)
    return tuple(chosen)


def _wake(path: Path) -> None:
    """Loads the runtime, so that its own memory is not counted as the file's."""
    if path.suffix == ".stablehlo":
        import jax

        jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8, np.float32)))
    elif path.suffix == ".tflite":
        try:
            import ai_edge_litert.interpreter  # noqa: F401
        except ImportError:
            return  # opening the file says what to install


def _reset_peak() -> int:
    """Gives free heap back, resets the high-water mark where that is allowed, and returns the resident bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """The high-water mark of the resident set, bytes."""
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    sys.exit(main())
