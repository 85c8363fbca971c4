"""TFLite with weights of 8-bit integers and float activations, which the runtime quantizes on the way.

Dynamic-range quantization: each channel of a kernel has its scale, symmetric around zero; before a convolution or a
matrix product the runtime finds the range of each row of activations, computes the product in integers, and returns
floats. Nothing is calibrated, inputs and outputs are those of the float file, and the file is about a quarter of it. Made
for encoders, whose activations have outliers that fixed ranges of 8 bits lose (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339). Microcontrollers and NPUs do not run such files.
"""

import json
import sys
from pathlib import Path

from squeeze_jax.export.formats import tflite, tflite_int8

SUFFIX = "_dynamic.tflite"
INTEGER = True
NAMED = tflite.NAMED
NEEDS = tflite_int8.NEEDS


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Converts `fn` at batch 1 and quantizes its weights; see `stablehlo.convert` for the arguments.

    Raises:
      process.Crash: the converter or the quantizer fails.
    """
    return {SUFFIX: tflite.converted("tflite_dynamic", fn, inputs)}


def quantized(flatbuffer: bytes) -> bytes:
    """Quantizes the weights in a float TFLite file's bytes."""
    from litert_quantizer import quantizer, recipe

    tool = quantizer.Quantizer(flatbuffer)
    tool.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return bytes(tool.quantize().quantized_model)


if __name__ == "__main__":
    _source, _target, _names = sys.argv[1:]
    _float = tflite.flatbuffer(Path(_source).read_bytes(), **json.loads(_names))
    Path(_target).write_bytes(quantized(_float))
