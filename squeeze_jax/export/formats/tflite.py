"""TFLite in float32 for LiteRT, converted from StableHLO by litert-converter, without TensorFlow.

The batch is fixed to 1, which is what a device runs; with a symbolic batch the converter leaves shape arithmetic in the
graph. litert-converter's Python binding is no documented API: `flatbuffer` is the only place that touches it. Inputs and outputs
bear their names in the file's one signature.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import process
from squeeze_jax.export.runnable import Runnable, Spec, named

SUFFIX = ".tflite"
INTEGER = False
NAMED = True  # class names may follow its bytes
NEEDS = ("litert-converter", "ai-edge-litert")
SIGNATURE = "serving_default"
CONVERTER_SECONDS = 1800.0
# Advice for what `loops` cannot write out.
LOOPS = ", or loop a fixed number of turns, 512 at most, by lax.scan or lax.fori_loop"


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Converts `fn` at batch 1; see `stablehlo.convert` for the arguments.

    Raises:
      process.Crash: the converter fails; names the operation that it cannot convert.
    """
    from squeeze_jax.nn import conv

    with conv.separate_groups():
        return {SUFFIX: converted("tflite", fn, inputs)}


def converted(key: str, fn, inputs, calibration=None) -> bytes:
    """Runs a format's own `__main__` on the StableHLO of `fn`, and on examples, in a process of its own."""
    import jax
    from jax import export

    from squeeze_jax.export import loops
    from squeeze_jax.nn import composite

    given = {
        name: jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype)
        for name, spec in inputs.items()
    }
    with composite.keep_composites():
        plain = loops.written_out(lambda x: named(fn(x)), given)
        program = jax.jit(plain, keep_unused=True)
        exported = export.export(program, platforms=("cpu",))(given)
    found = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    # As jax has them in the program: in the order of their names.
    names = {"inputs": sorted(given), "outputs": sorted(found)}
    names["ranges"] = {name: s.range for name, s in inputs.items() if s.range}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "in.mlirbc"), Path(scratch, "out.tflite")
        source.write_bytes(exported.mlir_module_serialized)
        more = []
        if calibration is not None:
            more.append(Path(scratch, "calibration.npz"))
            np.savez(more[0], **calibration)
        try:
            process.python(
                f"squeeze_jax.export.formats.{key}",
                *(source, target, json.dumps(names), *more),
                what=f"the conversion to {key}",
                timeout=CONVERTER_SECONDS,
            )
        except process.Crash:
            missing = loops.lacking(plain, given)
            if not missing:
                raise
            loop = LOOPS if any("loop" in each for each in missing) else ""
            raise process.Crash(
                f"the conversion to {key} failed: LiteRT has no operation for {', '.join(missing)}: compute it otherwise,"
                f" or outside of the file{loop}"
            ) from None
        return target.read_bytes()


def flatbuffer(
    stablehlo: bytes,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    ranges: Mapping[str, Any] | None = None,
) -> bytes:
    """Converts portable StableHLO bytecode to a TFLite file's bytes; the names are of its arguments and results.

    `ranges` matter to integer files alone, see `tflite_int8.quantized`.
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
    """Opens a float or an integer file in LiteRT's interpreter; integer inputs and outputs are (de)quantized here.

    The first axis of all inputs and outputs is that of examples. A file whose tensors do not share a first axis, or have
    none, runs once for each example; the shapes of its inputs and outputs are then whole.

    Args:
      path: the file.
      threads: CPU threads, all cores by default.

    Raises:
      UserError: an input or an output holds strings.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
    interpreter.allocate_tensors()
    entries, exits = signature(interpreter)
    for name, each in (entries | exits).items():
        if np.dtype(each["dtype"]).kind not in "biuf":
            raise UserError(f"{path} cannot be run: {name} holds {each['dtype']}")
    batched = shares_batch(entries, exits)

    def feed(x):
        for name, entry in entries.items():
            values = x[name] if batched else x[name][0]
            interpreter.set_tensor(entry["index"], quantize(values, entry))

    def run(x):
        feed(x)
        interpreter.invoke()
        found = {
            name: dequantize(interpreter.get_tensor(e["index"]), e)
            for name, e in exits.items()
        }
        return found if batched else {name: y[None] for name, y in found.items()}

    def timed(x):
        feed(x)
        return interpreter.invoke

    version = importlib.metadata.version("ai-edge-litert")
    shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
    inputs = {
        name: Spec(shape[batched:], real(entries[name]))
        for name, shape in shapes.items()
    }
    batch = next(iter(shapes.values()))[0] if batched else 1
    return Runnable(inputs, batch, run, timed, f"ai-edge-litert {version}")


def signature(interpreter) -> tuple[dict[str, dict], dict[str, dict]]:
    """Returns ({name: details of an input}, {name: of an output}) of the graph that `Interpreter.invoke` runs.

    The names are those of its signature. In a file without one, one input is called image and one output logits, and
    several input_0, … and output_0, …
    """
    if at := signature_of(interpreter):
        runner = interpreter.get_signature_runner(at[1])
        return runner.get_input_details(), runner.get_output_details()
    entries, exits = interpreter.get_input_details(), interpreter.get_output_details()
    if len(entries) == len(exits) == 1:
        return {"image": entries[0]}, {"logits": exits[0]}
    sides = (("input", entries), ("output", exits))
    return tuple(
        {f"{side}_{i}": detail for i, detail in enumerate(details)}
        for side, details in sides
    )


def signature_of(interpreter) -> tuple[int, str] | None:
    """Returns (position in the file, name) of the first signature of the graph that `Interpreter.invoke` runs."""
    mine = {each["index"] for each in interpreter.get_input_details()}
    exits = {each["index"] for each in interpreter.get_output_details()}
    for position, name in enumerate(interpreter.get_signature_list()):
        runner = interpreter.get_signature_runner(name)
        sides = runner.get_input_details(), runner.get_output_details()
        if [{e["index"] for e in side.values()} for side in sides] == [mine, exits]:
            return position, name
    return None


def shares_batch(entries: Mapping[str, Any], exits: Mapping[str, Any]) -> bool:
    """Whether the first axis of all inputs and outputs is as long, as that of examples is."""
    tensors = (*entries.values(), *exits.values())
    first = {tuple(each["shape"])[:1] for each in tensors}
    return len(first) == 1 and () not in first


def real(detail) -> np.dtype:
    """The dtype of a tensor's values: of quantized integers float32."""
    scale, _ = detail["quantization"]
    return np.dtype(np.float32 if scale else detail["dtype"])


def quantize(values, detail):
    """The integers q of values v = scale (q - zero_point), or the values themselves for a float tensor."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return values.astype(detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    integers = np.rint(values / np.float32(scale)) + zero_point
    return np.clip(integers, limits.min, limits.max).astype(detail["dtype"])


def dequantize(integers, detail):
    """The values of integers, see `quantize`."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return integers.astype(np.float32)
    return np.float32(scale) * (integers.astype(np.float32) - np.float32(zero_point))


if __name__ == "__main__":
    _source, _target, _names = sys.argv[1:]
    _found = flatbuffer(Path(_source).read_bytes(), **json.loads(_names))
    Path(_target).write_bytes(_found)
