"""TFLite in 8-bit integers: weights, activations, input and output, calibrated on real images.

Post-training quantization (Jacob et al. 2018, https://arxiv.org/abs/1712.05877): a real value is r = S (q - Z) with int8 q;
the ranges of activations come from running the float file on calibration examples (`export/ranges.py`). An input whose
range is stated as 0..255 is the pixel minus 128 exactly (S = 1, Z = -128), so a camera's bytes go in without arithmetic.
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
from squeeze_jax.export.runnable import fitted

SUFFIX = "_int8.tflite"
INTEGER = True
NAMED = tflite.NAMED
NEEDS = (*tflite.NEEDS, "litert-quantizer")


def convert(fn, inputs, calibration) -> dict[str, bytes]:
    """Converts and quantizes `fn` at batch 1.

    Args:
      fn: {name: [1, ...]} → an array or a mapping of arrays.
      inputs: {name: Spec}; if an input states no range, its range is measured on the calibration examples. Integers stay
        what they are.
      calibration: real examples {name: [n, ...]}; 100 or more of all classes are advised.

    Raises:
      UserError: no calibration examples, or of another shape.
      process.Crash: the converter or the quantizer fails.
    """
    if calibration is None:
        raise UserError("tflite_int8 needs calibration examples: give at least one")
    examples = fitted(calibration, inputs, "to calibrate, the model")
    return {SUFFIX: tflite.converted("tflite_int8", fn, inputs, examples)}


def quantized(
    flatbuffer: bytes,
    calibration: Mapping[str, np.ndarray],
    ranges_of: Mapping[str, tuple[float, float]],
) -> bytes:
    """Quantizes a float TFLite file's bytes.

    Args:
      flatbuffer: the file.
      calibration: examples {name: [n, ...]}, on which the ranges of tensors are found.
      ranges_of: {input: (least, greatest value)} of the inputs whose ranges are known.
    """
    from litert_quantizer import quantizer, recipe

    tool = quantizer.Quantizer(flatbuffer)
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    network = _Network(flatbuffer)
    rows = [
        network.fitting({k: v[i : i + 1] for k, v in calibration.items()})
        for i in range(len(next(iter(calibration.values()))))
    ]
    # the tool's own calibration tells which tensors it wants; its ranges, averages over examples, cut large values off
    wanted = tool.calibrate({tflite.SIGNATURE: rows[:1]}, num_threads=1)
    found = ranges.collect(
        lambda row: network.tensors(row, wanted), rows, attending(flatbuffer)
    )
    for name, (low, high) in ranges_of.items():
        found[network.entries[name]["name"]] = min(low, 0.0), max(high, 0.0)
    for name, ends in found.items():
        for key, end in zip(("min", "max"), ends, strict=True):
            wanted[name][key] = np.full_like(wanted[name][key], end)
    return bytes(tool.quantize(wanted).quantized_model)


def attending(flatbuffer: bytes) -> dict[str, list[str]]:
    """{tensor that a softmax reads: those that an ADD makes it of}, by their names."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(flatbuffer)
    graph = model.Subgraphs(0)
    kinds = schema.BuiltinOperator
    read, added = [], {}
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()
        if code == kinds.SOFTMAX:
            read.append(op.Inputs(0))
        elif code == kinds.ADD:
            added[op.Outputs(0)] = op.InputsAsNumpy()

    def name(tensor):
        return graph.Tensors(tensor).Name().decode()

    return {name(t): [name(term) for term in added.get(t, ())] for t in read}


class _Network:
    """A float file in the interpreter, which keeps what it computes on the way."""

    def __init__(self, flatbuffer: bytes):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(
            model_content=flatbuffer, experimental_preserve_all_tensors=True
        )
        self._interpreter.allocate_tensors()
        self.entries, _ = tflite.signature(self._interpreter)
        details = self._interpreter.get_tensor_details()
        self._index = {d["name"]: d["index"] for d in details}

    def fitting(self, example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An example in the dtypes of the file's inputs."""
        return {k: v.astype(self.entries[k]["dtype"]) for k, v in example.items()}

    def tensors(self, example: Mapping[str, np.ndarray], names: Iterable[str]):
        """{name: values} of the tensors that it computes of an example."""
        for name, entry in self.entries.items():
            self._interpreter.set_tensor(entry["index"], example[name])
        self._interpreter.invoke()
        return {n: self._interpreter.get_tensor(self._index[n]) for n in names}


if __name__ == "__main__":
    _source, _target, _names, _calibration = sys.argv[1:]
    _arguments = json.loads(_names)
    _float = tflite.flatbuffer(Path(_source).read_bytes(), **_arguments)
    with np.load(_calibration) as _examples:
        _file = quantized(_float, dict(_examples), _arguments["ranges"])
    Path(_target).write_bytes(_file)
