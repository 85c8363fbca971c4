"""What each operator of a LiteRT file takes, from the runtime's own profiler, alone in a fresh process on one core.

    python -m squeeze_jax.export.operators model.tflite --runs=100

LiteRT's Python package has no way to its profiler, and the delegate that runs networks on CPUs, XNNPACK, takes the whole
graph as one operator; but the library in that package reports what is inside, so it is called through its C interface.
That is no documented part of the package: it is used with exactly the version that requirements.txt asks for, and in a
process of its own, where a fault is an error and not the end of this one.

  * XNNPACK counts whole microseconds, and drops what is left: an operator takes up to one more than it says, and what
    takes less may read 0. What is missing from the whole is stated, never spread over the others; of a network that
    takes some microseconds an operator it is most.
  * An operator's layer is in the names of its file's tensors, where `export.make` has put it. XNNPACK's operators are
    matched with the file's as `matching` tells; one that has no counterpart belongs to no layer, and a line counts these.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax.cost import timing
from squeeze_jax.errors import UserError, print_any_name
from squeeze_jax.export import litert_c, process, runtime
from squeeze_jax.export.formats.tflite import (
    dequantize,
    quantize,
    shares_batch,
    signature,
    signature_of,
)
from squeeze_jax.export.matching import Node, matched, unmatched
from squeeze_jax.export.runnable import Spec, fitted, opened


class Operators(NamedTuple):
    """What was found; the operators and `elsewhere_ms` add up to the mean of the profiled runs.

    Attributes:
      operators: (name, layer or None, ms) of each, in the order they run.
      elsewhere_ms: of a profiled run, but of no operator: rounding, calling, and the profiler itself, which takes some
        microseconds an operator outside of what it says.
      profiled_ms: a run with the profiler.
      latency_ms: dict(p50, p90, p99, spread) without it.
      outputs: of the example, {name: [1, ...]}, to compare.
      core: the CPU's that it ran on, or None.
      unmatched: convolutions and other products whose layer is not to be told, see `matching.unmatched`.
    """

    operators: tuple[tuple[str, str | None, float], ...]
    elsewhere_ms: float
    profiled_ms: float
    latency_ms: dict[str, float]
    outputs: dict[str, np.ndarray]
    core: int | None
    unmatched: int = 0

    def by_layer(self) -> dict[str | None, float]:
        """{layer: ms}, None for what belongs to none."""
        found = {}
        for _, layer, ms in self.operators:
            found[layer] = found.get(layer, 0.0) + ms
        return found


def measure(
    path: str | Path,
    example: Any,
    *,
    runs: int = 100,
    warmup: int = 10,
    timeout: float = 600.0,
) -> Operators:
    """Measures the operators of a `.tflite` file on one core, in a process of its own.

    Args:
      path: the file.
      example: {name: [1, ...]}, or the array of a file with one input, such as pixels 0..255 [1, h, w, c].
      runs: with the profiler, and as many without.
      warmup: runs before both.
      timeout: seconds until the process is killed.

    Raises:
      UserError: no such file, another version of LiteRT, an example of another shape.
      process.Crash: the runtime died.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = runtime.written(example, scratch), Path(scratch, "found.npz")
        printed = process.python(
            "squeeze_jax.export.operators",
            *(path, f"--example={given}", f"--outputs={found}"),
            *(f"--runs={runs}", f"--warmup={warmup}"),
            what=f"{path} in LiteRT's profiler",
            timeout=timeout,
        )
        outputs = runtime.read(found)
    said = json.loads(printed.splitlines()[-1])
    said["operators"] = tuple(map(tuple, said["operators"]))
    times = timing.percentiles(said.pop("times_ms"))
    return Operators(**said, latency_ms=times, outputs=outputs)


def main(argv: list[str] | None = None) -> int:
    """Prints a table; as the child of `measure`, with --outputs, one line of JSON, and writes the outputs there."""
    parser = argparse.ArgumentParser(
        "squeeze_jax.export.operators", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=os.path.expanduser, help="a .tflite file")
    parser.add_argument(
        *("--example", "--image"),
        type=os.path.expanduser,
        help=".npz of an array [1, ...] for each input, or .npy; noise by default, and zeros for integers",
    )
    parser.add_argument(
        "--outputs", help="where the outputs go, .npz; prints JSON then"
    )
    parser.add_argument("--runs", type=int, default=100, help="profiled runs")
    parser.add_argument("--warmup", type=int, default=10, help="runs before them")
    args = parser.parse_args(argv)
    try:
        cores = runtime.pin()
        found, results = _measured(args.file, args.example, args.runs, args.warmup)
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    except RuntimeError as error:  # LiteRT refuses a call
        print(f"{args.file} cannot be profiled: {error}", file=sys.stderr)
        return process.USER_ERROR
    if args.outputs:
        np.savez(args.outputs, **results)
        print(json.dumps(found | {"core": cores[0] if cores else None}))
    else:
        print(text(found))
    return 0


def text(found: dict) -> str:
    """A line for each operator, what no operator took, and the whole, in ms; `found` is what `_measured` returns."""
    rows = [(name, layer or "-", ms) for name, layer, ms in found["operators"]]
    rows.append(("elsewhere", "-", found["elsewhere_ms"]))
    rows.append(("a run with the profiler", "", found["profiled_ms"]))
    rows.append(("a run without, median", "", float(np.median(found["times_ms"]))))
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{'operator':{wide[0]}}  {'layer':{wide[1]}}        ms"]
    lines += [f"{n:{wide[0]}}  {layer:{wide[1]}}  {ms:8.4f}" for n, layer, ms in rows]
    if found.get("unmatched"):
        lines.append(
            f"{found['unmatched']} products have no layer: XNNPACK's are not the file's one by one"
        )
    return "\n".join(lines)


def _measured(path, example, runs, warmup) -> tuple[dict, dict]:
    """What `Operators` is made of but the core, and the outputs."""
    if runs < 1:
        raise UserError(f"runs = {runs}: at least one is needed")
    if Path(path).suffix != ".tflite":
        raise UserError(f"{path}: operators are timed of .tflite files")
    inputs = opened(path).inputs  # says what is wrong with a file that cannot be run
    given = fitted(runtime.read(example) if example else noise(inputs), inputs)
    if any(len(array) > 1 for array in given.values()):
        raise UserError("operators are timed on one example: give arrays [1, ...]")
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    entries, exits = signature(interpreter)
    batched = shares_batch(entries, exits)
    chosen = signature_of(interpreter)
    network = litert_c.Network(Path(path), chosen[0] if chosen else 0)
    places, ends = (
        # Without a signature the names are our own, and the file's order is kept.
        {name: names.index(name) if chosen else i for i, name in enumerate(side)}
        for side, names in ((entries, network.inputs), (exits, network.outputs))
    )
    for name, entry in entries.items():
        values = quantize(given[name] if batched else given[name][0], entry)
        network.write(places[name], np.broadcast_to(values, entry["shape"]))
    timing.times(network.run, warmup)
    plain = timing.times(network.run, runs)
    network.start()
    timing.times(network.run, warmup)
    network.events()
    times, events = [], []
    for _ in range(runs):
        times += timing.times(network.run, 1)
        events.append(network.events())
    results = {
        name: dequantize(network.read(ends[name], e["shape"], e["dtype"]), e)
        for name, e in exits.items()
    }
    results = {name: y[:1] if batched else y[None] for name, y in results.items()}
    names = [(name, index) for name, index, _ in events[0]]
    taken = np.mean([[us for *_, us in each] for each in events], axis=0) / 1e3
    nodes = in_file(path)
    layers = matched(names, nodes)
    operators = [
        (name, layer, float(ms))
        for (name, _), layer, ms in zip(names, layers, taken, strict=True)
    ]
    whole = float(np.mean(times))
    found = {
        "operators": operators,
        "elsewhere_ms": whole - float(taken.sum()),
        "profiled_ms": whole,
        "times_ms": plain,
        "unmatched": unmatched(names, nodes),
    }
    return found, results


def noise(inputs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """An example of values 0..255; of integers zeros, which every table has a row for."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0, 255 * (s.dtype.kind == "f"), (1, *s.shape)).astype(s.dtype)
        for name, s in inputs.items()
    }


def in_file(path: str | Path) -> list[Node]:
    """Returns the operators of a `.tflite` file, in its order."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(Path(path).read_bytes())
    codes = {v: k for k, v in vars(schema.BuiltinOperator).items() if k[0] != "_"}
    graph, found = model.Subgraphs(0), []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        kind = codes.get(number, f"OPERATOR_{number}")  # newer than the schema
        read = [op.Inputs(i) for i in range(op.InputsLength())]
        written = [op.Outputs(i) for i in range(op.OutputsLength())]
        # A result of the network bears its own name; the weights still tell.
        names = [
            graph.Tensors(t).Name() or b"" for t in written[:1] + read[1:] if t >= 0
        ]
        names = [name.decode(errors="replace") for name in names]
        layer = next(filter(None, map(layer_of, names)), None)
        found.append(Node(kind, layer, tuple(read), tuple(written)))
    return found


def layer_of(tensor: str) -> str | None:
    """The layer in a tensor's name, such as `jit(f)/Net/conv1_norm/mul;jit(f)/Net/conv1/conv_general_dilated1`: conv1.

    Of several the one with a convolution or a matrix product, else the first; the module's own name is left out, but
    where it is all there is.
    """
    steps = [s for s in tensor.split(";") if s.startswith("jit(")]
    products = [s for s in steps if re.search(r"/(conv_general|dot_general)\w*$", s)]
    for step in [*products, *steps][:1]:
        parts = [p for p in step.split("/")[:-1] if not re.match(r"\w*\(", p)]
        return "/".join(parts[1:] or parts) or None
    return None


if __name__ == "__main__":
    print_any_name()
    sys.exit(main())
