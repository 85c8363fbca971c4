"""Contracts of every encoder of text; test_encoders_options.py has what options promise, test_models.py the networks of images."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.runnable import input_specs
from squeeze_jax.nn.composite import keep_composites
from squeeze_jax.nn.conv import lowering

MODELS = "squeeze_jax.models"
NAMES = [
    name
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
]
TASKS = {
    name: list(registry.load(MODELS, name).make.__annotations__["task"].__args__)
    for name in NAMES
}
LENGTH = 11


def batch(*shape):
    """Real tokens in two segments."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, (*shape, LENGTH)).astype(np.int32)
    segments = np.broadcast_to(np.arange(LENGTH) > 4, tokens.shape).astype(np.int32)
    return {"tokens": tokens, "segments": segments}


def toy(name, *, layers=1, task="classification", **options):
    return models.make(name, variant="toy", layers=layers, task=task, **options)


def filled(net):
    """Variables of noise: quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)
    x = batch(1, 1) if net.task == "choice" else batch(1)
    like = jax.eval_shape(net.init, jax.random.key(0), x)

    def noise(a):
        return rng.normal(0, 0.2, a.shape).astype(np.float32)

    return tree.map_named(lambda name, a: noise(a) + name.endswith("/scale"), like)


def trained():
    """(name, task, whether it is the first) of what is trained: all heads, those of pretraining at once."""
    for name, tasks in TASKS.items():
        left = {"features"}
        if "pretraining" in tasks:
            left |= {"masked_lm", "next_sentence"}
        tasks = [task for task in tasks if task not in left]
        yield from ((name, task, task == tasks[0]) for task in tasks)


@pytest.mark.parametrize(("name", "task", "whole"), list(trained()))
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name, task, whole):
    net = toy(name, task=task, num_classes=3)
    x = batch(2, 3) if task == "choice" else batch(6)
    params = filled(net)["params"]
    # The rest is the same for all heads, and takes the time.
    part = {k: v for k, v in params.items() if whole or k in ("head", "pooler")}

    @jax.jit
    def gradient(part):
        def loss(part):
            logits, _ = net.apply({"params": params | part}, x)

            # A fixed weight for each logit, so that none cancel.
            def weigh(a):
                return (a * jnp.sin(jnp.arange(a.size)).reshape(a.shape)).sum()

            return sum(jax.tree.leaves(jax.tree.map(weigh, logits)))

        return jax.grad(loss)(part)

    for key, g in tree.flatten(gradient(part)).items():
        assert np.isfinite(g).all(), key
        # Adding the same to all keys changes no probability.
        assert np.any(g) or key.endswith("key/bias"), key


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inside_gives_float32_logits(name):
    full, half = (toy(name, dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables, x = filled(full), batch(3)
    both = jax.jit(lambda v: [net.apply(v, x) for net in (full, half)])
    (logits, endpoints), (rounded, rounded_endpoints) = both(variables)
    assert logits.dtype == rounded.dtype == jnp.float32
    assert endpoints["layer1"].dtype == jnp.float32
    assert rounded_endpoints["layer1"].dtype == jnp.bfloat16
    # Eight bits of mantissa.
    scale = float(jnp.abs(logits).max())
    assert scale > 0.1
    np.testing.assert_allclose(rounded, logits, atol=0.05 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variants_and_options_are_named(name):
    with pytest.raises(UserError, match=rf"unknown variant of {name} 'tyo'.*'toy'"):
        models.make(name, variant="tyo")
    with pytest.raises(UserError, match=r"config\.model\.num_clases.*'num_classes'"):
        models.make(name, num_clases=10)
    with pytest.raises(UserError, match=r"config\.model\.task = 'spam'.*'span'"):
        models.make(name, task="spam")
    with pytest.raises(UserError, match=r"unknown activation 'gelo'.*'gelu'"):
        models.make(name, activation="gelo")
    with pytest.raises(UserError, match=r"= \d+ .*do not divide into heads = 7"):
        models.make(name, heads=7)
    with pytest.raises(UserError, match="layers = 0 should lie in"):
        models.make(name, layers=0)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_do_not_fit_are_named(name):
    def run(x, **o):
        return jax.eval_shape(partial(toy(name, **o).init, jax.random.key(0)), x)

    longer = np.zeros((1, 41), np.int32)
    with pytest.raises(UserError, match="of 41 tokens are longer than the 40 pos"):
        run({"tokens": longer})
    with pytest.raises(UserError, match="called with a mapping"):
        run(longer)
    with pytest.raises(UserError, match=r"tokens should be \[b, choices, l\], .*1, 41"):
        run({"tokens": longer}, task="choice")
    with pytest.raises(UserError, match=r"tokens should be \[b, l\], .*\(1, 0\)"):
        run({"tokens": longer[:, :0]})
    with pytest.raises(UserError, match=r"array of integers \[b, l\], not float32"):
        run({"tokens": longer[:, :40].astype(np.float32)})
    with pytest.raises(UserError, match=r"num_classes = 0 should be at least 1"):
        run({"tokens": longer[:, :40]}, num_classes=0)
    with pytest.raises(
        UserError, match=r"attended has the shape \(1, 40\), tokens have"
    ):
        run({"tokens": longer, "attended": longer[:, 1:]})


def test_tokens_in_a_list_are_named():
    with pytest.raises(UserError, match=r"array of integers \[b, l\], not list"):
        toy("bert").init(jax.random.key(0), {"tokens": [[1, 2]]})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_is_real_and_of_the_first_segment(name):
    net = toy(name)
    variables, x = filled(net), batch(2)
    run = jax.jit(lambda x: net.apply(variables, x)[0])
    ones = np.ones((2, LENGTH), bool)
    given = {"tokens": x["tokens"], "segments": 0 * x["segments"], "attended": ones}
    bare = run({"tokens": x["tokens"]})
    np.testing.assert_allclose(bare, run(given), atol=1e-6)
    assert (np.abs(bare - run(x)).max() > 1e-3) == (net.row.segments > 1)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    # MobileBERT reads the neighbours of a token before attention, real or not.
    options = {"trigram": False} if name == "mobilebert" else {}
    net = toy(name, task="tokens", **options)
    variables, x = filled(net), batch(2)
    x["attended"] = np.ones((2, LENGTH), bool)
    run = jax.jit(lambda x: net.apply(variables, x)[0])
    padded = {key: np.pad(array, ((0, 0), (0, 5))) for key, array in x.items()}
    padded["tokens"][:, LENGTH:] = 7
    np.testing.assert_allclose(run(padded)[:, :LENGTH], run(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_alone(name):
    # Any of the rates by itself.
    x = batch(2)
    rates = ("dropout", "attention_dropout", "head_dropout")
    nets = [toy(name, **dict.fromkeys(rates, 0.0) | {rate: 0.5}) for rate in rates]
    variables = filled(nets[0])

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        train = [net.apply(variables, x, train=True, rngs=rngs)[0] for net in nets]
        return train, [net.apply(variables, x)[0] for net in nets[:2]]

    train, (test, other) = run(jax.random.key(0))
    np.testing.assert_array_equal(test, other)
    for one in train:
        assert np.abs(one - test).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_encoder_has_one_operation_for_gelu_and_for_a_lookup(name):
    net = toy(name, dropout=0.0, activation="gelu")
    variables, x = filled(net), batch(1)["tokens"]

    def fn(x):
        tokens = x["tokens"]
        with lowering("native"):
            return net.apply(variables, {"tokens": tokens, "attended": tokens > 3})[0]

    from ai_edge_litert.interpreter import Interpreter

    with keep_composites():
        content = tflite.convert(fn, input_specs({"tokens": x[0]}))[tflite.SUFFIX]
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    found = collections.Counter(o["op_name"] for o in interpreter._get_ops_details())
    groups = 4 if name == "squeezebert" else 1  # each by itself
    assert found["SOFTMAX"] == groups
    # Those of ELECTRA's classifier and of MobileBERT's second feed-forward network.
    assert found["GELU"] == groups + (name in ("electra", "mobilebert"))
    assert found["EMBEDDING_LOOKUP"] == 1 + (name == "roberta")  # its positions
    more = {"albert": 1, "electra": 1, "mobilebert": 6}  # between other channels
    assert found["CONV_2D"] == 1 + 5 * groups + more.get(name, 0)
    # What GELU and the lookup would be made of.
    assert not found.keys() & {"EXP", "SIGN", "DIV", "SELECT", "GATHER", "GATHER_ND"}
    (entry,), (exit_,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.set_tensor(entry["index"], x.astype(np.int32))
    interpreter.invoke()
    expected = net.apply(variables, {"tokens": x, "attended": x > 3})[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        interpreter.get_tensor(exit_["index"]), expected, atol=1e-4 * scale
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_encoder_runs_on_any_batch_and_platform(name):
    net = toy(name, dropout=0.0)
    variables, x = filled(net), batch(2)["tokens"]

    @jax.jit
    def fn(tokens):
        with lowering("native"):
            return net.apply(variables, {"tokens": tokens, "attended": tokens > 3})[0]

    (size,) = export.symbolic_shape("b")
    tokens = jax.ShapeDtypeStruct((size, LENGTH), np.int32)
    content = export.export(fn, platforms=("cpu", "cuda", "tpu"))(tokens).serialize()
    found = export.deserialize(content).call(x)
    np.testing.assert_allclose(found, fn(x), atol=1e-5)
