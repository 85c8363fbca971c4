"""TFLite quantized to 8-bit integers: weights, activations, input and output, calibrated on real examples.

Post-training quantization (Jacob et al. 2018, https://arxiv.org/abs/1712.05877): a real value is r = S (q - Z) with int8 q.
The ranges of activations come from running the float file on calibration examples (`export/ranges.py`). An input with the
stated range 0..255 becomes the pixel minus 128 exactly (S = 1, Z = -128), so a camera's bytes need no arithmetic.
Microcontrollers and NPUs run such files.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import ranges
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.inline_buffers import inline_buffers
from squeeze_jax.export.runnable import check_examples

SUFFIX = "_int8.tflite"
INTEGER = True
NAMED = tflite.NAMED
NEEDS = (*tflite.NEEDS, "litert-quantizer")


def convert(fn, inputs, calibration) -> dict[str, bytes]:
    """Converts and quantizes `fn` at batch 1.

    Args:
      fn: {name: [1, ...]} → an array or a mapping of arrays.
      inputs: {name: Spec}. The range of a float input without a stated range is measured on the calibration examples.
        Integer inputs are not quantize_file.
      calibration: real examples {name: [n, ...]}; at least 100 from all classes are recommended.

    Raises:
      UserError: there are no calibration examples, or they do not match the inputs.
      process.Crash: the converter or the quantizer fails.
    """
    if calibration is None:
        raise UserError("tflite_int8 needs calibration examples: give at least one")
    examples = check_examples(calibration, inputs, "to calibrate, the model")
    return {SUFFIX: tflite.convert_in_child("tflite_int8", fn, inputs, examples)}


def quantize_file(
    flatbuffer: bytes,
    calibration: Mapping[str, np.ndarray],
    input_ranges: Mapping[str, tuple[float, float]],
) -> bytes:
    """Quantizes a float TFLite file's bytes.

    Args:
      flatbuffer: the file.
      calibration: examples {name: [n, ...]}, from which the ranges of tensors are measured.
      input_ranges: {input: (minimum, maximum)} of the inputs whose ranges are known.
    """
    from litert_quantizer import quantizer, recipe

    tool = quantizer.Quantizer(flatbuffer)
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    network = _Interpreter(flatbuffer)
    rows = [
        network.cast({k: v[i : i + 1] for k, v in calibration.items()})
        for i in range(len(next(iter(calibration.values()))))
    ]
    # The quantizer's own calibration lists the tensors that need ranges. Its ranges, averages over examples, clip values.
    statistics = tool.calibrate({tflite.SIGNATURE: rows[:1]}, num_threads=1)
    tensor_ranges = ranges.collect(
        lambda row: network.tensors(row, statistics), rows, softmax_terms(flatbuffer)
    )
    for name, (low, high) in input_ranges.items():
        tensor = network.input_details[name]["name"]
        tensor_ranges[tensor] = min(low, 0.0), max(high, 0.0)
    for name, bounds in tensor_ranges.items():
        for key, bound in zip(("min", "max"), bounds, strict=True):
            statistics[name][key] = np.full_like(statistics[name][key], bound)
    return inline_buffers(bytes(tool.quantize(statistics).quantized_model))


def softmax_terms(flatbuffer: bytes) -> dict[str, list[str]]:
    """Returns {input tensor of a softmax: the tensors whose ADD it is}, by name; an empty list if it is not a sum."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(flatbuffer)
    graph = model.Subgraphs(0)
    kinds = schema.BuiltinOperator
    softmax_inputs, terms = [], {}
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()
        if code == kinds.SOFTMAX:
            softmax_inputs.append(op.Inputs(0))
        elif code == kinds.ADD:
            terms[op.Outputs(0)] = op.InputsAsNumpy()

    def name(tensor):
        return graph.Tensors(tensor).Name().decode()

    return {name(t): [name(term) for term in terms.get(t, ())] for t in softmax_inputs}


class _Interpreter:
    """A float file in LiteRT's interpreter, which keeps all intermediate tensors."""

    def __init__(self, flatbuffer: bytes):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(
            model_content=flatbuffer, experimental_preserve_all_tensors=True
        )
        self._interpreter.allocate_tensors()
        self.input_details, _ = tflite.signature_details(self._interpreter)
        details = self._interpreter.get_tensor_details()
        self._index = {d["name"]: d["index"] for d in details}

    def cast(self, example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns an example in the dtypes of the file's inputs."""
        return {k: v.astype(self.input_details[k]["dtype"]) for k, v in example.items()}

    def tensors(self, example: Mapping[str, np.ndarray], names: Iterable[str]):
        """Runs an example and returns {name: values} of the tensors with these names."""
        for name, detail in self.input_details.items():
            self._interpreter.set_tensor(detail["index"], example[name])
        self._interpreter.invoke()
        return {n: self._interpreter.get_tensor(self._index[n]) for n in names}


if __name__ == "__main__":
    _source, _target, _json, _calibration = sys.argv[1:]
    _arguments = json.loads(_json)
    _float = tflite.to_flatbuffer(Path(_source).read_bytes(), **_arguments)
    with np.load(_calibration) as _examples:
        _file = quantize_file(_float, dict(_examples), _arguments["ranges"])
    Path(_target).write_bytes(_file)
