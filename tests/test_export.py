"""Export: every format is really run in its own runtime; broken files are found and named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from squeeze_jax import export
from squeeze_jax.errors import UserError
from squeeze_jax.export import process, runtime

SHAPE = (24, 24, 3)
INPUTS = {"image": jax.ShapeDtypeStruct(SHAPE, np.float32)}
FORMATS = ("stablehlo", "tflite", "tflite_int8")
NAMES = {
    "stablehlo": "model.stablehlo",
    "tflite": "model.tflite",
    "tflite_int8": "model_int8.tflite",
}


class Net(nn.Module):
    """The kinds of layers that converters get wrong: strides, groups, depthwise, batch norm, relu6, mean, dense."""

    @nn.compact
    def __call__(self, x):
        stages = {}
        for name, features, groups, strides in (
            ("stem", 32, 1, 2),
            ("depthwise", 32, 32, 1),
            ("pointwise", 64, 1, 1),
            ("grouped", 64, 4, 2),
        ):
            size = (1, 1) if name == "pointwise" else (3, 3)
            conv = nn.Conv(
                features, size, strides, feature_group_count=groups, name=name
            )
            x = nn.BatchNorm(use_running_average=True, name=f"{name}_bn")(conv(x))
            x = stages[name] = nn.relu6(x)
        stages["mean"] = x.mean((1, 2))
        return nn.Dense(10, name="head")(stages["mean"]), stages


class Subject:
    """A network with weights that a test may exchange; `fn` and `stages` are what `export.make` takes."""

    def __init__(self, variables):
        self.variables = variables

    def _apply(self, x):
        return Net().apply(self.variables, (x["image"] - 127.5) / 64)

    def fn(self, x):
        return self._apply(x)[0]

    def stages(self, x):
        return self._apply(x)[1]

    def broken(self, stage):
        """A copy with other weights in one convolution."""
        other = Subject(jax.tree.map(np.copy, self.variables))
        other.variables["params"][stage]["kernel"][...] *= -1
        return other


@pytest.fixture(scope="module")
def pixels():
    """Smooth coloured images of ten kinds, uint8 [48, 24, 24, 3]."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (48, 4, 4, 3))
    return coarse.repeat(6, 1).repeat(6, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def subject(pixels):
    variables = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    rng = np.random.default_rng(0)

    def drawn(
        path, leaf
    ):  # as after training: neither zero nor one, and sure of its classes
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if "mean" in name or "bias" in name:
            return rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        gain = 20 if "head" in name else 1.4
        fan_in = np.prod(leaf.shape[:-1])
        return (gain * rng.normal(0, fan_in**-0.5, leaf.shape)).astype(np.float32)

    subject = Subject(jax.tree_util.tree_map_with_path(drawn, variables))
    features = jax.jit(subject.stages)({"image": pixels.astype(np.float32)})["mean"]
    head = subject.variables["params"][
        "head"
    ]  # centred, so that every class is some image's top
    head["bias"] = -np.asarray(features).mean(0) @ head["kernel"]
    return subject


@pytest.fixture(scope="module")
def exported(subject, pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    made = export.make(
        subject.fn,
        INPUTS,
        folder,
        formats=FORMATS,
        ranges={"image": (0, 255)},
        calibration=pixels,
        check=pixels,
        int8_agreement=0.9,
    )
    return folder, {e.format: e for e in made}


def test_every_format_agrees_with_the_live_model(exported):
    folder, made = exported
    assert tuple(made) == FORMATS
    for key, name in NAMES.items():
        assert made[key].path == folder / name
        assert made[key].bytes == (folder / name).stat().st_size
    assert made["stablehlo"].max_difference <= 1e-4
    assert made["tflite"].max_difference <= 1e-4
    assert made["stablehlo"].agreement == made["tflite"].agreement == 1.0
    assert made["tflite_int8"].agreement >= 0.9
    assert made["tflite_int8"].max_difference > 1e-4
    found = sorted(p.name for p in folder.iterdir())
    assert found == sorted([*NAMES.values(), "model.mlir"])  # and no scratch left


def test_stablehlo_is_for_all_platforms_and_batches(exported, subject, pixels):
    folder, _ = exported
    file = jax_export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    assert file.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 5):
        x = pixels[:batch].astype(np.float32)
        expected = jax.jit(subject.fn)({"image": x})
        np.testing.assert_allclose(file.call(x), expected, atol=1e-4, rtol=1e-4)


def test_text_is_readable(exported):
    folder, _ = exported
    text = (folder / "model.mlir").read_text()
    assert text.count("stablehlo.convolution") >= 4
    assert "dense_resource<__elided__>" in text
    assert max(map(len, text.splitlines())) < 2000  # no constants printed in full


def test_int8_file_is_all_integers(exported):
    folder, made = exported
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / "model_int8.tflite"))
    interpreter.allocate_tensors()
    (entry,), (out,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert entry["dtype"] == out["dtype"] == np.int8
    assert entry["quantization"] == (1.0, -128)  # the pixel minus 128, exactly
    kinds = {d["dtype"] for d in interpreter.get_tensor_details() if d["name"]}
    assert kinds <= {np.int8, np.int32}
    assert made["tflite"].bytes / made["tflite_int8"].bytes >= 2


@pytest.mark.parametrize(
    ("key", "stage"),
    [("stablehlo", "pointwise"), ("tflite", "grouped"), ("tflite_int8", "depthwise")],
)
def test_broken_file_is_rejected_and_its_stage_named(
    key, stage, subject, pixels, tmp_path, monkeypatch
):
    module = __import__(f"squeeze_jax.export.formats.{key}", fromlist=["convert"])
    converts = module.convert

    def convert(fn, inputs, calibration=None):
        sound, subject.variables = subject.variables, subject.broken(stage).variables
        try:
            return converts(fn, inputs, calibration)
        finally:
            subject.variables = sound

    monkeypatch.setattr(module, "convert", convert)
    (tmp_path / NAMES[key]).write_bytes(b"an earlier file")
    images = pixels[:8]
    with pytest.raises(export.Disagreement) as caught:
        export.make(
            subject.fn,
            INPUTS,
            tmp_path,
            formats=(key,),
            calibration=images,
            check=images,
            endpoints_fn=subject.stages,
        )
    error, message = caught.value, str(caught.value)
    assert error.stage == stage
    assert NAMES[key] in message
    assert f"the first diverging output is {stage}" in message
    assert ("config.export.int8_agreement" in message) == (key == "tflite_int8")
    x = {"image": images.astype(np.float32)}
    wrong = np.abs(jax.jit(subject.broken(stage).fn)(x) - jax.jit(subject.fn)(x))
    if (
        key != "tflite_int8"
    ):  # the largest difference and its place, as the live models have it
        np.testing.assert_allclose(error.difference, wrong.max(), rtol=1e-3)
        assert error.index == np.unravel_index(wrong.argmax(), wrong.shape)
    assert (tmp_path / NAMES[key]).read_bytes() == b"an earlier file"
    assert (tmp_path / f"{NAMES[key]}.rejected").stat().st_size > 1000


def test_disagreement_without_stages_names_the_logits(subject, pixels, tmp_path):
    with pytest.raises(export.Disagreement, match=r"at logits\[.* allowed; kept as"):
        export.make(
            subject.fn,
            INPUTS,
            tmp_path,
            formats=("tflite",),
            check=pixels[:2],
            tolerance=1e-12,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model.tflite.rejected"]


def test_a_dead_channel_quantizes(tmp_path):
    """A tensor that is zero on every image has no range; the file is still sound."""
    head = np.linspace(-0.2, 0.2, 12, dtype=np.float32).reshape(3, 4)

    def fn(x):
        mean = x["image"].mean((1, 2))
        return mean @ head + jax.nn.relu(mean @ head - 1000)

    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8)
    (made,) = export.make(
        fn,
        {"image": jax.ShapeDtypeStruct((4, 4, 3), np.float32)},
        tmp_path,
        formats=("tflite_int8",),
        calibration=images,
        check=images,
    )
    expected = images.mean((1, 2), np.float64) @ head
    found = runtime.load(made.path)(images)
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_padding_of_a_maximum_is_no_activation(tmp_path):
    """Max pooling pads with minus infinity, also where all values are negative; it must not widen the range."""
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8)

    def fn(x):
        pads = [(0, 0), (1, 1), (1, 1), (0, 0)]
        window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
        best = jax.lax.reduce_window(
            x["image"] / 2 - 200, -jnp.inf, jax.lax.max, window, strides, pads
        )
        return best.reshape(-1, 12)  # [b, 2, 2, 3], every value below -72

    (made,) = export.make(
        fn,
        {"image": jax.ShapeDtypeStruct((4, 4, 3), np.float32)},
        tmp_path,
        formats=("tflite_int8",),
        calibration=images,
        check=images,
        int8_agreement=0.0,
    )
    padded = np.pad(
        images / 2.0 - 200, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-300
    )
    rows = [padded[:, i : i + 3, j : j + 3].max((1, 2)) for i in (0, 2) for j in (0, 2)]
    found = runtime.load(made.path)(images)
    assert (
        np.abs(found - np.concatenate(rows, -1)).max() < 1.6
    )  # two steps of 200 / 255


def options(**changed):
    images = np.zeros((2, *SHAPE), np.uint8)
    return (
        dict(
            fn=lambda x: x["image"].mean((1, 2)),
            inputs=INPUTS,
            calibration=images,
            check=images,
            formats=("stablehlo",),
        )
        | changed
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(formats=("tflite_int4",)),
            "unknown export format 'tflite_int4'; did you",
        ),
        (
            dict(formats=("tflite_int8",), calibration=None),
            "needs calibration examples",
        ),
        (
            dict(formats=("tflite_int8",), calibration=np.zeros((2, 5, 5, 3))),
            r"image is \[2, 5, 5, 3\], to calibrate, the model takes \[n, 24, 24, 3\]",
        ),
        (dict(check=np.zeros((0, *SHAPE))), r"the model takes \[n, 24, 24, 3\]"),
        (dict(check=np.zeros((2, 8, 8, 3))), r"image is \[2, 8, 8, 3\]"),
        (
            dict(fn=lambda x: jnp.log(x["image"].mean((1, 2)) - 1)),
            "logits for check example 0 are not finite",
        ),
    ],
)
def test_user_errors(changed, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export.make(directory=tmp_path, **options(**changed))
    assert "\n" not in str(caught.value)


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        export.make(directory=tmp_path / "file", **options())


def test_operation_that_the_runtime_lacks(tmp_path):
    """litert-converter writes a sort that LiteRT cannot run."""
    changed = options(
        fn=lambda x: jnp.sort(x["image"].mean((1, 2))), formats=("tflite",)
    )
    with pytest.raises(
        process.Crash, match=r"does not run: model\.tflite cannot .*SORT"
    ):
        export.make(directory=tmp_path, **changed)
    assert list(tmp_path.iterdir()) == []


def test_operation_that_the_converter_lacks(tmp_path):
    def fn(x):
        whole = x["image"].mean((1, 2)).astype(jnp.uint16)
        return (whole @ jnp.ones((3, 4), jnp.uint16)).astype(jnp.float32)

    with pytest.raises(
        process.Crash, match="the conversion to tflite ended with"
    ) as caught:
        export.make(directory=tmp_path, **options(fn=fn, formats=("tflite",)))
    assert "\n" not in str(caught.value)
