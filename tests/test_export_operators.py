"""Operators of LiteRT files: the runtime's own times, and which layer each belongs to."""

import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import export
from squeeze_jax.errors import UserError
from squeeze_jax.export import operators, process, runtime
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.matching import Node, count_unmatched_products, match_layers
from squeeze_jax.export.runnable import Spec
from squeeze_jax.nn import activations

SHAPE = (48, 48, 3)


class Uneven(nn.Module):
    """A 3x3 convolution of 43 M MACs, 32 in, 64 out, between ones of 0.2 M and 0.3 M."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (1, 1), name="first")(x))
        x = nn.relu(nn.Conv(64, (3, 3), name="heavy")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (1, 1), name="light")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    module = Uneven()
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, *SHAPE)))
    images = np.random.default_rng(0).integers(0, 256, (16, *SHAPE), np.uint8)
    export.make(
        lambda x: module.apply(variables, x["image"] / 255),
        {"image": jax.ShapeDtypeStruct(SHAPE, np.float32)},
        folder,
        formats=("tflite", "tflite_int8"),
        calibration=images,
        check=images[:4],
        int8_agreement=0,
    )
    return folder


@pytest.mark.parametrize("name", ["model.tflite", "model_int8.tflite"])
def test_measure(folder, name):
    image = np.random.default_rng(1).integers(0, 256, (1, *SHAPE))
    found = operators.measure(folder / name, image, runs=20, warmup=3)
    layers = found.by_layer()
    assert {"first", "heavy", "light", "head"} <= layers.keys()
    assert layers.keys() <= {"first", "heavy", "light", "head", "Uneven", None}
    # 43 of 43.5 M MACs
    assert layers["heavy"] > 0.5 * sum(layers.values())
    assert layers["heavy"] > 5 * layers["light"]
    total = sum(ms for *_, ms in found.operators)
    assert total + found.elsewhere_ms == pytest.approx(found.profiled_ms)
    times = found.latency_ms
    assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    # It is the network: the interpreter, which has no profiler, returns the same.
    expected = runtime.run(folder / name, image)["outputs"]
    np.testing.assert_allclose(
        found.outputs["logits"], expected["logits"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["UP.TFLITE", "plain", "model.v2"])
def test_a_tflite_file_of_another_name(folder, tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "pin", lambda: None)
    path = tmp_path / name
    path.write_bytes((folder / "model.tflite").read_bytes())
    assert operators.main([str(path), "--runs=1", "--warmup=0"]) == 0
    assert "heavy" in capsys.readouterr().out


def test_operators_of_a_file(folder):
    found = operators.read_operators(folder / "model.tflite")
    found = [(node.kind, node.layer) for node in found]
    convolutions = [layer for kind, layer in found if kind == "CONV_2D"]
    assert convolutions == ["first", "heavy", "light"]
    assert ("FULLY_CONNECTED", "head") in found  # whose result is called logits
    assert ("MAX_POOL_2D", "Uneven") in found


class Divided(nn.Module):
    """Of 13 M MACs in three layers 12 M are in one; XNNPACK has no cumulative sum, so it gets the graph in two parts."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(16, (1, 1), name="first")(x))
        left = nn.Dense(8, name="behind")(jnp.cumsum(y, 1).mean((1, 2)))
        right = nn.Conv(8, (5, 5), name="heavy")(y)
        return left + right.mean((1, 2))


def test_a_graph_in_parts_has_its_times_in_the_right_layers(tmp_path):
    module = Divided()
    x = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    variables = jax.device_get(jax.jit(module.init)(jax.random.key(0), x))
    export.make(
        lambda x: module.apply(variables, x["x"]),
        {"x": jax.ShapeDtypeStruct(SHAPE, np.float32)},
        tmp_path,
        formats=("tflite",),
        check={"x": x},
    )
    found = operators.measure(tmp_path / "model.tflite", x[:1], runs=20, warmup=3)
    outside = [name for name, *_ in found.operators if "CUMSUM" in name.upper()]
    assert outside
    layers = found.by_layer()
    assert {"first", "heavy", "behind"} <= layers.keys()
    assert layers["heavy"] > 3 * layers["first"]
    assert layers["heavy"] > 20 * layers["behind"]
    for name, layer, _ in found.operators:
        assert (layer == "behind") <= (not name.startswith("Convolution")), (
            name,
            layer,
        )


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("jit(f)/Net/c_norm/mul;jit(f)/Net/c/conv_general_dilated1", "c"),
        ("jit(f)/Net/fire2/jit(relu)/max", "fire2"),
        ("jit(f)/Net/fire2/squeeze/dot_general;jit(f)/Net/other/add", "fire2/squeeze"),
        ("jit(<lambda>)/Net/div;jit(<lambda>)/Net/reduce_sum1", "Net"),
        ("jit(f)/mul", None),
        ("serving_default_logits_output", None),
    ],
)
def test_layer_of_a_tensor(tensor, layer):
    assert operators.layer_in_name(tensor) == layer


FILE = [
    Node(*row)
    for row in (
        ("SUB", None),
        ("CONV_2D", "a"),
        ("PAD", "b"),
        ("DEPTHWISE_CONV_2D", "b"),
        ("ADD", "c"),
        ("RESHAPE", "d"),
        ("CONCATENATION", "e"),
        ("FULLY_CONNECTED", "f"),
        ("CUMSUM", "g"),
    )
]


def test_matching_by_hand():
    """The pad is part of the convolution, the reshape nothing; a concatenation is two copies, a clamp of nobody."""
    ran = [
        ("Subtract (ND)", None),
        ("Convolution (NHWC, F32) IGEMM", None),
        ("Convolution (NHWC, F32) DWConv", None),
        ("Add (ND)", None),
        ("Copy (NC, X32)", None),
        ("Copy (NC, X32)", None),
        ("Clamp (NC, F32)", None),
        ("Fully Connected (NC, F32) GEMM", None),
        ("CUMSUM", 8),  # which the delegate does not take
    ]
    expected = [None, "a", "b", "c", "e", "e", None, "f", "g"]
    assert match_layers(ran, FILE) == expected


def test_no_layers_where_the_products_differ():
    ran = [("Convolution (NHWC, F32) IGEMM", None), ("Add (ND)", None), ("CUMSUM", 8)]
    assert match_layers(ran, FILE) == [None, None, "g"]
    assert count_unmatched_products(ran, FILE) == 1


def test_parts_of_a_graph_are_matched_by_their_tensors():
    """A convolution beside an operator that the delegate lacks runs before it, and one behind it after it."""
    file = [
        Node("CONV_2D", "first", (0, 10), (1,)),
        Node("CUMSUM", "own", (1,), (2,)),
        Node("FULLY_CONNECTED", "behind", (2, 11), (3,)),
        Node("CONV_2D", "beside", (1, 12), (4,)),
        Node("ADD", "sum", (3, 4), (5,)),
    ]
    convolution, connected = (
        "Convolution (NHWC, F32) IGEMM",
        "Fully Connected (NC, F32)",
    )
    ran = [(convolution, None), (convolution, None), ("CUMSUM", 1), (connected, None)]
    ran.append(("Add (ND)", None))
    assert match_layers(ran, file) == ["first", "beside", "own", "behind", "sum"]
    assert count_unmatched_products(ran, file) == 0
    # A convolution is no fully connected layer, so these are other operators than the file's.
    other = [(convolution, None), (connected, None), ("CUMSUM", 1), (convolution, None)]
    assert match_layers(other, file) == ["first", "beside", "own", None]
    assert count_unmatched_products(other, file) == 1


def test_errors(folder, tmp_path, monkeypatch):
    image = np.zeros((1, *SHAPE))
    with pytest.raises(UserError, match="no exported file at"):
        operators.measure(tmp_path / "none.tflite", image)
    for name in "model.stablehlo", "plain":
        (tmp_path / name).write_bytes(b"not TFLite")
        with pytest.raises(UserError, match=rf"{name}: only operators of \.tflite"):
            operators.measure(tmp_path / name, image)
    with pytest.raises(
        UserError, match=r"image is \[1, 2, 2, 3\], the file takes \[n, "
    ):
        operators.measure(folder / "model.tflite", image[:, :2, :2])
    with pytest.raises(UserError, match="runs = 0: at least one"):
        operators.measure(folder / "model.tflite", image, runs=0)
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"TFL3" * 100)
    with pytest.raises((UserError, process.Crash), match=r"broken\.tflite"):
        operators.measure(broken, image)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.4.0")
    with pytest.raises(UserError, match=r"needs ai-edge-litert 2\.3\.0, but 2\.4\.0"):
        operators.litert_c.library()


def test_gelu_is_one_operator_of_a_file(tmp_path):
    path = tmp_path / "gelu.tflite"
    inputs = {"image": Spec((2, 2, 3), np.dtype(np.float32))}
    (content,) = tflite.convert(lambda x: activations.gelu(x["image"]), inputs).values()
    path.write_bytes(content)
    assert [node.kind for node in operators.read_operators(path)] == ["GELU"]


def test_the_table_states_every_operator_and_what_none_took():
    found = {
        "operators": [
            ("Convolution (NHWC, F32) IGEMM", "heavy", 0.25),
            ("Copy", None, 0.5),
        ],
        "elsewhere_ms": 0.125,
        "profiled_ms": 0.875,
        "times_ms": [0.5, 0.75, 4.0],
    }
    lines = [line.split("  ") for line in operators.text(found).splitlines()]
    rows = [[part.strip() for part in line if part.strip()] for line in lines]
    assert rows == [
        ["operator", "layer", "ms"],
        ["Convolution (NHWC, F32) IGEMM", "heavy", "0.2500"],
        ["Copy", "-", "0.5000"],
        ["elsewhere", "-", "0.1250"],
        ["a run with the profiler", "0.8750"],
        ["a run without, median", "0.7500"],
    ]
