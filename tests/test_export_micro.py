"""Integer files in TensorFlow Lite Micro: their outputs, and the memory that the search predicts."""

import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("tflite-micro is built for Linux on x86-64", allow_module_level=True)
from tflite_micro.python.tflite_micro import runtime

from squeeze_jax.export import several
from squeeze_jax.export.inline_buffers import inline_buffers
from squeeze_jax.export.runnable import Spec
from squeeze_jax.jobs import _piece_files, _plugs
from squeeze_jax.nas import costs, limits
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.family import Family
from tests.benchmarks.arena import arena

SHAPE = (32, 32, 3)
OPTIONS = dict(name="ofa_mobilenet_v3", variant="cifar", num_classes=10, stem_strides=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(file of the space's smallest network in int8, the peak memory that a search predicts, in bytes)."""
    image = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    family = Family(OPTIONS, _plugs.plain(image))
    arch = family.space.smallest()
    model = family.network(arch)
    variables = _piece_files.random_variables(family.shapes(model))
    specs = {"image": Spec(SHAPE, np.dtype("float32"))}
    folder = tmp_path_factory.mktemp("files")

    def network(x):
        return model.apply(variables, x["image"])[0]

    job = several.Job("net", network, specs, _piece_files.random_examples(specs, 8))
    several.convert([job], folder, "tflite_int8")
    memory = limits.cost("memory", costs.Pieces(family, image))
    return (folder / "net.tflite").read_bytes(), float(
        memory.of(spaces.stack([arch]))[0]
    )


def test_a_large_integer_file_computes_the_same(exported):
    """It has more than 256 KiB of weights. The kernels of the two runtimes round differently, by a step in a layer."""
    content, _ = exported
    assert len(content) > 2**18
    pixels = np.random.default_rng(0).integers(-128, 128, (1, *SHAPE), np.int8)
    micro = runtime.Interpreter.from_bytes(content)
    micro.set_input(pixels, 0)
    micro.invoke()
    lite = Interpreter(model_content=content)
    lite.allocate_tensors()
    lite.set_tensor(lite.get_input_details()[0]["index"], pixels)
    lite.invoke()
    expected = lite.get_tensor(lite.get_output_details()[0]["index"]).astype(int)
    assert np.ptp(expected) > 100
    np.testing.assert_allclose(micro.get_output(0).astype(int), expected, atol=3)


def test_the_predicted_memory_is_what_the_runtime_plans(exported):
    content, predicted = exported
    head, _ = arena(content)
    assert head == predicted


def test_a_file_whose_weights_are_inside_stays_as_it_is(exported):
    assert inline_buffers(exported[0]) is exported[0]
