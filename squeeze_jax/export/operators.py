"""Times each operator of a LiteRT file with the runtime's own profiler, in a child process on one core.

    python -m squeeze_jax.export.operators model.tflite --runs=100

LiteRT's Python package does not expose its profiler, and its delegate for CPUs, XNNPACK, takes the whole graph as one
operator. The library in that package does report the operators inside, so it is called through its C interface. That is not
a documented part of the package. So it is used only with the exact version in requirements.txt, and in a child process,
where a fault becomes an error and does not end this process.

  * XNNPACK counts whole microseconds and rounds down: an operator takes up to one microsecond more than reported, and a
    shorter one may read 0. The part of a run that is missing from the operators is reported and never spread over them. In a
    network whose operators take a few microseconds each, it is most of the run.
  * The names of the file's tensors contain the layers, which `export.make` has put there. `matching` matches XNNPACK's
    operators with the file's. An operator without a counterpart belongs to no layer, and one line of the table counts these.
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

from squeeze_jax import files, machine
from squeeze_jax.cost import timing
from squeeze_jax.errors import UserError
from squeeze_jax.export import litert_c, process, runtime, time_files
from squeeze_jax.export.formats.tflite import (
    dequantize,
    find_signature,
    quantize,
    shares_batch,
    signature_details,
)
from squeeze_jax.export.matching import (
    Node,
    count_unmatched_products,
    match_layers,
)
from squeeze_jax.export.runnable import Spec, check_examples, format_of, open_file


class Operators(NamedTuple):
    """Times of a file's operators; the operators and `elsewhere_ms` add up to the mean of the profiled runs.

    Attributes:
      operators: (name, layer or None, ms) of each operator, in the order in which they run.
      elsewhere_ms: time of a profiled run outside all operators: rounding, calls, and the profiler itself, which takes some
        microseconds per operator that it does not report.
      profiled_ms: mean time of a run with the profiler.
      latency_ms: dict(p50, p90, p99, spread) in ms of runs without the profiler.
      outputs: {name: [1, ...]} for the example, to compare.
      core: number of the CPU core that it ran on, or None.
      unmatched: number of convolutions and other products whose layer is unknown, see
        `matching.count_unmatched_products`.
    """

    operators: tuple[tuple[str, str | None, float], ...]
    elsewhere_ms: float
    profiled_ms: float
    latency_ms: dict[str, float]
    outputs: dict[str, np.ndarray]
    core: int | None
    unmatched: int = 0

    def by_layer(self) -> dict[str | None, float]:
        """Returns {layer: ms}; the key None holds operators that belong to no layer."""
        sums = {}
        for _, layer, ms in self.operators:
            sums[layer] = sums.get(layer, 0.0) + ms
        return sums


def measure(
    path: str | Path,
    example: Any,
    *,
    runs: int = 100,
    warmup: int = 10,
    timeout: float = 600.0,
) -> Operators:
    """Measures the operators of a `.tflite` file on one core, in a child process.

    Args:
      path: the file.
      example: {name: [1, ...]}; for a file with one input also the array itself, such as pixels 0..255 [1, h, w, c].
      runs: number of runs with the profiler, and also of runs without.
      warmup: runs before the runs without the profiler, and again before those with it.
      timeout: seconds until the process is killed.

    Raises:
      UserError: the file is missing, LiteRT has another version, or the example does not match the file's inputs.
      process.Crash: the runtime died.
    """
    with tempfile.TemporaryDirectory() as folder:
        example_path = runtime.write_examples(example, folder)
        outputs_path = Path(folder, "outputs.npz")
        printed = process.run_module(
            "squeeze_jax.export.operators",
            *(path, f"--example={example_path}", f"--outputs={outputs_path}"),
            *(f"--runs={runs}", f"--warmup={warmup}"),
            what=f"{path} in LiteRT's profiler",
            timeout=timeout,
        )
        outputs = runtime.read_arrays(outputs_path)
    results = json.loads(printed.splitlines()[-1])
    results["operators"] = tuple(map(tuple, results["operators"]))
    percentiles = timing.percentiles(results.pop("times_ms"))
    return Operators(**results, latency_ms=percentiles, outputs=outputs)


def main(argv: list[str] | None = None) -> int:
    """Prints a table of operators. With --outputs, as `measure` calls it, prints JSON and writes the outputs there."""
    parser = argparse.ArgumentParser(
        "squeeze_jax.export.operators", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=os.path.expanduser, help="a TFLite file")
    parser.add_argument(
        *("--example", "--image"),
        type=os.path.expanduser,
        help=".npz of an array [1, ...] for each input, or .npy; noise by default, and zeros for integers",
    )
    parser.add_argument(
        "--outputs",
        type=os.path.expanduser,
        help="where the outputs go, .npz; prints JSON then",
    )
    parser.add_argument("--runs", type=int, default=100, help="profiled runs")
    parser.add_argument("--warmup", type=int, default=10, help="runs before them")
    args = parser.parse_args(argv)
    try:
        if args.outputs:
            files.check_writable(args.outputs, "--outputs")
        cores = runtime.pin()
        measured, outputs = _measure(args.file, args.example, args.runs, args.warmup)
        if args.outputs:
            runtime.write_arrays(args.outputs, outputs)
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    except RuntimeError as error:  # LiteRT refuses a call
        print(f"{args.file} cannot be profiled: {error}", file=sys.stderr)
        return process.USER_ERROR
    if args.outputs:
        print(json.dumps(measured | {"core": cores[0] if cores else None}))
    else:
        print(text(measured))
    return 0


def text(measured: dict) -> str:
    """Returns a table in ms: a line per operator, the time outside operators, and the time of a run.

    Args:
      measured: the first result of `_measure`.
    """
    rows = [(name, layer or "-", ms) for name, layer, ms in measured["operators"]]
    rows.append(("elsewhere", "-", measured["elsewhere_ms"]))
    rows.append(("a run with the profiler", "", measured["profiled_ms"]))
    rows.append(("a run without, median", "", float(np.median(measured["times_ms"]))))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{'operator':{widths[0]}}  {'layer':{widths[1]}}        ms"]
    lines += [
        f"{n:{widths[0]}}  {layer:{widths[1]}}  {ms:8.4f}" for n, layer, ms in rows
    ]
    if measured.get("unmatched"):
        lines.append(
            f"{measured['unmatched']} products have no layer: XNNPACK's are not the file's one by one"
        )
    return "\n".join(lines)


def _measure(path, example, runs, warmup) -> tuple[dict, dict]:
    """Measures a file in this process.

    Args:
      path: the file.
      example: path of a file with the example, or None for a random one.
      runs, warmup: as for `measure`.

    Returns:
      (the fields of `Operators` except outputs and core, with times_ms instead of latency_ms; {output: [1, ...]}).
    """
    if runs < 1:
        raise UserError(f"runs = {runs}: at least one is needed")
    if Path(path).is_file() and format_of(path) != "tflite":
        raise UserError(f"{path}: only operators of .tflite files can be timed")
    inputs = open_file(path).inputs  # raises a clear error for a file that cannot run
    arrays = check_examples(
        runtime.read_arrays(example) if example else random_example(inputs), inputs
    )
    if any(len(array) > 1 for array in arrays.values()):
        raise UserError(
            "operators can be timed only on one example: give arrays [1, ...]"
        )
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(**time_files.interpreter_source(str(path)))
    input_details, output_details = signature_details(interpreter)
    batched = shares_batch(input_details, output_details)
    signature = find_signature(interpreter)
    network = litert_c.Network(Path(path), signature[0] if signature else 0)
    input_positions, output_positions = (
        # Without a signature the names are ours, in the order of the file.
        {name: names.index(name) if signature else i for i, name in enumerate(details)}
        for details, names in (
            (input_details, network.inputs),
            (output_details, network.outputs),
        )
    )
    for name, detail in input_details.items():
        values = quantize(arrays[name] if batched else arrays[name][0], detail)
        network.write(input_positions[name], np.broadcast_to(values, detail["shape"]))
    timing.times(network.run, warmup)
    times_without_profiler = timing.times(network.run, runs)
    network.start_profiler()
    timing.times(network.run, warmup)
    network.events()
    times, events = [], []
    for _ in range(runs):
        times += timing.times(network.run, 1)
        events.append(network.events())
    outputs = {
        name: dequantize(
            network.read(output_positions[name], d["shape"], d["dtype"]), d
        )
        for name, d in output_details.items()
    }
    outputs = {name: y[:1] if batched else y[None] for name, y in outputs.items()}
    ran = [(name, index) for name, index, _ in events[0]]
    mean_ms = np.mean([[us for *_, us in run] for run in events], axis=0) / 1e3
    nodes = read_operators(path)
    layers = match_layers(ran, nodes)
    operators = [
        (name, layer, float(ms))
        for (name, _), layer, ms in zip(ran, layers, mean_ms, strict=True)
    ]
    run_ms = float(np.mean(times))
    measured = {
        "operators": operators,
        "elsewhere_ms": run_ms - float(mean_ms.sum()),
        "profiled_ms": run_ms,
        "times_ms": times_without_profiler,
        "unmatched": count_unmatched_products(ran, nodes),
    }
    return measured, outputs


def random_example(inputs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """Returns an example of random values 0..255; zeros for integers, because every embedding table has a row 0."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0, 255 * (s.dtype.kind == "f"), (1, *s.shape)).astype(s.dtype)
        for name, s in inputs.items()
    }


def read_operators(path: str | Path) -> list[Node]:
    """Returns the operators of a `.tflite` file, in its order."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(Path(path).read_bytes())
    codes = {v: k for k, v in vars(schema.BuiltinOperator).items() if k[0] != "_"}
    graph, nodes = model.Subgraphs(0), []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        kind = codes.get(
            number, f"OPERATOR_{number}"
        )  # an operator newer than the schema
        read = [op.Inputs(i) for i in range(op.InputsLength())]
        written = [op.Outputs(i) for i in range(op.OutputsLength())]
        # An output of the network has a name without a layer; the names of the weights then contain the layer.
        names = [
            graph.Tensors(t).Name() or b"" for t in written[:1] + read[1:] if t >= 0
        ]
        names = [name.decode(errors="replace") for name in names]
        layer = next(filter(None, map(layer_in_name, names)), None)
        nodes.append(Node(kind, layer, tuple(read), tuple(written)))
    return nodes


def layer_in_name(tensor: str) -> str | None:
    """Returns the layer in a tensor's name, None if there is none.

    `jit(f)/Net/conv1_norm/mul;jit(f)/Net/conv1/conv_general_dilated1` gives conv1: of several operations the one with a
    convolution or matrix product, else the first. The module's own name is omitted unless there is no other.
    """
    steps = [s for s in tensor.split(";") if s.startswith("jit(")]
    products = [s for s in steps if re.search(r"/(conv_general|dot_general)\w*$", s)]
    for step in [*products, *steps][:1]:
        parts = [p for p in step.split("/")[:-1] if not re.match(r"\w*\(", p)]
        return "/".join(parts[1:] or parts) or None
    return None


if __name__ == "__main__":
    machine.run_tool(main)
