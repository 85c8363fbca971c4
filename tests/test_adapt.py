"""Networks of a user's own, Linen or NNX, train as in a loop of optax, are counted, exported and quantized."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from squeeze_jax import export
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.nn.adapt import from_nnx
from squeeze_jax.train import forward, optim, step
from squeeze_jax.train.losses import cross_entropy

BATCH, SHAPE, CLASSES = 8, (6, 6, 3), 5
MACS = 36 * 27 * 8 + 8 * CLASSES  # a 3x3 convolution at 36 positions, a dense layer


class Plain(nn.Module):
    """Logits alone, and `train`."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn")(x)).mean((1, 2))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="out")(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return Plain(name="plain")(x, not deterministic), {"input": x}


class Modeless(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))


class Network(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, CLASSES, rngs=rngs)])

    def __call__(self, x):
        x = self.drop(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))
        return self.layers[0](x)


def batches():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
            "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }
        for _ in range(3)
    ]


def by_hand(model, variables):
    """Losses and weights of a loop of optax."""
    tx = optax.sgd(0.1, momentum=0.9)
    params, stats = variables["params"], variables.get("batch_stats", {})
    opt, losses = tx.init(params), []

    @jax.jit
    def update(params, stats, opt, batch):
        def loss(params):
            (logits, _), new = model.apply(
                {"params": params, "batch_stats": stats},
                batch["image"],
                **forward.mode_argument(model, True),
                mutable=["batch_stats"],
            )
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            return each.mean(), new.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return value, optax.apply_updates(params, updates), stats, opt

    for batch in batches():
        value, params, stats, opt = update(params, stats, opt, batch)
        losses.append(float(value))
    return losses, params


class Paired(nn.Module):
    """Any of the networks as one that returns a pair, for `by_hand` alone."""

    net: nn.Module

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, x, train=False):
        found = self.net(x, **forward.mode_argument(self.net, train))
        return found if isinstance(found, tuple) else (found, {})


MODELS = {
    "logits alone": Plain(),
    "deterministic": Deterministic(),
    "no mode": Modeless(),
    "nnx": from_nnx(Network(nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_counts_and_exports(name, tmp_path):
    model = MODELS[name]
    tx = optax.sgd(0.1, momentum=0.9)
    train = step.make(model, tx, cross_entropy.make())
    state = train.init(jax.random.key(0), batches()[0])
    expected, weights = by_hand(Paired(model), state.plain())
    run, losses = jax.jit(train), []
    for batch in batches():
        state, metrics = run(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        assert metrics["examples"] == BATCH
    # BatchNorm's running statistics do not enter the loss of training.
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for a, b in zip(
        jax.tree.leaves(state.plain()["params"]), jax.tree.leaves(weights), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    evaluate = forward.mode_argument(model, False)
    variables = jax.device_get(state.plain())
    x = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    assert (
        count.macs(lambda v, x: model.apply(v, x, **evaluate), variables, x).total
        == MACS
    )
    assert count.macs(model, x, **evaluate).total == MACS

    def predict(inputs):
        logits, _ = forward.split_outputs(
            model.apply(variables, inputs["image"], **evaluate)
        )
        return logits

    images = np.concatenate([batch["image"] for batch in batches()])
    files = export.make(
        predict,
        {"image": jax.ShapeDtypeStruct(SHAPE, jnp.float32)},
        tmp_path,
        formats=("stablehlo", "tflite", "tflite_int8"),
        calibration=images,
        check=images,
        int8_agreement=0.7,
    )
    found = export.load(files[1].path)(images)
    np.testing.assert_allclose(found, predict({"image": images}), atol=1e-5)


def test_nnx_computes_what_it_does_by_itself():
    module = Network(nnx.Rngs(0), rate=0.5)
    model = from_nnx(module)
    x = batches()[0]["image"]
    variables = model.init(jax.random.key(0), x)
    assert variables["params"]["layers"]["0"]["kernel"].shape == (8, CLASSES)
    module.eval()
    np.testing.assert_allclose(model.apply(variables, x), module(x), rtol=1e-6)
    module.train()
    module(x)
    apply = jax.jit(
        lambda key: model.apply(
            variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
    )
    y, new = apply(jax.random.key(1))
    np.testing.assert_allclose(
        new["batch_stats"]["bn"]["mean"], module.bn.mean[...], rtol=1e-5
    )
    assert not np.allclose(y, apply(jax.random.key(2))[0])
    np.testing.assert_array_equal(y, apply(jax.random.key(1))[0])
    with pytest.raises(UserError, match=r"Plain is not an nnx\.Module"):
        from_nnx(Plain())

    class Cached(nnx.Module):
        def __init__(self):
            self.seen = nnx.Cache(jnp.zeros(3))

    with pytest.raises(UserError, match=r"seen is an nnx\.Cache"):
        from_nnx(Cached())


def test_averaged_weights_follow_from_one_setting():
    batch, key = batches()[0], jax.random.key(0)
    make = functools.partial(step.make, Modeless(), optax.sgd(0.1))
    averaging, plain = make(cross_entropy.make(), ema=0.9), make(cross_entropy.make())
    state = averaging.init(key, batch)
    after, _ = jax.jit(averaging)(state, batch, key)
    # The first step's decay is (1 + 0) / (10 + 0), below 0.9.
    for before, new, mean in zip(
        *(
            jax.tree.leaves(t)
            for t in (state.params, after.params, after.ema["params"])
        ),
        strict=True,
    ):
        np.testing.assert_allclose(mean, 0.1 * before + 0.9 * new, rtol=1e-5)
    assert plain.init(key, batch).ema is None
    for run, other, message in (
        (plain, state, "has averaged weights and the step averages none"),
        (averaging, plain.init(key, batch), "has no averaged weights"),
    ):
        with pytest.raises(UserError, match=message):
            jax.jit(run)(other, batch, key)
    adam = step.make(Modeless(), optax.adam(0.1), cross_entropy.make())
    with pytest.raises(UserError, match="of another optimizer"):
        jax.jit(adam)(plain.init(key, batch), batch, key)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "the batch is a list: give a dict"),
        ({"image": np.zeros((4, *SHAPE)), "label": np.zeros(3, int)}, "label has 3"),
        ({"x": np.zeros((4, *SHAPE))}, "x and no image.*inputs="),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    train = step.make(Modeless(), optax.sgd(0.1), cross_entropy.make())
    with pytest.raises(UserError, match=message):
        train.init(jax.random.key(0), batch)


def network(source, **fields):
    """A module whose __call__ has these arguments."""
    space = {"nn": nn}
    exec(f"def call(self, {source}):\n    return nn.Dense(3)(x.mean((1, 2)))", space)
    call = nn.compact(space["call"])
    annotations = dict.fromkeys(fields, bool)
    body = {"__call__": call, "__annotations__": annotations, **fields}
    return type("Mine", (nn.Module,), body)()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (network("x, is_train=False"), "Mine.__call__ takes is_train, .*call it one of train, "),
        (network("x, eval_mode=True"), "Mine.__call__ takes eval_mode"),
        (network("x, train, attention"), "Mine.__call__ needs attention besides its inputs"),
        (network("x, attention"), "Mine.__call__ needs attention besides its inputs"),
        (network("x", train=True), "Mine has its mode as a field, train=True, .*in evaluation: make it an argument"),
        (network("x", deterministic=False), "Mine has its mode as a field, deterministic=False"),
    ],
)  # fmt: skip
def test_a_mode_that_cannot_be_switched_is_named(module, words):
    train = step.make(module, optax.sgd(0.1), cross_entropy.make())
    with pytest.raises(UserError, match=words) as caught:
        train.init(jax.random.key(0), batches()[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="in training"):
        forward.mode_argument(network("x", train=False), True)


@pytest.mark.parametrize(
    ("module", "training"),
    [
        (network("x, train"), {"train": True}),
        (network("x, *, is_training=False, width=1.0"), {"is_training": True}),
        (network("x, use_running_average=None"), {"use_running_average": False}),
        (network("x, **options"), {"train": True}),
        (network("x, return_features=False"), {}),
        (network("x", train=True), {}),
        (nn.Sequential([nn.Dense(3), nn.relu]), {}),
        (nn.Sequential([nn.relu, nn.Dense(3)]), {}),
        (nn.Sequential([network("x, training=False")]), {"training": True}),
        (nn.remat(type(network("x, deterministic")))(), {"deterministic": False}),
    ],
)
def test_the_mode_of_a_module(module, training):
    assert forward.mode_argument(module, True) == training


def test_arguments_of_a_step():
    with pytest.raises(UserError, match=r"the update is 'adam'.*optax\.adam"):
        step.make(Modeless(), "adam", cross_entropy.make())
    with pytest.raises(UserError, match="the objective is 'cross_entropy'"):
        step.make(Modeless(), optax.sgd(0.1), "cross_entropy")
    with pytest.raises(UserError, match="should be one of 'sgd', 'adamw'"):
        optim.make("adam_w", steps=10, lr=0.1)
    with pytest.raises(UserError, match="a tuple of 3"):
        forward.split_outputs((1, 2, 3))
