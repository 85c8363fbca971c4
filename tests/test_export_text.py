"""Export of networks of several integer inputs, and of several outputs: toy SqueezeBERTs through every format."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import export, models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.export import build, operators, parity, process, runnable, runtime
from squeeze_jax.export.formats import tflite, tflite_dynamic
from squeeze_jax.jobs import _experiment, _workdir, benchmark, fit
from squeeze_jax.jobs import export as export_job
from squeeze_jax.nn.conv import lowering

LENGTH = 12
INPUTS = {
    name: jax.ShapeDtypeStruct((LENGTH,), np.int32)
    for name in ("tokens", "segments", "attended")
}
FILES = {
    "stablehlo": "model.stablehlo",
    "tflite": "model.tflite",
    "tflite_dynamic": "model_dynamic.tflite",
    "tflite_int8": "model_int8.tflite",
}
OUTPUTS = {"classification": ["logits"], "span": ["start", "end"]}
FORMATS = ("stablehlo", "tflite_dynamic", "tflite_int8")  # of the jobs
INTEGER = ("tflite_dynamic", "tflite_int8")


def sentences(n):
    """Sequences of 4 to 12 tokens, {name: int32 [n, LENGTH]}."""
    rng = np.random.default_rng(0)
    attended = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (n, 1))
    found = {
        "tokens": rng.integers(1, 99, (n, LENGTH)),
        "segments": rng.integers(0, 2, (n, LENGTH)),
        "attended": 1,
    }
    return {k: (v * attended).astype(np.int32) for k, v in found.items()}


def network(task, model="squeezebert", **options):
    """A function as `export.make` takes it, and one that returns its stages."""
    net = models.make(model, variant="toy", task=task, num_classes=3, **options)
    rng = np.random.default_rng(0)
    x = {"tokens": jnp.ones((1, LENGTH), jnp.int32)}
    variables = tree.map_named(
        lambda name, a: rng.normal(name.endswith("/scale"), 0.2, a.shape).astype("f"),
        jax.eval_shape(net.init, jax.random.key(0), x),
    )

    def apply(x):
        x = {k: x[k] for k in ("tokens", "segments")} | {"attended": x["attended"] != 0}
        with lowering("native"):
            return net.apply(variables, x, train=False)

    return lambda x: apply(x)[0], lambda x: apply(x)[1]


@pytest.fixture(scope="module", params=OUTPUTS)
def exported(request, tmp_path_factory):
    """(task, live function, folder, {format: Exported})."""
    folder, x = tmp_path_factory.mktemp(request.param), sentences(24)
    fn, _ = network(request.param)
    made = export.make(
        fn,
        INPUTS,
        folder,
        formats=tuple(FILES),
        calibration=x,
        check=x,
        int8_agreement=0.7,
    )
    return request.param, fn, folder, {e.format: e for e in made}


def test_every_format_agrees(exported):
    task, fn, folder, made = exported
    x = sentences(24)
    live = runnable.name_outputs(jax.jit(fn)(x))
    for key, name in FILES.items():
        assert made[key].path == folder / name
        found = runnable.name_outputs(runtime.load(folder / name)(x))
        assert found.keys() == set(OUTPUTS[task])
        for output, values in found.items():
            assert values.shape == live[output].shape
            error = np.sqrt(np.mean((values - live[output]) ** 2))
            scale = np.sqrt(np.mean(live[output] ** 2))
            # Each rounding to 8 bits adds half a percent or so.
            assert error <= {"tflite_dynamic": 0.04, "tflite_int8": 0.12}.get(
                key, 1e-5
            ) * float(scale)
    assert made["tflite_dynamic"].bytes < 0.8 * made["tflite"].bytes


def test_what_is_not_attended_does_not_count(exported):
    """Also with fixed ranges of 8 bits, in which the lowest float has no place: padding may be any token."""
    _, _, folder, _ = exported
    x = sentences(24)
    other = x | {"tokens": np.where(x["attended"], x["tokens"], 7)}
    for key, name in FILES.items():
        run = runtime.load(folder / name, batch=24)
        one, two = runnable.name_outputs(run(x)), runnable.name_outputs(run(other))
        for output, values in one.items():
            seen = x["attended"] == 1
            seen = seen if values.shape == seen.shape else np.ones(values.shape, bool)
            scale = np.abs(values[seen]).max()
            limit = 0.1 if key == "tflite_int8" else 0.04 if key in INTEGER else 1e-5
            assert np.abs(values - two[output])[seen].max() <= limit * scale


def test_stablehlo_takes_a_mapping(exported):
    task, fn, folder, _ = exported
    file = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    x = sentences(5)
    found, expected = (
        runnable.name_outputs(file.call(x)),
        runnable.name_outputs(jax.jit(fn)(x)),
    )
    assert found.keys() == set(OUTPUTS[task])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_names_are_those_of_the_signature(exported):
    from ai_edge_litert.interpreter import Interpreter

    task, _, folder, _ = exported
    for name in ("model.tflite", "model_int8.tflite"):
        ends = Interpreter(str(folder / name)).get_signature_list()["serving_default"]
        assert set(ends["inputs"]) == set(INPUTS)
        assert set(ends["outputs"]) == set(OUTPUTS[task])


def test_dynamic_weights_are_integers_and_activations_floats(exported):
    from ai_edge_litert.interpreter import Interpreter

    _, _, folder, _ = exported
    interpreter = Interpreter(str(folder / "model_dynamic.tflite"))
    interpreter.allocate_tensors()
    details = {d["name"]: d["dtype"] for d in interpreter.get_tensor_details()}
    kernels = [d for d in interpreter.get_tensor_details() if len(d["shape"]) == 4]
    kernels = [d for d in kernels if d["dtype"] == np.int8]
    assert len(kernels) == 12  # six convolutions in each of two layers
    assert np.float32 in details.values()
    entries, exits = tflite.signature_details(interpreter)
    assert {e["dtype"] for e in entries.values()} == {np.int32}
    assert {e["dtype"] for e in exits.values()} == {np.float32}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"segments": None},
            r"the file takes attended, segments, tokens: segments is missing",
        ),
        ({"segment": 0}, "has no input 'segment'; did you mean 'segments'"),
        (
            {"tokens": np.zeros((3, 9), np.int32)},
            r"tokens is \[3, 9\], the file takes \[n, 12\]",
        ),
        (
            {"tokens": np.zeros((3, 12), np.float32)},
            "tokens is float32, the file takes int32",
        ),
        (
            {"segments": np.zeros((2, 12), bool)},
            "segments has 2 examples, attended has 3",
        ),
        ("all", "takes attended, segments, tokens: give an array for each"),
    ],
)
@pytest.mark.parametrize("name", ["model.tflite", "model.stablehlo"])
def test_wrong_inputs(name, changed, message, exported):
    x = sentences(3)
    if changed == "all":
        x = x["tokens"]
    else:
        x = {k: v for k, v in (x | changed).items() if v is not None}
    with pytest.raises(UserError, match=message) as caught:
        runtime.load(exported[2] / name)(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["check", "calibration"])
def test_wrong_examples_for_make(given, tmp_path):
    x = sentences(3)
    options = dict(check=x, calibration=x, formats=("tflite_int8",))
    options[given] = {k: v for k, v in x.items() if k != "attended"}
    with pytest.raises(UserError, match=r"the model takes .*: attended is missing"):
        export.make(network("span")[0], INPUTS, tmp_path, **options)


def test_an_input_that_the_network_does_not_read_stays(tmp_path):
    """DistilBERT has no segments; its files take them all the same."""
    x = sentences(4)
    fn, _ = network("classification", "distilbert")
    made = export.make(
        lambda x: fn(x | {"segments": None}),
        INPUTS,
        tmp_path,
        formats=("stablehlo", "tflite", "tflite_int8"),
        calibration=x,
        check=x,
        int8_agreement=0,
    )
    for each in made:
        assert runtime.load(each.path)(x).shape == (4, 3)


def test_the_stage_where_a_file_diverges_is_named(tmp_path, monkeypatch):
    """A file with other weights in the second layer; the stages are those of the encoder, in its order."""
    fn, stages = network("classification")
    other, broken = network("classification", layer_epsilon=1.0)
    swapped = {fn: other, stages: broken}
    converts = tflite_dynamic.convert

    def convert(given, inputs, calibration=None):
        return converts(swapped[given], inputs, calibration)

    def compare(*args, int8_agreement, **more):
        return parity.compare(*args, int8_agreement=1.01, **more)

    monkeypatch.setattr(tflite_dynamic, "convert", convert)
    monkeypatch.setattr(build, "compare", compare)
    with pytest.raises(export.Disagreement) as caught:
        export.make(
            fn,
            INPUTS,
            tmp_path,
            formats=("tflite_dynamic",),
            check=sentences(4),
            endpoints_fn=stages,
        )
    assert caught.value.stage == "layer1"


def test_measured_alone(exported, tmp_path):
    _, _, folder, _ = exported
    x = sentences(3)
    found = runtime.measure(folder / "model_dynamic.tflite", x, runs=3, warmup=1)
    expected = runtime.load(folder / "model_dynamic.tflite", threads=1)(x)
    for name, values in runnable.name_outputs(found["outputs"]).items():
        np.testing.assert_allclose(
            values, runnable.name_outputs(expected)[name], atol=1e-5
        )
    np.savez(tmp_path / "x.npz", **x)
    command = [sys.executable, "-m", "squeeze_jax.export.runtime"]
    given = [str(folder / "model.tflite"), f"--examples={tmp_path / 'x.npz'}"]
    done = subprocess.run(
        [*command, *given, "--runs=2"],
        cwd=process._ROOT,
        capture_output=True,
        text=True,
    )
    assert len(json.loads(done.stdout)["times_ms"]) == 2
    (tmp_path / "x.npz").write_text("no archive")
    done = subprocess.run(
        [*command, *given], cwd=process._ROOT, capture_output=True, text=True
    )
    assert done.returncode == process.USER_ERROR
    assert "cannot read examples from" in done.stderr


def test_operators(exported):
    task, _, folder, _ = exported
    x = sentences(1)
    found = operators.measure(folder / "model.tflite", x, runs=3, warmup=1)
    expected = runnable.name_outputs(runtime.load(folder / "model.tflite")(x))
    assert found.outputs.keys() == set(OUTPUTS[task])
    for name, values in expected.items():
        np.testing.assert_allclose(found.outputs[name], values, atol=1e-5)
    assert {"layer1/attention/query", "layer2/ffn_out"} <= {
        (layer or "").replace("layer2._ffn/", "") for layer in found.by_layer()
    }
    with pytest.raises(UserError, match="on one example"):
        operators.measure(folder / "model.tflite", sentences(2), runs=1)


def test_noise_fits_every_table():
    inputs = {
        "image": runnable.Spec((2, 2, 3), np.dtype(np.float32)),
        "tokens": runnable.Spec((5,), np.dtype(np.int32)),
    }
    made = operators.random_example(inputs)
    assert made["image"].shape == (1, 2, 2, 3)
    assert 200 < made["image"].max() <= 255
    assert made["tokens"].dtype == np.int32
    assert not made["tokens"].any()


def test_jobs_of_text(tmp_path, capsys):
    """Trained on short and long sentences, exported, and measured: files are as accurate as the network."""
    good, bad, words = ("fine", "great"), ("dull", "grim"), ("a", "film", "the", "plot")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (tmp_path / "vocab.txt").write_text("\n".join((*special, *good, *bad, *words)))
    rng = np.random.default_rng(0)
    for split, count in ("train", 96), ("dev", 25):
        lines = ["sentence\tlabel"]
        for i in range(count):
            text = [
                *rng.choice(words, rng.integers(1, 9)),
                rng.choice((bad, good)[i % 2]),
            ]
            lines.append(f"{' '.join(text)}\t{i % 2}")
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    config = {
        "data": {
            "name": "glue",
            "task": "sst2",
            "folder": str(tmp_path),
            "tokenizer": str(tmp_path / "vocab.txt"),
            "length": 12,
            "buckets": (8,),
        },
        "model": {
            "name": "squeezebert",
            "variant": "toy",
            "layers": 1,
            "vocabulary": 13,
        },
        "optim": {"name": "adamw", "lr": 5e-3, "warmup": 0.1},
        "batch": 16,
        "steps": 60,
        "export": {"formats": FORMATS, "check": 20, "calibration": 40},
        "benchmark": {"runs": 2, "warmup": 1},
    }
    built = _experiment.build(_experiment.check(config))
    _workdir.begin(tmp_path / "run", config)
    _workdir._locks.popitem()[1].close()
    fit.run(built, tmp_path / "run")
    export_job.run(built, tmp_path / "run")
    said = capsys.readouterr().out
    assert all(f"{FILES[key]} · " in said for key in FORMATS)
    benchmark.run(built, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows[1:]] == [FILES[key] for key in FORMATS]
    live = rows[0]["accuracy"]
    assert live > 0.9
    for row in rows[1:]:
        assert row["accuracy"] == pytest.approx(live, abs=0.081)  # two of 25
        assert row["accuracy"] == live or "int8" in row["model"]
