"""TFLite with 8-bit integer weights and float activations, which the runtime quantizes during the run.

Dynamic-range quantization: each output channel of a kernel has its own scale, symmetric around zero. Before a convolution or
matrix product the runtime finds the range of each row of activations, computes the product in integers, and returns floats.
No calibration is needed. Inputs and outputs are those of the float file, and the file has about a quarter of its size. The
format suits encoders, whose activations have outliers that fixed 8-bit ranges cannot represent (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339). Microcontrollers and NPUs do not run such files.
"""

import json
import sys
from pathlib import Path

from squeeze_jax.export.formats import tflite, tflite_int8
from squeeze_jax.export.inline_buffers import inline_buffers

SUFFIX = "_dynamic.tflite"
INTEGER = True
NAMED = tflite.NAMED
NEEDS = tflite_int8.NEEDS


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Converts `fn` at batch 1 and quantizes its weights; see `stablehlo.convert` for the arguments.

    Raises:
      process.Crash: the converter or the quantizer fails.
    """
    return {SUFFIX: tflite.convert_in_child("tflite_dynamic", fn, inputs)}


def quantize_weights(flatbuffer: bytes) -> bytes:
    """Quantizes the weights in a float TFLite file's bytes."""
    from litert_quantizer import quantizer, recipe

    tool = quantizer.Quantizer(flatbuffer)
    tool.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return inline_buffers(bytes(tool.quantize().quantized_model))


if __name__ == "__main__":
    _source, _target, _arguments = sys.argv[1:]
    _float = tflite.to_flatbuffer(Path(_source).read_bytes(), **json.loads(_arguments))
    Path(_target).write_bytes(quantize_weights(_float))
