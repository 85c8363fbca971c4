"""Runs an exported file in its own runtime: in this process, or in a child process on one core to measure it.

    python -m squeeze_jax.export.runtime model.tflite --images=x.npy --runs=100
    python -m squeeze_jax.export.runtime model.tflite --examples=named_arrays.npz

**Latency**: batch 1, one core, one thread. After warm-up runs, N runs are timed with Python's garbage collector off. Copying
and quantizing the inputs is not timed.

**Peak memory**: growth of the resident set, from just before the file is opened to its maximum after the timed runs at batch
1. The runtime's library and the examples are loaded before, and where the runtime compiles, a first program is compiled. So
the growth belongs to the file: its weights, program and activations, and for StableHLO XLA's memory during compilation. On
Linux the kernel's high-water mark is reset before opening (`/proc/self/clear_refs`). Elsewhere, and where that is forbidden,
the high-water mark since the start of the process is used, and growth below an earlier maximum is not seen.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files, machine
from squeeze_jax.cost import timing
from squeeze_jax.errors import UserError
from squeeze_jax.export import class_names, process
from squeeze_jax.export.runnable import (
    Runnable,
    cast_rows,
    check_examples,
    compute_outputs,
    format_of,
    open_file,
)

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class File:
    """An exported file, opened by `load`; call it with examples.

    Attributes:
      runnable: the file in its runtime.
      batch: batch size if the file accepts any.
      classes: class names, in the order of its logits; () if the file has none.
    """

    runnable: Runnable
    batch: int
    classes: tuple[str, ...]

    def __call__(self, examples: Any) -> np.ndarray | dict[str, np.ndarray]:
        """Returns the file's output, float32 [n, ...], or {name: output} if it has several.

        Args:
          examples: {name: [n, ...]}; for a file with one input also the array itself, such as pixels 0..255 [n, h, w, c].

        Raises:
          UserError: the examples do not match the file's inputs.
        """
        return _unwrap_single(compute_outputs(self.runnable, examples, self.batch))


def load(path: str | Path, *, batch: int = 64, threads: int | None = None) -> File:
    """Opens an exported file in this process.

    Args:
      path: a StableHLO or TFLite file; see `runnable.format_of`.
      batch: batch size if the file accepts any.
      threads: CPU threads of LiteRT; all cores by default.

    Returns:
      A function of examples, see `File`.

    Raises:
      UserError: the file is missing, damaged or of an unknown format.
    """
    return File(open_file(path, threads), batch, class_names.read(path))


def _unwrap_single(
    outputs: dict[str, np.ndarray],
) -> np.ndarray | dict[str, np.ndarray]:
    """Returns the array if there is one output, otherwise {name: output}."""
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def run(
    path: str | Path, examples, *, runs=0, warmup=10, batch=1, timeout=600.0
) -> dict:
    """Runs a file on examples in a fresh process pinned to one core.

    Args:
      path: the file.
      examples: as for the function that `load` returns.
      runs: number of timed runs at batch 1; with 0 nothing is measured.
      warmup: runs before the timed ones.
      batch: batch size for the outputs.
      timeout: seconds until the process is killed.

    Returns:
      dict(outputs: {name: array [n, ...]}, runtime, bytes), and with runs > 0 also
      times_ms: [runs], peak_memory_mb, open_ms, core.

    Raises:
      UserError: the file is missing, damaged or of an unknown format, or the examples do not match its inputs.
      process.Crash: the runtime died or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        examples_path = write_examples(examples, folder)
        outputs_path = Path(folder, "outputs.npz")
        printed = process.run_module(
            "squeeze_jax.export.runtime",
            *(path, f"--examples={examples_path}", f"--outputs={outputs_path}"),
            *(f"--runs={runs}", f"--warmup={warmup}", f"--batch={batch}"),
            what=f"{path} in its own runtime",
            timeout=timeout,
        )
        outputs = read_arrays(outputs_path)
    return json.loads(printed.splitlines()[-1]) | {"outputs": outputs}


def write_examples(examples: Any, folder: str | Path) -> Path:
    """Writes examples to a file in a folder, from which a child process reads them, and returns its path."""
    if isinstance(examples, Mapping):
        path = Path(folder, "examples.npz")
        np.savez(path, **{name: np.asarray(a) for name, a in examples.items()})
    else:
        path = Path(folder, "examples.npy")
        np.save(path, np.asarray(examples))
    return path


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an `.npz` file; raises a UserError if it cannot be written."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    files.write(path, content.getvalue())


def read_arrays(path: str | Path) -> Any:
    """Reads the array of a `.npy` file, or {name: array} of an `.npz` file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        content = np.load(path)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return dict(content)
    except (OSError, ValueError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is no .npy or .npz"
        raise UserError(f"cannot read examples from {path}: {reason}") from None


def measure(
    path: str | Path,
    examples,
    labels=None,
    *,
    runs: int = 100,
    warmup: int = 10,
    timeout: float = 1800.0,
) -> dict:
    """Measures a file on one core in a fresh process, and its accuracy if there are labels.

    Args:
      path: the file.
      examples: as for the function that `load` returns.
      labels: [n] classes, for a file with one output whose last axis holds the class scores; or None.
      runs: number of timed runs at batch 1.
      warmup: runs before the timed ones.
      timeout: seconds until the process is killed.

    Returns:
      dict(accuracy: float or None, latency_ms={p50, p90, p99}, peak_memory_mb, open_ms, bytes, runtime, core,
      outputs: [n, ...], or {name: output} of several); MB are 10^6 bytes.

    Raises:
      UserError, process.Crash: as for `run`.
    """
    results = run(path, examples, runs=max(runs, 1), warmup=warmup, timeout=timeout)
    logits = _unwrap_single(results.pop("outputs"))
    percentiles = timing.percentiles(results.pop("times_ms"))
    correct = None if labels is None else logits.argmax(-1) == np.asarray(labels)
    return results | {
        "accuracy": None if correct is None else float(correct.mean()),
        "latency_ms": {k: percentiles[k] for k in ("p50", "p90", "p99")},
        "outputs": logits,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs a file as a command: prints its measurements as one line of JSON, and writes its outputs to `--outputs`."""
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
        "--outputs",
        type=os.path.expanduser,
        help="runs all examples, their outputs go here, .npz",
    )
    parser.add_argument("--runs", type=int, default=100, help="timed runs at batch 1")
    parser.add_argument("--warmup", type=int, default=10, help="runs before them")
    parser.add_argument("--batch", type=int, default=1, help="examples at a time")
    args = parser.parse_args(argv)
    try:
        if args.outputs:
            files.check_writable(args.outputs, "--outputs")
        cores = pin()
        examples = read_arrays(args.examples)
        _load_runtime(Path(args.file))
        results = {"bytes": _size(args.file)}
        if args.runs:
            runnable, measured = _measure(args.file, examples, args.runs, args.warmup)
            results |= measured | {"core": cores[0] if cores else None}
        else:
            runnable = open_file(args.file, threads=1)
        results["runtime"] = runnable.runtime
        if args.outputs:
            outputs = compute_outputs(runnable, examples, args.batch)
            write_arrays(args.outputs, outputs)
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    print(json.dumps(results))
    return 0


def _measure(path, examples, runs, warmup):
    """Opens a file, measures it, and returns (opened file, dict(times_ms, open_ms, peak_memory_mb))."""
    bytes_before = _reset_peak()
    start = time.perf_counter()
    runnable = open_file(path, threads=1)
    arrays = check_examples(examples, runnable.inputs)
    first = cast_rows(arrays, runnable.inputs, slice(1))
    compute_outputs(runnable, first, 1)
    open_ms = 1e3 * (time.perf_counter() - start)
    once = runnable.timed(first)
    for _ in range(warmup):
        once()
    times_ms = timing.times(once, runs)
    peak = max(_peak_bytes() - bytes_before, 0) / MEGABYTE
    return runnable, dict(times_ms=times_ms, open_ms=open_ms, peak_memory_mb=peak)


def _size(path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def pin(cores: int = 1) -> tuple[int, ...] | None:
    """Pins this process and its future threads to some cores, starting with the core that it runs on.

    Call it before JAX is imported: JAX then has as many threads as cores, and on one core it does not split operations.

    Returns:
      The cores, or None if the system cannot pin processes.
    """
    if cores == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    try:  # field 39 is the current core; the scheduler has just put this process on an idle one
        first = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
        start = allowed.index(first)
    except (OSError, ValueError, IndexError):
        start = 0
    pinned = (allowed[start:] + allowed[:start])[:cores]
    os.sched_setaffinity(0, pinned)
    return tuple(pinned)


def _load_runtime(path: Path) -> None:
    """Loads the runtime, so that its own memory does not count as the file's."""
    key = format_of(path) if path.is_file() else None
    if key == "stablehlo":
        import jax

        jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8, np.float32)))
    elif key == "tflite":
        try:
            import ai_edge_litert.interpreter  # noqa: F401
        except ImportError:
            return  # opening the file raises an error that names the package to install


def _reset_peak() -> int:
    """Returns free heap to the system, resets the high-water mark if allowed, and returns the resident bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    """Returns the high-water mark of the resident set in bytes."""
    try:
        return _status_bytes("VmHWM")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    machine.run_tool(main)
