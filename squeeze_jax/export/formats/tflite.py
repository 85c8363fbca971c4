"""TFLite in float32 for LiteRT, converted from StableHLO by litert-converter, without TensorFlow.

The batch size is fixed to 1, which is what a device runs; with a symbolic batch the converter leaves shape arithmetic in the
graph. litert-converter's Python binding is not a documented API, and only `to_flatbuffer` uses it. Inputs and outputs keep
their names in the file's only signature_details.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import process, time_files
from squeeze_jax.export.runnable import Runnable, Spec, name_outputs

SUFFIX = ".tflite"
INTEGER = False
NAMED = True  # class names may be appended to the file
NEEDS = ("litert-converter", "ai-edge-litert")
SIGNATURE = "serving_default"
CONVERTER_SECONDS = 1800.0
# Advice in errors about loops that `loops` cannot unroll.
LOOP_ADVICE = (
    ", or loop a fixed number of turns, 512 at most, by lax.scan or lax.fori_loop"
)


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Converts `fn` at batch 1; see `stablehlo.convert` for the arguments.

    Raises:
      process.Crash: the converter fails; the message names the operation that it cannot convert.
    """
    from squeeze_jax.nn import conv

    with conv.separate_groups():
        return {SUFFIX: convert_in_child("tflite", fn, inputs)}


def convert_in_child(key: str, fn, inputs, calibration=None) -> bytes:
    """Converts `fn` to StableHLO, and that to a format's file by running the format's `__main__` in a child process.

    Args:
      key: the format.
      fn, inputs: as for `stablehlo.convert`.
      calibration: examples {name: [n, ...]} that the format's `__main__` reads, or None.

    Returns:
      The file's bytes.

    Raises:
      process.Crash: the conversion failed; the message names operations and dtypes that LiteRT does not have.
    """
    from squeeze_jax.export import loops

    program = lower(fn, inputs)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.mlirbc"), Path(folder, "out.tflite")
        source.write_bytes(program.stablehlo)
        calibration_paths = []
        if calibration is not None:
            calibration_paths.append(Path(folder, "calibration.npz"))
            np.savez(calibration_paths[0], **calibration)
        try:
            process.run_module(
                f"squeeze_jax.export.formats.{key}",
                *(source, target, json.dumps(program.arguments), *calibration_paths),
                what=f"the conversion to {key}",
                timeout=CONVERTER_SECONDS,
            )
        except process.Crash:
            unsupported = loops.unsupported_operations(program.fn, program.shapes)
            narrow = loops.narrow_floats(program.fn, program.shapes)
            if not unsupported and narrow:
                dtype, operation = next(iter(narrow.items()))
                raise process.Crash(
                    f"the conversion to {key} failed: the function computes in {dtype} ({operation}), and LiteRT in float32:"
                    " make the network with dtype=jnp.float32, and cast its weights by jax.tree.map(lambda a:"
                    " a.astype(jnp.float32), variables)"
                ) from None
            if not unsupported:
                raise
            advice = LOOP_ADVICE if any("loop" in op for op in unsupported) else ""
            raise process.Crash(
                f"the conversion to {key} failed: LiteRT has no operation for {', '.join(unsupported)}: compute it otherwise,"
                f" or outside of the file{advice}"
            ) from None
        return target.read_bytes()


class Lowered(NamedTuple):
    """A function in StableHLO, as the converters read it.

    Attributes:
      stablehlo: portable bytecode.
      arguments: dict(inputs, outputs, ranges): names in the program's order, and the known ranges of inputs; plain JSON.
      fn: the function with its loops unrolled.
      shapes: {input: shape with batch 1}.
    """

    stablehlo: bytes
    arguments: dict[str, Any]
    fn: Callable
    shapes: dict[str, Any]


def lower(fn: Callable, inputs: Mapping[str, Spec]) -> Lowered:
    """Lowers a function at batch 1 to StableHLO for `to_flatbuffer`; see `stablehlo.convert` for the arguments."""
    import jax
    from jax import export

    from squeeze_jax.export import loops
    from squeeze_jax.nn import composite

    shapes = {
        name: jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype)
        for name, spec in inputs.items()
    }
    with composite.keep_composites():
        unrolled = loops.unroll_loops(lambda x: name_outputs(fn(x)), shapes)
        program = jax.jit(unrolled, keep_unused=True)
        exported = export.export(program, platforms=("cpu",))(shapes)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    # JAX sorts the inputs and outputs of a program by name.
    arguments = {"inputs": sorted(shapes), "outputs": sorted(outputs)}
    arguments["ranges"] = {name: s.range for name, s in inputs.items() if s.range}
    return Lowered(exported.mlir_module_serialized, arguments, unrolled, shapes)


def to_flatbuffer(
    stablehlo: bytes,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    ranges: Mapping[str, Any] | None = None,
) -> bytes:
    """Converts portable StableHLO bytecode to a TFLite file's bytes.

    Args:
      stablehlo: the bytecode.
      inputs, outputs: names of the program's arguments and results.
      ranges: ignored; only integer files need it, see `tflite_int8.quantize_file`.
    """
    del ranges
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as api

    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(stablehlo)
        passes = "vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline,symbol-dce"
        passmanager.PassManager.parse(f"builtin.module({passes})").run(module.operation)
        api.set_signature(module.operation, SIGNATURE, list(inputs), list(outputs))
        config = api.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        return api.export_flatbuffer_to_bytes(module.operation)


def load(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a float or integer file in LiteRT's interpreter, and (de)quantizes integer inputs and outputs.

    The first axis of all inputs and outputs is the batch axis. If their first axes differ in length, or one has no axis, the
    file runs once per example, and its inputs and outputs have the file's whole shapes for one example.

    Args:
      path: the file.
      threads: CPU threads; all cores by default.

    Raises:
      UserError: an input or output holds strings.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(
        num_threads=threads or os.cpu_count(),
        **time_files.interpreter_source(str(path)),
    )
    interpreter.allocate_tensors()
    input_details, output_details = signature_details(interpreter)
    for name, detail in (input_details | output_details).items():
        if np.dtype(detail["dtype"]).kind not in "biuf":
            raise UserError(f"{path} cannot be run: {name} holds {detail['dtype']}")
    batched = shares_batch(input_details, output_details)

    def feed(x):
        for name, detail in input_details.items():
            values = x[name] if batched else x[name][0]
            interpreter.set_tensor(detail["index"], quantize(values, detail))

    def run(x):
        feed(x)
        interpreter.invoke()
        outputs = {
            name: dequantize(interpreter.get_tensor(d["index"]), d)
            for name, d in output_details.items()
        }
        return outputs if batched else {name: y[None] for name, y in outputs.items()}

    def timed(x):
        feed(x)
        return interpreter.invoke

    version = importlib.metadata.version("ai-edge-litert")
    shapes = {n: tuple(map(int, d["shape"])) for n, d in input_details.items()}
    inputs = {
        name: Spec(shape[batched:], value_dtype(input_details[name]))
        for name, shape in shapes.items()
    }
    batch = next(iter(shapes.values()))[0] if batched else 1
    return Runnable(inputs, batch, run, timed, f"ai-edge-litert {version}")


def signature_details(interpreter) -> tuple[dict[str, dict], dict[str, dict]]:
    """Returns ({input: details}, {output: details}) of the graph that `Interpreter.invoke` runs.

    The names are those of the graph's signature. In a file without a signature, a single input and output are called image
    and logits, and several are called input_0, … and output_0, …
    """
    if signature := find_signature(interpreter):
        runner = interpreter.get_signature_runner(signature[1])
        return runner.get_input_details(), runner.get_output_details()
    input_details, output_details = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    if len(input_details) == len(output_details) == 1:
        return {"image": input_details[0]}, {"logits": output_details[0]}
    sides = (("input", input_details), ("output", output_details))
    return tuple(
        {f"{side}_{i}": detail for i, detail in enumerate(details)}
        for side, details in sides
    )


def find_signature(interpreter) -> tuple[int, str] | None:
    """Returns (position in the file, name) of the first signature of the graph that `Interpreter.invoke` runs, or None."""
    graph_inputs = {d["index"] for d in interpreter.get_input_details()}
    graph_outputs = {d["index"] for d in interpreter.get_output_details()}
    for position, name in enumerate(interpreter.get_signature_list()):
        runner = interpreter.get_signature_runner(name)
        inputs = {d["index"] for d in runner.get_input_details().values()}
        outputs = {d["index"] for d in runner.get_output_details().values()}
        if (inputs, outputs) == (graph_inputs, graph_outputs):
            return position, name
    return None


def shares_batch(
    input_details: Mapping[str, Any], output_details: Mapping[str, Any]
) -> bool:
    """Returns whether all inputs and outputs have a first axis of equal length, as a batch axis has."""
    tensors = (*input_details.values(), *output_details.values())
    first_axes = {tuple(detail["shape"])[:1] for detail in tensors}
    return len(first_axes) == 1 and () not in first_axes


def value_dtype(detail) -> np.dtype:
    """Returns the dtype of a tensor's values: float32 if it holds quantized integers."""
    scale, _ = detail["quantization"]
    return np.dtype(np.float32 if scale else detail["dtype"])


def quantize(values, detail):
    """Quantizes values v = scale (q - zero_point) to integers q; values of a tensor without a scale are only cast.

    Raises:
      UserError: a value is not finite, which no integer stands for.
    """
    scale, zero_point = detail["quantization"]
    if not scale:
        return values.astype(detail["dtype"])
    if not np.isfinite(values).all():
        raise UserError(
            "an input has values that are not finite, and the file computes in integers: give finite numbers"
        )
    limits = np.iinfo(detail["dtype"])
    integers = np.rint(values / np.float32(scale)) + zero_point
    return np.clip(integers, limits.min, limits.max).astype(detail["dtype"])


def dequantize(integers, detail):
    """Returns the values of quantized integers in float32, see `quantize`; integers that are not quantized stay as they are."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return integers if integers.dtype.kind in "iub" else integers.astype(np.float32)
    return np.float32(scale) * (integers.astype(np.float32) - np.float32(zero_point))


if __name__ == "__main__":
    _source, _target, _arguments = sys.argv[1:]
    _content = to_flatbuffer(Path(_source).read_bytes(), **json.loads(_arguments))
    Path(_target).write_bytes(_content)
