"""The LSTM language model: PyTorch's network with the same weights, the state between windows, what leaves it."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import export

from squeeze_jax import data, models, registry, tree
from squeeze_jax.comm import mean
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.runnable import input_specs
from squeeze_jax.nn.intercept import intercepting
from squeeze_jax.train import sharding, state, step
from squeeze_jax.train.losses import next_token
from squeeze_jax.train.metrics import perplexity
from squeeze_jax.weights import foreign

lstm = registry.load("squeeze_jax.models", "lstm")
VOCABULARY, FEATURES, LENGTH, ROWS = 99, 8, 5, 3


def tiny(**options):
    return models.make("lstm", variant="tiny", **options)


@functools.cache
def theirs():
    """PyTorch's network, of weights large enough that the gates leave their linear range."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        dict(
            encoder=torch.nn.Embedding(VOCABULARY, FEATURES),
            rnn=torch.nn.LSTM(FEATURES, FEATURES, 2, batch_first=True),
            decoder=torch.nn.Linear(FEATURES, VOCABULARY),
        )
    )
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    return net


def torch_losses(tokens, targets, hidden=None):
    """Losses [b, l], logits, and the state after the last token."""
    net = theirs()
    y, hidden = net["rnn"](net["encoder"](torch.tensor(tokens).long()), hidden)
    logits = net["decoder"](y)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none"
    )
    return losses.reshape(targets.shape), logits, hidden


def ours():
    """The network and PyTorch's weights."""
    net = tiny()
    like = jax.eval_shape(
        net.init, jax.random.key(0), {"tokens": np.zeros((1, 1), np.int32)}
    )
    arrays = {k: v.numpy() for k, v in theirs().state_dict().items()}
    return net, foreign.fit(lstm.from_torch(arrays), like, lstm.torch_names(net))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Contiguous text of 99 different characters."""
    numbers = np.random.default_rng(0).permutation(np.tile(np.arange(VOCABULARY), 5))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(0x4E00 + n) for n in numbers))
    return data.make(
        "contiguous",
        train=str(path),
        eval=str(path),
        length=LENGTH,
        level="characters",
        streams=1,
    )


# Parameters by hand, with h features and v words: embeddings v h, two layers of (h + h + 1) 4 h, the output (h + 1) v.
# MACs of one token: two layers of 2 h 4 h, the output h v.
COUNTS = {
    "small": (2_000_000 + 2 * 401 * 800 + 2_010_000, 2 * 400 * 800 + 2_000_000),
    "medium": (6_500_000 + 2 * 1301 * 2600 + 6_510_000, 2 * 1300 * 2600 + 6_500_000),
    "large": (15_000_000 + 2 * 3001 * 6000 + 15_010_000, 2 * 3000 * 6000 + 15_000_000),
}


def test_every_variant_is_counted():
    assert {*COUNTS, "tiny"} == set(lstm.VARIANTS)


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_and_macs_by_hand(variant):
    x = {"tokens": jax.ShapeDtypeStruct((1, 35), jnp.int32)}
    net = models.make("lstm", variant=variant)
    parameters, macs = COUNTS[variant]
    assert count.parameters(net, x) == parameters
    counted = count.macs(net, x)
    assert (counted.total, counted.unknown) == (35 * macs, ())


def test_logits_losses_and_gradients_are_pytorchs_over_several_windows(text):
    net, variables = ours()
    names = lstm.torch_names(net)

    @jax.jit
    def gradient(params, batch, carry):
        def loss(params):
            logits, endpoints = net.apply(
                {"params": params}, text.inputs(batch), carry=carry
            )
            value, _ = next_token.make()(logits, endpoints, batch)
            return value, (logits, endpoints["carry"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    carry, hidden = net.initial_carry(ROWS), None
    batches = text.train(ROWS, seed=0)
    for _ in range(3):
        batch = next(batches)
        theirs().zero_grad()
        losses, scores, hidden = torch_losses(batch["tokens"], batch["targets"], hidden)
        losses.mean().backward()
        hidden = tuple(h.detach() for h in hidden)
        (value, (logits, carry)), grads = gradient(variables["params"], batch, carry)
        np.testing.assert_allclose(logits, scores.detach(), rtol=1e-4, atol=1e-4)
        assert float(value) == pytest.approx(losses.mean().item(), rel=1e-4)
        for number, name in enumerate(("lstm1", "lstm2")):
            for key, expected in zip(("hidden", "cell"), hidden, strict=True):
                np.testing.assert_allclose(
                    carry[name][key], expected[number], rtol=1e-4, atol=1e-5
                )
        expected = {k: v.grad.numpy() for k, v in theirs().named_parameters()}
        # PyTorch adds two biases up: each has the gradient of their sum.
        expected = {k: v / 2 if "bias_" in k else v for k, v in expected.items()}
        fitted = foreign.fit(lstm.from_torch(expected), {"params": grads}, names)
        for name, g in tree.flatten(fitted["params"]).items():
            scale = np.abs(g).max()
            assert scale > 1e-4
            found = tree.flatten(grads)[name]
            np.testing.assert_allclose(found, g, rtol=1e-4, atol=1e-4 * scale)


def evaluated(text, batch=4):
    """The scores of the network with PyTorch's weights."""
    net, variables = ours()
    metric = perplexity.make(text)
    run = jax.jit(step.make_evaluation(net, metric.measure, inputs=text.inputs))
    carry, sums = net.initial_carry(batch), collections.Counter()
    for rows in text.eval(batch):
        rows.pop("index")
        (found, _), carry = run(variables, rows, carry)
        sums.update({k: float(v) for k, v in found.items()})
    assert sums["tokens"] == len(text.eval_tokens) - 1
    return metric.score(sums, {})


def test_perplexity_of_one_stream_is_that_of_the_whole_text(text):
    tokens = text.eval_tokens
    with torch.no_grad():
        losses, logits, _ = torch_losses(tokens[None, :-1], tokens[None, 1:])
    hits = logits.argmax(-1).numpy() == tokens[1:]
    found = evaluated(text)
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(
        losses.mean().exp().item(), rel=1e-4
    )
    assert found["eval_accuracy"] == pytest.approx(hits.mean(), abs=1e-6)


def test_warm_streams_agree_with_one_stream(text):
    """A stream that reads 20 windows before its own knows what the text before was; one that reads none does not."""
    exact = evaluated(text)["eval_loss"]
    warm, cold = (
        evaluated(dataclasses.replace(text, streams=None, warm_up=n))["eval_loss"]
        for n in (20, 0)
    )
    assert warm == pytest.approx(exact, abs=1e-4)
    assert abs(cold - exact) > 1e-3


def test_fresh_rows_begin_with_zeros(text):
    net, variables = ours()
    batches = text.train(ROWS, seed=0, start=ROWS)
    tokens = next(batches)["tokens"]
    rng = np.random.default_rng(0)
    carry = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32), net.initial_carry(ROWS)
    )

    @jax.jit
    def run(fresh, carry):
        return net.apply(variables, {"tokens": tokens, "fresh": fresh}, carry=carry)[0]

    some = run(np.array([True, False, True]), carry)
    zeros = net.apply(variables, {"tokens": tokens})[0]
    carried = run(np.zeros(ROWS, bool), carry)
    np.testing.assert_allclose(some[::2], zeros[::2], atol=1e-5)
    np.testing.assert_allclose(some[1], carried[1], atol=1e-5)
    assert np.abs(carried - zeros).max() > 0.1


def test_two_windows_are_one_long_window():
    net, variables = ours()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 10)).astype(np.int32)

    @jax.jit
    def run(tokens, carry):
        logits, endpoints = net.apply(variables, {"tokens": tokens}, carry=carry)
        return logits, endpoints["carry"]

    whole, end = run(tokens, net.initial_carry(2))
    first, carry = run(tokens[:, :5], net.initial_carry(2))
    second, carry = run(tokens[:, 5:], carry)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), carry, end)


def test_tied_output_scores_by_the_embeddings():
    net = tiny(tied=True)
    x = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3)}
    variables = jax.jit(net.init)(jax.random.key(0), x)
    params = variables["params"]
    assert set(params) == {"embedding", "lstm1", "lstm2", "bias"}
    params = params | {"bias": jnp.arange(VOCABULARY, dtype=jnp.float32)}
    logits, endpoints = net.apply({"params": params}, x)
    table = params["embedding"]["embedding"]
    expected = endpoints["lstm2"] @ table.T + np.arange(VOCABULARY)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_dropout_leaves_the_recurrent_connection_alone():
    """Zaremba et al., Figure 2: with all else dropped, each step's input is the bias alone, so all rows are equal."""
    net = tiny(dropout=0.999999)
    _, variables = ours()
    tokens = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
    run = jax.jit(functools.partial(net.apply, train=True))
    _, dropped = run(variables, {"tokens": tokens}, rngs={"dropout": jax.random.key(0)})
    first, second = np.asarray(dropped["lstm2"])
    np.testing.assert_allclose(first, second, atol=1e-6)
    # The state still moves from step to step.
    assert np.abs(first[1] - first[0]).max() > 0.01


def test_bfloat16_keeps_a_float32_state():
    net, variables = ours()
    x = {"tokens": np.arange(10, dtype=np.int32).reshape(2, 5)}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    (logits, _), (rounded, endpoints) = jax.jit(
        lambda: (net.apply(variables, x), net.apply(half, x))
    )()
    assert rounded.dtype == jnp.float32
    assert endpoints["lstm1"].dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(endpoints["carry"]))
    scale = float(jnp.abs(logits).max())
    np.testing.assert_allclose(rounded, logits, atol=0.05 * scale)


def test_layers_pass_their_arrays_through_taps():
    net, variables = ours()
    x = {"tokens": np.arange(10, dtype=np.int32).reshape(2, 5)}
    taps = []

    def replace(tap, array):
        taps.append((tap.name, tap.shape))
        return 0 * array if tap.name == "lstm1/recurrent_kernel" else array

    with intercepting(replace):
        changed = net.apply(variables, x)[0]
    assert taps[:4] == [
        ("lstm1/kernel", (8, 32)),
        ("lstm1/recurrent_kernel", (8, 32)),
        ("lstm1/inputs", (2, 5, 8)),
        ("lstm1/outputs", (2, 5, 8)),
    ]
    params = variables["params"]
    zero = params["lstm1"] | {"recurrent_kernel": np.zeros((8, 32), np.float32)}
    expected = net.apply({"params": params | {"lstm1": zero}}, x)[0]
    np.testing.assert_allclose(changed, expected, atol=1e-5)


@pytest.mark.usefixtures("four_devices")
def test_four_devices_carry_what_one_carries(text):
    net, variables = ours()
    tx, mesh = optax.sgd(0.1), sharding.make_mesh(data=4)
    like, key = text.example(), jax.random.key(0)
    begin = jax.jit(
        lambda: state.create(net, tx, like, key, given=variables, carry_rows=4)
    )()

    def trained(where, **options):
        run = step.make(net, tx, next_token.make(), inputs=text.inputs, **options)
        run, now = jax.jit(run), begin
        for batch in itertools.islice(text.train(4, seed=0), 3):
            batch = {name: batch[name] for name in text.specs(4)[0]}
            now, _ = run(now, jax.device_put(batch, where), key)
        return jax.device_get((now.params, now.carry))

    expected, over = trained(jax.devices()[0]), sharding.over_batch(mesh)
    for options in {}, {"exchange": mean.make(), "mesh": mesh}:
        found = trained(over, **options)
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, found, expected)


def test_an_exported_window_runs_on_any_batch_and_platform():
    net, variables = ours()
    (size,) = export.symbolic_shape("b")
    fn = jax.jit(lambda tokens: net.apply(variables, {"tokens": tokens})[0])
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 5)).astype(np.int32)
    spec = jax.ShapeDtypeStruct((size, 5), np.int32)
    content = export.export(fn, platforms=("cpu", "cuda", "tpu"))(spec).serialize()
    found = export.deserialize(content).call(tokens)
    np.testing.assert_allclose(found, fn(tokens), atol=1e-5)


def test_litert_runs_a_window():
    from ai_edge_litert.interpreter import Interpreter

    net, variables = ours()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 5)).astype(np.int32)
    fn = functools.partial(net.apply, variables)
    content = tflite.convert(lambda x: fn(x)[0], input_specs({"tokens": tokens[0]}))
    interpreter = Interpreter(model_content=content[tflite.SUFFIX])
    interpreter.allocate_tensors()
    operators = [o["op_name"] for o in interpreter._get_ops_details()]
    # Two layers: one product of all inputs each, five of hidden states but the first, which is zero; the output.
    assert operators.count("FULLY_CONNECTED") == 2 * (1 + 4) + 1
    assert "WHILE" not in operators
    (entry,), (exit_,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.set_tensor(entry["index"], tokens)
    interpreter.invoke()
    expected = fn({"tokens": tokens})[0]
    found = interpreter.get_tensor(exit_["index"])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variant="smal"), "unknown variant of lstm 'smal'.*'small'"),
        (dict(layer=3), r"config\.model\.layer; did you mean 'layers'"),
        (dict(layers=0), r"config\.model\.layers = 0 should lie in \[1, 1000\]"),
        (dict(dropout=1.0), r"config\.model\.dropout = 1.0 should lie in \[0, 1\)"),
        (dict(init=0.0), r"config\.model\.init = 0.0 should be positive"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        models.make("lstm", **options)


def test_outputs_that_do_not_fit_the_loss_are_named():
    batch = {"targets": np.zeros((2, 5), np.int32)}
    with pytest.raises(UserError, match=r"no targets, which losses\.next_token reads"):
        next_token.target_losses(np.zeros((2, 5, 9)), {"tokens": batch["targets"]})
    with pytest.raises(UserError, match=r"has masked tokens: choose losses\.masked_lm"):
        next_token.target_losses(np.zeros((2, 5, 9)), {**batch, "chosen": 1})
    with pytest.raises(UserError, match=r"for targets \(2, 5\), .* returns \(2, 9\)"):
        next_token.target_losses(np.zeros((2, 9)), batch)


def test_without_a_dead_unit_a_layer_is_narrower():
    """Unit 3's candidate g is tanh(0), so its cell and its hidden state stay 0."""
    net, narrow = tiny(), tiny(widths={"lstm1": 7})
    tokens = {"tokens": np.array([[1, 5, 2, 8], [0, 3, 3, 9]])}
    params = jax.jit(net.init)(jax.random.key(0), tokens)["params"]
    size, dead = 8, 3
    gates = np.arange(4) * size + dead

    def cut(layer, name, axis, where):
        return np.delete(np.asarray(params[layer][name]), where, axis)

    candidate = 2 * size + dead
    for name in "kernel", "recurrent_kernel", "bias":
        params["lstm1"][name] = params["lstm1"][name].at[..., candidate].set(0)
    fewer = params | {
        "lstm1": {
            "kernel": cut("lstm1", "kernel", 1, gates),
            "recurrent_kernel": np.delete(
                cut("lstm1", "recurrent_kernel", 1, gates), dead, 0
            ),
            "bias": cut("lstm1", "bias", 0, gates),
        },
        "lstm2": params["lstm2"] | {"kernel": cut("lstm2", "kernel", 0, dead)},
    }
    carry = narrow.initial_carry(2)
    assert carry["lstm1"]["cell"].shape == (2, 7)
    assert carry["lstm2"]["cell"].shape == (2, 8)
    logits, ends = net.apply({"params": params}, tokens, carry=net.initial_carry(2))
    found, narrower = narrow.apply({"params": fewer}, tokens, carry=carry)
    np.testing.assert_allclose(found, logits, atol=1e-6)
    hidden = ends["carry"]["lstm1"]["hidden"]
    np.testing.assert_allclose(
        narrower["carry"]["lstm1"]["hidden"], np.delete(hidden, dead, 1), atol=1e-6
    )
