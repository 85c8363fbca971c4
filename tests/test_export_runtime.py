"""Running and measuring exported files in fresh processes."""

import functools
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from squeeze_jax import export
from squeeze_jax.errors import UserError
from squeeze_jax.export import operators, process, runtime

SHAPE = (4, 4, 3)
INPUTS = {"image": jax.ShapeDtypeStruct(SHAPE, np.float32)}
HEAD = np.random.default_rng(0).normal(0, 0.1, (3, 5)).astype(np.float32)
FILES = ("model.stablehlo", "model.tflite", "model_int8.tflite")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (70, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def expected(images):
    """The mean colour times a matrix, in float64 by numpy."""
    return images.astype(np.float64).mean((1, 2)) @ HEAD


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    export.make(
        lambda x: x["image"].mean((1, 2)) @ HEAD,
        INPUTS,
        folder,
        calibration=images,
        check=images[:8],
        int8_agreement=0.8,
    )
    return folder


@pytest.mark.parametrize("name", FILES)
def test_measure(name, folder, images, expected):
    labels = expected.argmax(-1).copy()
    labels[:7] = (labels[:7] + 1) % 5  # 63 of 70 are right
    found = runtime.measure(folder / name, images, labels, runs=40, warmup=2)
    error = np.abs(found["outputs"] - expected).max()
    assert error < (0.04 if "int8" in name else 1e-4) * np.abs(expected).max()
    if "int8" not in name:
        assert found["accuracy"] == pytest.approx(0.9)
    times = found["latency_ms"]
    assert 0 < times["p50"] <= times["p90"] <= times["p99"] < 1000
    assert found["bytes"] == (folder / name).stat().st_size
    assert 0 < found["peak_memory_mb"] < 200
    assert found["open_ms"] > 0
    assert found["runtime"].startswith("jax" if "hlo" in name else "ai-edge-litert")
    if hasattr(os, "sched_getaffinity"):
        assert found["core"] in os.sched_getaffinity(0)
    json.dumps({k: v for k, v in found.items() if k != "outputs"})
    alone = runtime.load(folder / name)(images)
    np.testing.assert_allclose(found["outputs"], alone, atol=1e-4)


def test_ranges_come_from_all_calibration_images(tmp_path):
    """Five bright images after many dark ones: averaged ranges would cut their values to a fraction."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 12, (40, *SHAPE), np.uint8)
    images[35:] = rng.integers(180, 256, (5, *SHAPE), np.uint8)
    (made,) = export.make(
        lambda x: x["image"].mean((1, 2)) @ HEAD,
        INPUTS,
        tmp_path,
        formats=("tflite_int8",),
        calibration=images,
        check=images,
        int8_agreement=0.0,
    )
    expected = images.astype(np.float64).mean((1, 2)) @ HEAD
    error = np.abs(runtime.load(made.path)(images) - expected).max()
    assert error < 0.04 * np.abs(expected).max()


@pytest.mark.parametrize("tool", [runtime, operators])
def test_outputs_that_cannot_be_written_are_refused_before_all_work(tool, tmp_path, capsys):  # fmt: skip
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "file" / "o.npz", f"{tmp_path / 'file'} is no folder"),
        (tmp_path, "it is a folder"),
    ):
        status = tool.main(["missing.tflite", "--image=missing.npy", f"--outputs={path}"])  # fmt: skip
        assert status == process.USER_ERROR
        line = f"--outputs = {str(path)!r}: {reason}; choose another file\n"
        assert capsys.readouterr().err == line


def test_outputs_go_to_a_new_folder_and_home(folder, images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", images[:3])
    monkeypatch.setattr(runtime, "pin", lambda: None)
    assert not runtime.main([str(folder / "model.tflite"), "--examples=~/x.npy", "--outputs=~/new/o.npz", "--runs=0"])  # fmt: skip
    assert next(iter(runtime.read_arrays(tmp_path / "new" / "o.npz").values())).shape == (3, 5)  # fmt: skip


def test_without_labels_there_is_no_accuracy(folder, images):
    found = runtime.measure(folder / "model.tflite", images[:3], runs=1, warmup=0)
    assert found["accuracy"] is None
    assert found["outputs"].shape == (3, 5)


@pytest.mark.parametrize("name", FILES)
def test_load_takes_any_number_of_images(name, folder, images, expected):
    run = runtime.load(folder / name, batch=16)
    whole = run(images)  # 70 = 4 · 16 + 6
    assert whole.shape == (70, 5)
    np.testing.assert_allclose(run(images[69:]), whole[69:], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("model.tflite", "UP.TFLITE"),
        ("model.tflite", "plain"),
        ("model.stablehlo", "Up.StableHLO"),
    ],
)
def test_a_file_of_another_name(name, copy, folder, images, expected, tmp_path):
    path = tmp_path / copy
    path.write_bytes((folder / name).read_bytes())
    outputs = runtime.measure(path, images, runs=1, warmup=0)["outputs"]
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


def test_memory_counts_the_file_and_not_the_images(tmp_path, images):
    """Weights of 40 MB show; 57 MB of images, loaded before the file is opened, do not."""
    weights = np.random.default_rng(0).normal(size=(1000, 10_000)).astype(np.float32)

    def fn(x, wide):  # [b, 3] → [b, 1000] → [b, wide] → [b, 5]
        tall = jnp.tile(x["image"].mean((1, 2)) / 255, (1, 334))[:, :1000]
        return (tall @ wide).reshape(-1, 5, wide.shape[1] // 5).mean(-1)

    peak = {}
    for kind, wide in (("small", weights[:, :10]), ("large", weights)):
        export.make(
            functools.partial(fn, wide=wide),
            INPUTS,
            tmp_path / kind,
            formats=("tflite",),
            check=images[:1],
        )
        many = np.zeros((300_000, *SHAPE), np.float32) if kind == "small" else images
        given = tmp_path / "many.npy"
        np.save(given, many)
        file = tmp_path / kind / "model.tflite"
        printed = process.run_module(
            "squeeze_jax.export.runtime",
            *(file, f"--images={given}", "--runs=2"),
            what="it",
            timeout=120,
        )
        peak[kind] = json.loads(printed)["peak_memory_mb"]
    assert peak["small"] < 25
    assert 40 < peak["large"] - peak["small"] < 250


def test_tflite_needs_neither_jax_nor_tensorflow(folder, images, tmp_path):
    np.save(tmp_path / "x.npy", images[:1])
    code = (
        "import sys\nfrom squeeze_jax.export import runtime\n"
        f"runtime.main([{str(folder / 'model.tflite')!r}, '--images={tmp_path / 'x.npy'}', '--runs=1'])\n"
        "sys.exit(bool({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=process._ROOT)
    assert done.returncode == 0


def test_command_line(folder, images, tmp_path):
    np.save(tmp_path / "x.npy", images[:2])
    command = [sys.executable, "-m", "squeeze_jax.export.runtime"]
    given = [str(folder / "model.tflite"), f"--images={tmp_path / 'x.npy'}", "--runs=5"]
    done = subprocess.run(
        [*command, *given], cwd=process._ROOT, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert len(found["times_ms"]) == 5
    given[0] = str(tmp_path / "none.tflite")
    done = subprocess.run(
        [*command, *given], cwd=process._ROOT, capture_output=True, text=True
    )
    assert done.returncode == process.USER_ERROR
    assert done.stderr == f"no exported file at {given[0]}: export it first\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.tflite", None, "no exported file at .*gone.tflite"),
        (
            "x.onnx",
            b"x",
            r"x.onnx is not an exported file .* expected .stablehlo or .tflite",
        ),
        ("plain", b"x", "plain is not an exported file .* expected .stablehlo or"),
        ("cut.tflite", b"TFL3", r"cut.tflite cannot be run as tflite: \S"),
        ("cut", b"\0\0\0\0TFL3", r"cut cannot be run as tflite: \S"),
        ("cut.stablehlo", b"abcd" * 9, r"cut.stablehlo cannot be run as stablehlo: \S"),
    ],
)
def test_files_that_cannot_be_opened(name, content, message, tmp_path, images):
    path = tmp_path / name
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as here:
        runtime.load(path)
    with pytest.raises(UserError, match=message) as there:
        runtime.measure(path, images, runs=1)
    assert "\n" not in str(here.value) + str(there.value)


@pytest.mark.parametrize("wrong", [(2, 5, 5, 3), (0, 4, 4, 3), (4, 4, 3)])
def test_images_of_another_shape(wrong, folder):
    with pytest.raises(UserError, match=r"the file takes \[n, 4, 4, 3\]"):
        runtime.load(folder / "model.tflite")(np.zeros(wrong))


def test_a_file_that_takes_too_long(folder, images):
    with pytest.raises(process.Crash, match=r"model\.stablehlo .*within 0\.2 s"):
        runtime.measure(folder / "model.stablehlo", images, timeout=0.2)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [("pretrainedResnet.tflite", 0.769), ("pretrainedResnet_quant.tflite", 0.773)],
)
def test_accuracy_of_a_published_file(name, accuracy, shared):
    """MLPerf Tiny's ResNet-8, on every fifth test image; the expected accuracies were measured elsewhere."""
    data = np.load(shared / "data/cifar10/cifar10_jpeg.npz")
    jpeg, ends = data["test_jpeg"].tobytes(), data["test_offsets"]
    images = [
        np.asarray(Image.open(io.BytesIO(jpeg[ends[i] : ends[i + 1]])))
        for i in range(0, 10_000, 5)
    ]
    run = runtime.load(shared / "weights/mlperf_tiny" / name, threads=1)
    right = run(np.stack(images)).argmax(-1) == data["test_labels"][::5]
    assert right.mean() == pytest.approx(accuracy, abs=0.0006)
