"""TFLite in float32 for LiteRT, converted from StableHLO by litert-converter, without TensorFlow.

The batch is fixed to 1, which is what a device runs; with a symbolic batch the converter leaves shape arithmetic in the
graph. litert-converter's Python binding is no documented API: `flatbuffer` is the only place that touches it.
"""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from squeeze_jax.export import process
from squeeze_jax.export.runnable import Runnable

SUFFIX = ".tflite"
INTEGER = False
NEEDS = ("litert-converter", "ai-edge-litert")
SIGNATURE = "serving_default"
CONVERTER_SECONDS = 1800.0


def convert(fn, shape, calibration=None) -> dict[str, bytes]:
    """Converts `fn` at batch 1; see `stablehlo.convert` for the arguments.

    Raises:
      process.Crash: the converter fails; names the operation that it cannot convert.
    """
    return {SUFFIX: converted("tflite", fn, shape)}


def converted(key: str, fn, shape, *arrays: np.ndarray) -> bytes:
    """Runs a format's own `__main__` on the StableHLO of `fn`, and on arrays, in a process of its own."""
    import jax
    from jax import export

    from squeeze_jax.nn import composite

    pixels = jax.ShapeDtypeStruct((1, *shape), np.float32)
    with composite.whole():
        exported = export.export(jax.jit(lambda x: fn(x)), platforms=("cpu",))(pixels)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "in.mlirbc"), Path(scratch, "out.tflite")
        source.write_bytes(exported.mlir_module_serialized)
        given = []
        for i, array in enumerate(arrays):
            given.append(Path(scratch, f"{i}.npy"))
            np.save(given[-1], array)
        process.python(
            f"squeeze_jax.export.formats.{key}",
            *(source, target, len(exported.out_avals), *given),
            what=f"the conversion to {key}",
            timeout=CONVERTER_SECONDS,
        )
        return target.read_bytes()


def flatbuffer(stablehlo: bytes, outputs: int) -> bytes:
    """Converts portable StableHLO bytecode with one input and a number of outputs to a TFLite file's bytes."""
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as api

    names = ["logits"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(stablehlo)
        passes = "vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline,symbol-dce"
        passmanager.PassManager.parse(f"builtin.module({passes})").run(module.operation)
        api.set_signature(module.operation, SIGNATURE, ["image"], names)
        config = api.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        return api.export_flatbuffer_to_bytes(module.operation)


def load(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a float or an integer file in LiteRT's interpreter; integer inputs and outputs are (de)quantized here.

    Args:
      path: the file.
      threads: CPU threads, all cores by default.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
    interpreter.allocate_tensors()
    (entry,) = interpreter.get_input_details()
    exits = interpreter.get_output_details()

    def feed(images):
        interpreter.set_tensor(entry["index"], quantize(images, entry))

    def run(images):
        feed(images)
        interpreter.invoke()
        return tuple(dequantize(interpreter.get_tensor(e["index"]), e) for e in exits)

    def timed(images):
        feed(images)
        return interpreter.invoke

    version = importlib.metadata.version("ai-edge-litert")
    batch, *shape = map(int, entry["shape"])
    return Runnable(tuple(shape), batch, run, timed, f"ai-edge-litert {version}")


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
    _source, _target, _outputs = sys.argv[1:]
    Path(_target).write_bytes(flatbuffer(Path(_source).read_bytes(), int(_outputs)))
