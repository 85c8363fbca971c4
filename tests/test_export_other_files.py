"""TFLite files of other tools: published ones, and files with any names, signatures, shapes and types of inputs."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flatbuffers import Builder
from jax import export as jax_export

from squeeze_jax.export import operators, runtime, time_files
from squeeze_jax.export.formats import tflite

PUBLISHED = (
    "mlperf_tiny/pretrainedResnet.tflite",
    "mlperf_tiny/pretrainedResnet_quant.tflite",
    "mlperf_tiny/vww_96_float.tflite",
    "mlperf_tiny/vww_96_int8.tflite",
    "tflite/mobilenet_v2_1.0_224_quant.tflite",
)


def interpreted(path, arrays):
    """Runs a file in LiteRT's interpreter alone; arrays and results are raw, in the file's order."""
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    entries = interpreter.get_input_details()
    for entry, array in zip(entries, arrays, strict=True):
        interpreter.set_tensor(entry["index"], array)
    interpreter.invoke()
    return [
        interpreter.get_tensor(e["index"]) for e in interpreter.get_output_details()
    ]


def written(path, fn, *arrays, tensors=None, signatures=None):
    """Converts fn(*arrays) → a tuple to a TFLite file, under other names than ours.

    tensors: names of the inputs' tensors. signatures: names of signatures, all of the same graph; none by default.
    """
    program = jax_export.export(jax.jit(fn), platforms=("cpu",))(*arrays)
    content = tflite.to_flatbuffer(
        program.mlir_module_serialized,
        inputs=[f"in{i}" for i in range(len(arrays))],
        outputs=[f"out{i}" for i in range(len(program.out_avals))],
    )
    model = schema.ModelT.InitFromPackedBuf(content)
    (own,) = model.signatureDefs
    graph = model.subgraphs[0]
    # The converter may put the arguments in another order; another tool would not.
    at = {each.name: each.tensorIndex for each in (*own.inputs, *own.outputs)}
    at = {(k.decode() if isinstance(k, bytes) else k): v for k, v in at.items()}
    graph.inputs = [at[f"in{i}"] for i in range(len(arrays))]
    graph.outputs = [at[f"out{i}"] for i in range(len(program.out_avals))]
    for index, name in zip(graph.inputs, tensors or (), strict=bool(tensors)):
        graph.tensors[index].name = name.encode()
    model.signatureDefs = []
    for name in signatures or ():
        one = schema.SignatureDefT()
        one.inputs, one.outputs = own.inputs, own.outputs
        one.signatureKey, one.subgraphIndex = name.encode(), 0
        model.signatureDefs.append(one)
    builder = Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_profiled_and_measured(shared, name):
    path = shared / "weights" / name
    entry = Interpreter(str(path)).get_input_details()[0]
    pixels = np.random.default_rng(0).integers(0, 2, entry["shape"])
    scale, zero = entry["quantization"]
    raw = pixels / scale + zero if scale else pixels
    (expected,) = interpreted(path, [np.rint(raw).astype(entry["dtype"])])
    found = operators.measure(path, pixels, runs=2, warmup=1)
    assert len(found.operators) > 5
    scale, zero = Interpreter(str(path)).get_output_details()[0]["quantization"]
    # XNNPACK and the interpreter's own kernels round each of MobileNetV2's 52 layers in their own ways.
    step = scale * (10 if "mobilenet" in name else 1) or 1e-5
    expected = (expected.astype(np.float32) - zero) * scale if scale else expected
    np.testing.assert_allclose(found.outputs["logits"], expected, atol=1.01 * step)
    measured = runtime.measure(path, pixels, runs=2, warmup=1)
    np.testing.assert_allclose(measured["outputs"], expected, atol=1.01 * step)


def test_the_command_runs_a_published_file_without_an_example(shared, capsys):
    path = shared / "weights" / PUBLISHED[1]
    assert operators.main([str(path), "--runs=2", "--warmup=1"]) == 0
    assert "a run without, median" in capsys.readouterr().out


def test_a_name_that_is_not_utf_8(shared, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.tflite")
    shutil.copyfile(shared / "weights" / PUBLISHED[1], path)
    assert operators.main([str(path), "--runs=2", "--warmup=1"]) == 0
    assert "a run without, median" in capsys.readouterr().out
    assert (
        time_files.main([str(tmp_path), "--rounds=1", "--runs=2", "--seconds=0"]) == 0
    )
    (_, row) = map(json.loads, (tmp_path / "times_1.jsonl").read_text().splitlines())
    assert row["file"] == path.name
    assert row["ms"] > 0


def mixed(a, b, c):
    return (a * 2 + b.astype(np.float32), c.astype(np.int32) - b)


MIXED = (
    np.arange(3, dtype=np.float32)[None],
    np.array([[10, 20, 30]], np.int32),
    np.array([[7, 8, 9]], np.int16),
)
# By hand: 2 [0 1 2] + [10 20 30], and [7 8 9] - [10 20 30].
SUMS = [[10, 22, 34]], [[-3, -12, -21]]


@pytest.mark.parametrize("signatures", [None, ["only"], ["first", "second"]])
def test_inputs_of_several_types_under_misleading_names(tmp_path, signatures):
    names = ("input_1", "input_2", "input_0")  # ours, where a file has none, turned
    path = written(
        tmp_path / "m.tflite", mixed, *MIXED, tensors=names, signatures=signatures
    )
    prefixes = ("in", "out") if signatures else ("input_", "output_")
    example = {f"{prefixes[0]}{i}": array for i, array in enumerate(MIXED)}
    found = operators.measure(path, example, runs=1, warmup=0).outputs
    live = runtime.load(path)(example)
    for outputs in found, live:
        assert list(outputs) == [f"{prefixes[1]}{i}" for i in range(2)]
        for value, expected in zip(outputs.values(), SUMS, strict=True):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_any_integer_type_without_a_scale(tmp_path, dtype):
    values = np.array([[0, 1, 1]]).astype(dtype)
    path = written(tmp_path / "m.tflite", lambda x: (x.astype(np.float32) + 1,), values)
    found = operators.measure(path, values, runs=1, warmup=0).outputs["logits"]
    np.testing.assert_array_equal(found, [[1, 2, 2]])
    np.testing.assert_array_equal(runtime.load(path)(values), [[1, 2, 2]])


def test_inputs_that_share_no_axis_of_examples(tmp_path):
    """A product of [2, 3] and [3, 2], and a scalar: the file runs once for each example of all three."""
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b, c = np.ones((3, 2), np.float32), np.float32(5)
    path = written(tmp_path / "m.tflite", lambda a, b, c: (a @ b + c, a + c), a, b, c)
    example = {"input_0": a[None], "input_1": b[None], "input_2": c[None]}
    found = operators.measure(path, example, runs=1, warmup=0).outputs
    twice = {name: np.concatenate([x, x]) for name, x in example.items()}
    live = runtime.load(path)(twice)
    # Sums of the rows 0 1 2 and 3 4 5, plus 5.
    np.testing.assert_array_equal(found["output_0"], [[[8, 8], [17, 17]]])
    np.testing.assert_array_equal(live["output_0"], 2 * [[[8, 8], [17, 17]]])
    np.testing.assert_array_equal(live["output_1"], 2 * [[[5, 6, 7], [8, 9, 10]]])


def test_a_batch_of_several_is_profiled_on_one_example(tmp_path):
    values = np.ones((4, 3), np.float32)
    path = written(tmp_path / "m.tflite", lambda x: (x * 3,), values)
    found = operators.measure(path, values[:1], runs=1, warmup=0).outputs["logits"]
    np.testing.assert_array_equal(found, [[3, 3, 3]])
    np.testing.assert_array_equal(runtime.load(path)(values[:3]), np.full((3, 3), 3))


def test_the_commands_print_one_line_for_a_file_they_cannot_read(tmp_path, capsys):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    assert operators.main([str(path)]) != 0
    examples = tmp_path / "x.npy"
    np.save(examples, np.zeros((1, 3)))
    assert runtime.main([str(path), f"--examples={examples}"]) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(str(path) in line for line in lines)


def test_the_runtime_command_measures_a_published_file(shared, tmp_path, capsys):
    examples = tmp_path / "x.npy"
    np.save(examples, np.zeros((2, 32, 32, 3)))
    path = shared / "weights" / PUBLISHED[0]
    assert runtime.main([str(path), f"--examples={examples}", "--runs=2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["times_ms"]) == 2
