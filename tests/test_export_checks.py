"""What cannot become a file is said before it is one; ranges and limits are the examples' and the outputs' own."""

import os
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from squeeze_jax import export
from squeeze_jax.errors import UserError
from squeeze_jax.export import class_names, operators, parity, process
from squeeze_jax.nn import composite
from squeeze_jax.nn.activations import gelu
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.norm import BatchNorm

LENGTH, SIZE = 6, 3
INPUTS = {"x": jax.ShapeDtypeStruct((LENGTH, SIZE), jnp.float32)}


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(5, LENGTH, SIZE)).astype(np.float32)


class Trained(nn.Module):
    """A network in training mode: batch statistics, or dropout."""

    dropout: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if self.dropout:
            return nn.Dropout(0.5, deterministic=False)(x)
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("formats", [("stablehlo",), ("tflite",)])
@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        (True, "is random: the function draws random numbers"),
        (False, "changes with the other examples"),
    ],
)
def test_a_network_in_training_mode_is_said_so(
    x, tmp_path, dropout, message, formats, count
):
    model, key = Trained(dropout), jax.random.key(0)
    rngs = {"params": key, "dropout": key}
    variables = jax.device_get(jax.jit(model.init)(rngs, x))

    def fn(batch):
        arguments = dict(rngs={"dropout": key}, mutable=["batch_stats"])
        return model.apply(variables, batch["x"], **arguments)[0]

    with pytest.raises(UserError, match=f"{message}.*training mode.*train=False"):
        export.make(fn, INPUTS, tmp_path, formats=formats, check={"x": x[:count]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_network_is_told_how_to_cast(x, tmp_path, dtype):
    model = nn.Sequential(
        [nn.Dense(3, dtype=dtype), jnp.tanh, nn.Dense(2, dtype=dtype)]
    )
    variables = jax.device_get(model.init(jax.random.key(0), x))

    def fn(batch):
        return model.apply(
            variables, jnp.pad(batch["x"].astype(dtype), ((0, 0), (1, 1), (0, 0)))
        )

    words = rf"computes in {dtype} \(.*\), and LiteRT in float32: .*dtype=jnp\.float32.*a\.astype"
    with pytest.raises(process.Crash, match=words) as caught:
        export.make(fn, INPUTS, tmp_path, formats=("tflite",), check={"x": x})
    assert "\n" not in str(caught.value)


def test_random_numbers_that_stay_the_same_are_exported(x, tmp_path):
    """Fixed random features are no training mode."""

    def fn(batch):
        features = jax.random.normal(jax.random.key(3), (SIZE, 4))
        return batch["x"] @ features

    export.make(fn, INPUTS, tmp_path, formats=("stablehlo",), check={"x": x})


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda a: (a["x"], {"e": a["x"]}), r"a tuple of outputs and a dict.*\[0\]"),
        (lambda a: {"o": {"p": a["x"]}}, "output 'o' is of type dict.*flat dict"),
        (lambda a: None, "of type NoneType: it should return an array"),
        (lambda a: {}, "returns nothing"),
        (lambda a: a["x"].sum(), r"logits is \[\] for 2 examples"),
        (lambda a: a["x"].sum(0), r"logits is \[6, 3\] for 2 examples.*\[b, ...\]"),
        (nn.Dense(3), "give a function of the inputs, such as lambda x: model.apply"),
    ],
)
def test_what_a_function_may_return(x, tmp_path, fn, message):
    with pytest.raises(UserError, match=message) as caught:
        export.make(fn, INPUTS, tmp_path, formats=("stablehlo",), check={"x": x})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "ranges", "message"),
    [
        ((6, 3), None, "inputs = .6, 3. .tuple. should be Mapping"),
        ({"x": (6, 3)}, None, "should have a shape and a dtype"),
        (INPUTS, {"y": (0, 1)}, "no input 'y'"),
        (INPUTS, {"x": (1, 0)}, "the least and the greatest"),
    ],
)
def test_inputs_and_ranges(x, tmp_path, inputs, ranges, message):
    with pytest.raises(UserError, match=message):
        export.make(
            lambda a: a["x"],
            inputs,
            tmp_path,
            formats=("stablehlo",),
            ranges=ranges,
            check={"x": x},
        )


def test_several_outputs_of_a_tuple(x, tmp_path):
    (file,) = export.make(
        lambda a: (a["x"], 2 * a["x"]),
        INPUTS,
        tmp_path,
        formats=("tflite",),
        check={"x": x},
    )
    outputs = export.load(file.path)({"x": x})
    np.testing.assert_array_equal(outputs["output_1"], 2 * outputs["output_0"])


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(4))(x)[:, -1]


def test_loops_of_known_length_are_written_out(x, tmp_path):
    """The live function, which the files are compared with, runs the loops."""
    model = Recurrent()
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), x))

    def fn(batch):
        x = batch["x"]
        last, sums = lax.scan(
            lambda c, row: (c + row, c * row), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1)
        )
        power = lax.fori_loop(0, 4, lambda i, y: y * 1.1 + i, last)
        return {
            "rnn": model.apply(variables, x),
            "sums": sums.swapaxes(0, 1),
            "power": power,
            "gelu": jax.vmap(gelu)(x),
        }

    made = export.make(
        fn, INPUTS, tmp_path, formats=("tflite", "stablehlo"), check={"x": x}
    )
    assert [file.max_difference < 1e-5 for file in made] == [True, True]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda a: lax.while_loop(
                lambda s: s.sum() < 9, lambda s: s * 2, a["x"] ** 2
            ),
            "no operation for a loop that ends on a condition",
        ),
        (
            lambda a: lax.fori_loop(0, 600, lambda i, y: y * 0.99, a["x"]),
            "a loop of 600 turns.*512 at most",
        ),
        (
            lambda a: jnp.abs(jnp.fft.rfft(a["x"], axis=1)),
            "no operation for fft in the function itself, complex numbers",
        ),
    ],
)
def test_what_litert_lacks_is_named(x, tmp_path, fn, message):
    x = np.abs(x)
    with pytest.raises(process.Crash, match=message) as caught:
        export.make(fn, INPUTS, tmp_path, formats=("tflite",), check={"x": x[:1]})
    assert "\n" not in str(caught.value)


def test_a_composite_can_be_mapped_and_differentiated():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = jax.vmap(jax.vmap(jax.grad(lambda v: nn.gelu(v, approximate=False))))(x)
    with composite.keep_composites():
        text = jax.jit(jax.vmap(gelu)).lower(x).as_text()
        assert text.count('stablehlo.composite "aten.gelu.default"') == 1
        np.testing.assert_allclose(
            jax.jit(jax.vmap(jax.vmap(jax.grad(gelu))))(x), expected, atol=1e-6
        )


def test_outputs_are_compared_at_their_own_scale():
    """70 times too large, at 1e-5: any absolute limit lets it pass. Zeros have no scale."""
    small = {"logits": np.full((2, 3), 1e-5, np.float32)}
    limits = dict(integer=False, tolerance=1e-4, int8_agreement=0.9)
    assert not parity.compare(small, {"logits": 70 * small["logits"]}, **limits).agrees
    assert parity.compare(small, {"logits": 1.00005 * small["logits"]}, **limits).agrees
    stage = dict(integer=False, tolerance=1e-4)
    wrong = {"logits": 70 * small["logits"]}
    assert parity.first_diverging(small, wrong, **stage)[0] == "logits"
    zeros = {"logits": np.zeros((2, 3), np.float32)}
    assert parity.compare(zeros, {"logits": zeros["logits"] + 9e-5}, **limits).agrees
    assert not parity.compare(
        zeros, {"logits": zeros["logits"] + 2e-4}, **limits
    ).agrees


def test_a_float_file_has_to_reach_the_callers_agreement():
    live = {"boxes": np.ones((4, 2), np.float32)}
    limits = dict(integer=False, tolerance=1e-4, int8_agreement=0.8)
    verdict = parity.compare(
        live, live, agreement=lambda a, b: np.full(4, 0.7), **limits
    )
    assert not verdict.agrees
    assert "70.0% agreement" in str(verdict)
    assert parity.compare(
        live, live, agreement=lambda a, b: np.full(4, 0.8), **limits
    ).agrees


def test_the_range_of_an_input_is_that_of_its_examples(tmp_path):
    """Values in 0..1 under the name image are no pixels 0..255, whose step of 1 would leave two values of them."""
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (64, 8, 8, 3)).astype(np.float32)
    weights = rng.normal(size=(192, 5)).astype(np.float32)
    inputs = {"image": jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)}

    def made(folder, **options):
        (file,) = export.make(
            lambda a: a["image"].reshape(-1, 192) @ weights,
            inputs,
            tmp_path / folder,
            formats=("tflite_int8",),
            calibration=image,
            check=image,
            int8_agreement=0.0,
            **options,
        )
        interpreter = Interpreter(str(file.path))
        (entry,) = interpreter.get_input_details()
        return file, entry["quantization"]

    file, (scale, zero_point) = made("measured")
    assert scale == pytest.approx(1 / 255, rel=0.02)
    assert zero_point == -128
    assert file.agreement > 0.9
    file, quantization = made("stated", ranges={"image": (0, 255)})
    assert quantization == (1.0, -128)
    assert file.agreement < 0.7
    _, (scale, zero_point) = made("signed", ranges={"image": (-1, 1)})
    assert scale == pytest.approx(2 / 255)
    assert zero_point in (0, -1)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Conv(8, (3, 3))(x)
        x = nn.relu(BatchNorm(True)(Conv(8, (3, 3), feature_group_count=8)(x)))
        return Conv(4, (1, 1))(x).mean((1, 2))


def test_files_hold_the_converters_own_operations(tmp_path):
    """Without any context: a depthwise convolution is one operation, and no sum of shifted images."""
    model = Depthwise()
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), x))
    files = export.make(
        lambda a: model.apply(variables, a["x"]),
        {"x": jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)},
        tmp_path,
        formats=("tflite", "stablehlo"),
        check={"x": x},
    )
    kinds = [node.kind for node in operators.read_operators(files[0].path)]
    assert kinds.count("DEPTHWISE_CONV_2D") == 1
    assert kinds.count("CONV_2D") == 2
    assert len(kinds) <= 5
    text = (tmp_path / "model.mlir").read_text()
    assert (
        text.count("stablehlo.convolution(") == 9
    )  # three, for each of three platforms


def test_class_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    names = (os.fsdecode(b"caf\xe9"), "dog")
    class_names.check(names)
    (tmp_path / "f").write_bytes(class_names.attach(b"model", names))
    with zipfile.ZipFile(tmp_path / "f") as archive:
        assert archive.read("labels.txt") == b"caf\xe9\ndog\n"
    assert class_names.read(tmp_path / "f") == names


@pytest.mark.parametrize(
    "names", [("",), ("cat", "", "dog"), (" ", "\t"), ("ä b", "\ufeff", "\0")]
)
def test_class_names_are_read_as_they_were_written(tmp_path, names):
    class_names.check(names)
    (tmp_path / "f").write_bytes(class_names.attach(b"model", names))
    assert class_names.read(tmp_path / "f") == names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cat\n", "a line break"),
        ("cat\r", "a line break"),
        ("\n", "a line break"),
        ("a\nb", "a line break"),
        ("a\x1cb", "a line break"),
        ("cat\x85", "a line break"),
        ("\u2028cat", "a line break"),
        ("\ud800", "half a character"),
        # The bytes of U+0085, a line break.
        ("\udcc2\udc85", "half a character"),
    ],
)
def test_class_names_that_a_file_would_change_are_refused(name, words):
    with pytest.raises(UserError, match=f"{words}: rename the class"):
        class_names.check(["dog", name])


@pytest.mark.parametrize("key", ["stablehlo", "tflite", "tflite_int8"])
def test_files_hold_the_names_of_their_classes(x, tmp_path, key):
    kernel = np.eye(SIZE, dtype=np.float32)
    names = ("ä b", "cat", "dog")

    def fn(batch):
        return batch["x"].mean(1) @ kernel

    given = dict(formats=(key,), check=x, calibration=x, classes=names)
    (file,) = export.make(fn, INPUTS, tmp_path, int8_agreement=0.0, **given)
    with zipfile.ZipFile(file.path) as archive:
        assert archive.read("labels.txt").decode().split("\n") == [*names, ""]
    loaded = export.load(file.path)
    assert loaded.classes == names
    np.testing.assert_allclose(loaded(x), x.mean(1), atol=0.05)
    assert Path(file.path).stat().st_size == file.bytes

    (plain,) = export.make(fn, INPUTS, tmp_path / "plain", int8_agreement=0.0, **given | dict(classes=()))  # fmt: skip
    content = Path(plain.path).read_bytes()
    if key != "stablehlo":  # whose program numbers its functions anew
        assert Path(file.path).read_bytes()[: len(content)] == content
    assert export.load(plain.path).classes == ()
    with pytest.raises(UserError, match=r"'a\\nb' has a line break: rename"):
        export.make(fn, INPUTS, tmp_path, **given | dict(classes=["a\nb", "c", "d"]))


NUMBERS = {"n": jax.ShapeDtypeStruct((3,), jnp.int32)}


@pytest.mark.parametrize("key", ["stablehlo", "tflite"])
def test_integers_stay_integers(tmp_path, key):
    n = np.array([[2**24 + 1, 0, -5], [1, 2, 3]], np.int32)
    (file,) = export.make(lambda b: b["n"] + 2, NUMBERS, tmp_path, formats=(key,), check=n)  # fmt: skip
    predict = export.load(file.path)
    np.testing.assert_array_equal(predict(n), n + 2)
    assert predict(n).dtype == np.int32
    with pytest.raises(
        UserError, match="n has the value 4294967291, and the file takes int32"
    ):
        predict(n.astype(np.int64) + 2**32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(check=np.full((2, LENGTH, SIZE), np.nan)), "check: x of example 0 has values that are not finite"),
        (dict(calibration=np.full((2, LENGTH, SIZE), np.inf)), "calibration: x of example 0"),
        (dict(classes=("a", "b")), "classes names 2 classes, and the model returns 3 logits"),
        (dict(classes=("a", 2, "c")), r"classes\[1\] = 2 .int. should be str"),
        (dict(int8_agreement=2), r"int8_agreement = 2 should lie in \[0, 1\]"),
        (dict(tolerance=float("nan")), "tolerance = nan should be a finite number"),
        (dict(tolerence=1), "has no argument 'tolerence'; did you mean 'tolerance'"),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_work(x, tmp_path, arguments, message):
    given = dict(formats=("stablehlo",), check=x) | arguments
    with pytest.raises(UserError, match=message):
        export.make(lambda b: b["x"].mean(1), INPUTS, tmp_path, **given)


def test_a_file_of_integers_takes_finite_numbers_alone(x, tmp_path):
    given = dict(formats=("tflite_int8",), check=x, calibration=x, int8_agreement=0.0)
    (file,) = export.make(lambda b: b["x"].mean(1), INPUTS, tmp_path, **given)
    with pytest.raises(
        UserError, match="values that are not finite, and the file computes in integers"
    ):
        export.load(file.path)(np.full_like(x, np.nan))
