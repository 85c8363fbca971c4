"""TFLite in 8-bit integers: weights, activations, input and output, calibrated on real images.

Post-training quantization (Jacob et al. 2018, https://arxiv.org/abs/1712.05877): a real value is r = S (q - Z) with int8 q;
the ranges of activations come from running the float file on calibration images (`export/ranges.py`). The input is the pixel minus 128
exactly (S = 1, Z = -128), so a camera's bytes go in without arithmetic. Microcontrollers and NPUs run such files.
"""

import sys
from pathlib import Path

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import ranges
from squeeze_jax.export.formats import tflite

SUFFIX = "_int8.tflite"
INTEGER = True
NEEDS = (*tflite.NEEDS, "litert-quantizer")
PIXELS = (0.0, 255.0)


def convert(fn, shape, calibration) -> dict[str, bytes]:
    """Converts and quantizes `fn` at batch 1.

    Args:
      fn: float32 pixels [1, h, w, c] → an array or a tuple of arrays.
      shape: (h, w, c).
      calibration: pixels 0..255 [n, h, w, c] of real images; 100 or more of all classes are advised.

    Raises:
      UserError: no calibration images, or of another shape.
      process.Crash: the converter or the quantizer fails.
    """
    if calibration is None or not len(calibration):
        raise UserError("tflite_int8 needs calibration images: give at least one")
    if tuple(calibration.shape[1:]) != tuple(shape):
        raise UserError(
            f"calibration images are {list(calibration.shape[1:])}, the model takes {list(shape)}"
        )
    return {SUFFIX: tflite.converted("tflite_int8", fn, shape, calibration)}


def quantized(flatbuffer: bytes, calibration: np.ndarray) -> bytes:
    """Quantizes a float TFLite file's bytes with the ranges found on calibration images [n, h, w, c]."""
    from litert_quantizer import quantizer, recipe

    tool = quantizer.Quantizer(flatbuffer)
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    # the tool's own calibration tells which tensors it wants; its ranges, averages over images, cut large values off
    first = {"image": calibration[:1].astype(np.float32)}
    wanted = tool.calibrate({tflite.SIGNATURE: [first]}, num_threads=1)
    found = ranges.collect(_tensors(flatbuffer, list(wanted)), calibration)
    found[f"{tflite.SIGNATURE}_image"] = PIXELS
    for name, ends in found.items():
        for key, end in zip(("min", "max"), ends, strict=True):
            wanted[name][key] = np.full_like(wanted[name][key], end)
    return bytes(tool.quantize(wanted).quantized_model)


def _tensors(flatbuffer: bytes, names: list[str]):
    """Returns a function: an image [h, w, c] → the values of the named tensors."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(
        model_content=flatbuffer, experimental_preserve_all_tensors=True
    )
    interpreter.allocate_tensors()
    entry = interpreter.get_input_details()[0]["index"]
    index = {d["name"]: d["index"] for d in interpreter.get_tensor_details()}

    def run(image):
        interpreter.set_tensor(entry, image[None].astype(np.float32))
        interpreter.invoke()
        return {name: interpreter.get_tensor(index[name]) for name in names}

    return run


if __name__ == "__main__":
    _source, _target, _outputs, _calibration = sys.argv[1:]
    _float = tflite.flatbuffer(Path(_source).read_bytes(), int(_outputs))
    Path(_target).write_bytes(quantized(_float, np.load(_calibration)))
