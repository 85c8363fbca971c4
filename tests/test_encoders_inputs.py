"""The names of an encoder's inputs: ours and those of `transformers`; everything else is an error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import batches, models, registry
from squeeze_jax.distill import hidden, soft_logits
from squeeze_jax.errors import UserError
from tests.test_encoders_parity import CONFIGS, close, jit, loaded, theirs

pytestmark = pytest.mark.usefixtures("transformers")

LENGTH = 17
REAL = np.arange(LENGTH) < np.array([[17], [9], [12]])
NAMES = sorted(CONFIGS)
IMAGES = [
    n
    for n in registry.names("squeeze_jax.models")
    if getattr(registry.load("squeeze_jax.models", n), "INPUTS", "images") == "images"
]


def given(name):
    """A tokenizer's output for three sequences, two of them padded, by the names of `transformers`, in numpy."""
    rng = np.random.default_rng(0)
    padding = name == "roberta"
    x = {
        "input_ids": np.where(REAL, rng.integers(2, 99, REAL.shape), padding),
        "attention_mask": REAL.astype(np.int64),
    }
    if name not in ("distilbert", "gpt2"):
        x["token_type_ids"] = (np.arange(LENGTH) >= 6) * REAL.astype(np.int64)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_inputs_under_the_names_of_transformers_give_its_outputs(tmp_path, name):
    net, x = theirs(name, "features"), given(name)
    with torch.no_grad():
        expected = net(**{k: torch.tensor(v) for k, v in x.items()})
        unmasked = net(torch.tensor(x["input_ids"]))
    # The mask matters here: without it the outputs of the padded sequences are others.
    moved = np.abs((expected[0] - unmasked[0]).numpy()[1, 0 if name != "gpt2" else 8])
    ours, variables = loaded(net, tmp_path)
    found = jit(ours.apply)(variables, x)[0]
    close(found[REAL], expected[0].numpy()[REAL])
    assert moved.max() > 1e-2 or name == "gpt2"  # which sees no later token


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_position_ids_choose_rows_of_the_table(tmp_path, name):
    # Two texts packed into one row: positions begin again. RoBERTa's count from 2.
    net, x = theirs(name, "features"), given(name)
    at = np.r_[np.arange(10), np.arange(7)] + 2 * (name == "roberta")
    x["position_ids"] = np.tile(at, (3, 1))
    with torch.no_grad():
        expected = net(**{k: torch.tensor(v) for k, v in x.items()})[0].numpy()
    ours, variables = loaded(net, tmp_path)
    close(jit(ours.apply)(variables, x)[0][REAL], expected[REAL])
    x["position_ids"][0, 0] = 99
    with pytest.raises(UserError, match=r"position_ids have 99: the network's pos"):
        ours.apply(variables, x)


def shape_of(x, name="bert", **options):
    net = models.make(name, variant="toy", **options)
    return jax.eval_shape(partial(net.init, jax.random.key(0)), x)


TOKENS = np.ones((2, 5), np.int32)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"tokens": TOKENS, "mask": TOKENS}, "no input 'mask': the padding mask is 'a"),
        ({"tokens": TOKENS, "padding_mask": TOKENS}, "padding mask is 'attended'"),
        ({"tokens": TOKENS, "atended": TOKENS}, "'atended'; did you mean 'attended'"),
        ({"tokens": TOKENS, "input_id": TOKENS}, "did you mean 'input_ids'"),
        ({"tokens": TOKENS, "label": TOKENS[:, 0]}, "Bert has no input 'label'"),
        ({"tokens": TOKENS, "input_ids": TOKENS}, "'tokens' twice, once as 'input_id"),
        ({"attended": TOKENS}, "needs the input 'tokens' .*there is 'attended'"),
        ({}, "needs the input 'tokens' .*there is nothing"),
        (
            {"tokens": TOKENS, "attended": TOKENS[:, 0]},
            r"attended has the shape \(2,\), tokens have \(2, 5\)",
        ),
        (
            {"tokens": TOKENS, "attended": np.ones((2, 5), np.float32)},
            "attended should be an array of integers or booleans .* not float32",
        ),
        ({"tokens": TOKENS, "segments": TOKENS * 1.0}, "segments should be .*float64"),
        ({"tokens": torch.ones((2, 5), dtype=torch.int64)}, "tokens .* not Tensor"),
        ({"tokens": TOKENS, "positions": TOKENS}, "no input 'positions'"),
    ],
)
def test_inputs_that_a_network_does_not_have_are_named(x, words):
    net = models.make("bert", variant="toy")
    with pytest.raises(UserError, match=words) as caught:
        net.init(jax.random.key(0), x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "x", "words"),
    [
        ("bert", {"tokens": TOKENS + 98}, "tokens have 99: .*vocabulary are 0 to 98"),
        ("bert", {"tokens": TOKENS - 2}, "tokens have -1: .*vocabulary are 0 to 98"),
        ("bert", {"tokens": TOKENS, "segments": TOKENS + 1}, "segments have 2"),
        ("distilbert", {"tokens": TOKENS, "token_type_ids": TOKENS}, "has no segments"),
        ("gpt2", {"tokens": TOKENS, "token_type_ids": TOKENS}, "Gpt2 has no segments"),
        ("roberta", {"tokens": TOKENS, "token_type_ids": TOKENS}, "segments have 1"),
    ],
)
def test_integers_beyond_a_table_are_named(name, x, words):
    net = models.make(name, variant="toy")
    with pytest.raises(UserError, match=words):
        net.init(jax.random.key(0), x)


def test_a_masked_lm_alone_scores_positions():
    x = {"input_ids": TOKENS, "positions": TOKENS[:, :3]}
    found = jax.eval_shape(
        lambda x: models.make("bert", variant="toy", task="masked_lm").init_with_output(
            jax.random.key(0), x
        )[0][0],
        x,
    )
    assert found.shape == (2, 3, 99)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"tokens": TOKENS, "attention_mask": TOKENS}, "no input 'attention_mask'"),
        ({"tokens": TOKENS, "fresh": TOKENS}, r"fresh should be \[b\].*\(2, 5\)"),
        ({"tokens": TOKENS + 98}, "tokens have 99"),
    ],
)
def test_an_lstm_names_its_inputs(x, words):
    net = models.make("lstm", variant="tiny")
    with pytest.raises(UserError, match=words):
        net.init(jax.random.key(0), x)


def test_an_lstm_begins_rows_of_integers_afresh():
    # ~1 is -2 and so true: an integer 1 has to mean what True means.
    net = models.make("lstm", variant="tiny")
    variables = net.init(jax.random.key(0), {"tokens": TOKENS})
    carry = jax.tree.map(lambda a: a + 0.5, net.initial_carry(2))

    def run(x):
        return net.apply(variables, x, carry=carry)[0]

    fresh = np.array([True, False])
    expected = run({"tokens": TOKENS, "fresh": fresh})
    found = run({"input_ids": TOKENS, "fresh": fresh.astype(np.int32)})
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        found[0], net.apply(variables, {"tokens": TOKENS})[0][0], atol=1e-6
    )
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("name", IMAGES)
def test_networks_of_images_name_other_inputs(name):
    net = models.make(name)
    image = np.ones((2, 32, 32, 3), np.float32)
    for x, words in (
        ({"image": image}, r"array of images \[b, h, w, c\], not .*mapping of 'image'"),
        (image[0], r"their shape is \(32, 32, 3\): write image\[None\]"),
        ([1.0], "not with list"),
    ):
        with pytest.raises(UserError, match=words):
            net.init(jax.random.key(0), x)


def distilled(batch):
    """Losses of hidden states and of logits for each token, on rows whose padding differs wildly."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    a[1, 3:] = 100.0
    shapes = {"layer1": jax.ShapeDtypeStruct(a.shape, a.dtype)}
    bound = hidden.make(layers=(("layer1", "layer1"),)).bind(shapes, shapes)
    params = bound.init(jax.random.key(0))
    batch = {"mask": np.ones(2, bool)} | batch
    first = bound.loss(
        a[..., 0], {"layer1": a}, batch | {"teacher": ({"layer1": b},)}, params
    )[0]
    shapes = {"logits": jax.ShapeDtypeStruct(a.shape, a.dtype)}
    bound = soft_logits.make().bind(shapes, shapes)
    second = bound.loss(a, {}, batch | {"teacher": ({"logits": b},)}, {})[0]
    real = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    return first, second, ((a - b) ** 2)[real].mean()


REAL_TOKENS = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_distillation_reads_the_padding_mask_under_both_names():
    first, second, by_hand = distilled({"attended": REAL_TOKENS.astype(bool)})
    again = distilled({"attention_mask": REAL_TOKENS})
    assert first == pytest.approx(by_hand, rel=1e-5)
    assert again[:2] == (pytest.approx(first), pytest.approx(second))
    assert distilled({})[0] > 10 * first


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"padding_mask": REAL_TOKENS},
            "'padding_mask': a padding mask, .* 'attended'",
        ),
        ({"mask": REAL_TOKENS}, r"the batch's mask is \[2, 5\]: .*'attended'"),
        ({"attended": REAL_TOKENS[:, :4]}, r"padding mask is \(2, 4\)"),
        ({"attended": REAL_TOKENS, "attention_mask": REAL_TOKENS}, "mask twice"),
    ],
)
def test_distillation_names_other_padding_masks(batch, words):
    with pytest.raises(UserError, match=words):
        distilled(batch)


def test_a_batch_without_padding_has_no_mask():
    assert batches.padding_mask({"tokens": jnp.ones((1, 2))}) is None
