"""The training step: its plug points, sharding, accumulation and precision, against hand-made references."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from squeeze_jax import methods
from squeeze_jax.comm import mean
from squeeze_jax.errors import UserError
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.train import forward, optim, sharding, state, step
from squeeze_jax.train.losses import cross_entropy
from squeeze_jax.train.metrics import classification

pytestmark = pytest.mark.usefixtures("four_devices")

SHAPE, CLASSES, BATCH = (6, 6, 2), 4, 16
EXAMPLE = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)


class Net(nn.Module):
    """Convolution, batch norm, dense: everything a step has to carry."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = BatchNorm(not train, momentum=0.9, dtype=x.dtype, unbiased=True, name="bn")(
            x
        )
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(CLASSES, name="head")(x), {}


class Plain(nn.Module):
    """No statistics over the batch: parts of a batch are then exactly additive."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(CLASSES, name="head")(x), {}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "mask": np.ones(BATCH, bool),
    }


def train(model=None, mesh=None, rules=(), steps=10, tx=None, ema=0.0, **plugs):
    """Ten steps on the given mesh; returns the final state and the last metrics."""
    model = model or Net()
    mesh = mesh or jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
    tx = tx or optim.make("sgd", steps=100, lr=0.1, decay=1e-3)
    create = functools.partial(state.create, model, tx, EXAMPLE, ema=ema > 0)
    shapes = jax.eval_shape(create, jax.random.key(0))
    placed = sharding.shard_state(shapes, mesh, rules)
    now = jax.jit(create, out_shardings=placed)(jax.random.key(0))
    objective = plugs.pop("objective", cross_entropy.make())
    network = forward.make(
        model,
        EXAMPLE,
        forwards=plugs.pop("forwards", None),
        dtype=plugs.pop("dtype", "float32"),
    )
    update = step.make(network, tx, objective, mesh=mesh, ema=ema, **plugs)
    update = jax.jit(update, out_shardings=(placed, sharding.replicated(mesh)))
    for i in range(steps):
        now, metrics = update(
            now, sharding.put_batch(batch(i), mesh), jax.random.key(1)
        )
    return now, metrics


def four(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(data, fsdp, tensor)


@functools.cache
def reference():
    return jax.device_get(train()[0])


@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        (dict(data=4), ()),
        (dict(fsdp=4), ()),
        (dict(data=2, fsdp=2), ()),
        (dict(data=2, tensor=2), (("kernel$", "tensor"),)),
        (dict(fsdp=2, tensor=2), (("head/kernel", ("fsdp", "tensor")), (".", "fsdp"))),
    ],
)
def test_every_mesh_trains_alike(axes, rules):
    """Batch norm over the global batch, gradients and updates are those of one device."""
    sharded, _ = train(mesh=four(**axes), rules=rules)
    chex.assert_trees_all_close(jax.device_get(sharded), reference(), atol=1e-5)


def test_fsdp_divides_parameters_and_momentum():
    sharded, _ = train(mesh=four(fsdp=4), steps=1)
    kernel = sharded.params["conv"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    trace = sharded.opt[1].trace["conv"]["kernel"]
    assert trace.sharding == kernel.sharding


def test_exchange_of_means_is_what_the_compiler_does():
    """Plug point 4: local gradients, local rows, yet batch norm over the global batch."""
    exchanged, _ = train(mesh=four(data=4), exchange=mean.make())
    chex.assert_trees_all_close(jax.device_get(exchanged), reference(), atol=1e-5)


def test_exchange_sees_each_devices_own_gradient():
    """An exchange that keeps only device 0's gradient learns from its quarter of the batch alone."""

    def first_only(key, grads, axis):
        mine = jax.lax.axis_index(axis) == 0
        return jax.tree.map(lambda g: jax.lax.psum(jnp.where(mine, g, 0), axis), grads)

    tx = optax.sgd(1.0)
    alone, _ = train(Plain(), four(data=4), tx=tx, steps=1, exchange=first_only)
    model, quarter = Plain(), {k: v[: BATCH // 4] for k, v in batch().items()}
    begin = state.create(model, tx, EXAMPLE, jax.random.key(0))

    def loss(params):
        logits, _ = model.apply({"params": params}, quarter["image"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, quarter["label"]
        ).mean()

    expected = jax.tree.map(jnp.subtract, begin.params, jax.grad(loss)(begin.params))
    chex.assert_trees_all_close(
        jax.device_get(alone.params), jax.device_get(expected), atol=1e-6
    )


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: (x.mean(-1), {}), r"returns float32 \[16\]: return one float"),
        (lambda x: (jnp.int32(3), {}), r"returns int32 \[\]: return one float"),
        (lambda x: x.mean(), r"returns a .*: return \(scalar, metrics\)"),
        (lambda x: (x.mean(), {"each": x}), "metrics that are no dict of scalars"),
        (lambda x: (x.mean(), x.mean()), "metrics that are no dict of scalars"),
    ],
)
def test_a_loss_that_is_none_is_one_line(returned, words):
    with pytest.raises(UserError, match=f"the loss objective {words}|{words}"):
        train(
            Plain(),
            steps=1,
            objective=lambda logits, endpoints, batch: returned(logits),
        )


def test_an_exchange_that_shares_nothing_is_one_line():
    with pytest.raises(
        UserError, match="differ between the devices: return their mean"
    ):
        train(Plain(), four(data=4), steps=1, exchange=lambda key, grads, axes: grads)


@pytest.mark.parametrize("exchange", [None, mean.make()], ids=["compiler", "exchange"])
def test_accumulation_equals_the_whole_batch(exchange):
    whole, _ = train(Plain())
    mesh = four(data=4) if exchange else None
    parts, _ = train(Plain(), mesh, accumulate=4, exchange=exchange)
    chex.assert_trees_all_close(jax.device_get(parts), jax.device_get(whole), atol=1e-5)


@pytest.mark.parametrize("axes", [None, {"data": 4}], ids=["parts", "devices"])
def test_parts_weigh_what_they_count(axes):
    """Masked rows all fall into one part, or on one device: still the mean over the examples that count."""
    few = batch() | {
        "mask": np.arange(BATCH) % 4 != 0 if axes is None else np.arange(BATCH) >= 4
    }
    model, tx = Plain(), optax.sgd(1.0)
    begin = state.create(model, tx, EXAMPLE, jax.random.key(0))
    whole = step.make(model, tx, cross_entropy.make())
    expected, metrics = whole(begin, few, jax.random.key(1))
    if axes is None:
        part = step.make(model, tx, cross_entropy.make(), accumulate=4)
    else:
        part = step.make(
            model, tx, cross_entropy.make(), exchange=mean.make(), mesh=four(**axes)
        )
    found, other = jax.jit(part)(begin, few, jax.random.key(1))
    chex.assert_trees_all_close(
        jax.device_get(found.params), jax.device_get(expected.params), atol=1e-6
    )
    assert other["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_transform_plug_freezes_what_it_masks():
    """Plug point 1: a transform after the optimizer that zeroes one layer's updates; it sees raw gradients too."""
    seen = []

    def update(updates, _, params=None, *, grads, **extra):
        seen.append(grads)
        return updates | {
            "conv": jax.tree.map(jnp.zeros_like, updates["conv"])
        }, optax.EmptyState()

    freeze = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = optax.chain(optim.make("sgd", steps=100, lr=0.1), freeze)
    begin = jax.device_get(state.create(Net(), tx, EXAMPLE, jax.random.key(0)).params)
    end, _ = train(tx=tx)
    chex.assert_trees_all_equal(jax.device_get(end.params["conv"]), begin["conv"])
    assert (
        np.abs(np.asarray(end.params["head"]["kernel"]) - begin["head"]["kernel"]).max()
        > 1e-3
    )
    assert set(seen[0]) == {"conv", "bn", "head"}


def test_weights_plug_changes_the_forward_but_not_the_master():
    """Plug point 2: with every weight replaced by zero the logits are zero, the loss is ln(classes)."""
    zero = functools.partial(jax.tree.map, jnp.zeros_like)
    end, metrics = train(
        forwards={"zero": methods.forward(zero)}, tx=optax.sgd(0.1), steps=1
    )
    assert metrics["loss"] == pytest.approx(np.log(CLASSES), rel=1e-6)
    assert np.abs(np.asarray(end.params["conv"]["kernel"])).max() > 0


def test_objective_plug_decides_what_is_learned():
    """Plug point 3: the objective sees logits, endpoints and batch, and its metrics come out."""

    def push_class_two(logits, endpoints, batch):
        assert endpoints == {}
        return -logits[:, 2].mean(), {"rows": jnp.float32(batch["image"].shape[0])}

    end, metrics = train(objective=push_class_two, steps=3)
    bias = np.asarray(end.params["head"]["bias"])
    assert bias[2] > 0
    np.testing.assert_array_equal(bias[[0, 1, 3]], 0)
    assert metrics["rows"] == BATCH


def test_masked_examples_do_not_count():
    """Loss and gradient of a half-masked batch are those of the other half."""
    half = batch() | {"mask": np.arange(BATCH) < BATCH // 2}
    logits = jax.random.normal(jax.random.key(0), (BATCH, CLASSES))
    loss = cross_entropy.make()
    masked, metrics = loss(logits, {}, half)
    first = {
        k: v[: BATCH // 2] | (k == "mask") if k == "mask" else v[: BATCH // 2]
        for k, v in half.items()
    }
    alone, expected = loss(logits[: BATCH // 2], {}, first)
    assert masked == pytest.approx(float(alone), rel=1e-6)
    assert metrics["accuracy"] == expected["accuracy"]


def test_label_smoothing_by_hand():
    """Two classes, logits (0, 0): any target gives ln 2; logits (ln 3, 0): p = 3/4, 1/4, smoothed by 0.2 → 0.9, 0.1."""
    loss = cross_entropy.make(0.2)
    one = {"label": np.array([0]), "mask": np.array([True])}
    value, _ = loss(jnp.log(jnp.array([[3.0, 1.0]])), {}, one)
    assert value == pytest.approx(-0.9 * np.log(0.75) - 0.1 * np.log(0.25), rel=1e-6)


def test_average_follows_the_warmed_up_decay():
    """After one step from weights w0 to w1 with decay min(0.9, 1/10): 0.1 w0 + 0.9 w1."""
    begin = jax.device_get(
        state.create(Net(), optax.sgd(0.1), EXAMPLE, jax.random.key(0)).params
    )
    end, _ = train(tx=optax.sgd(0.1), ema=0.9, steps=1)
    expected = jax.tree.map(
        lambda a, b: 0.1 * a + 0.9 * np.asarray(b), begin, end.params
    )
    chex.assert_trees_all_close(
        jax.device_get(end.variables()["params"]), expected, atol=1e-6
    )
    plain = end.variables(averaged=False)["params"]
    assert plain["head"]["kernel"] is end.params["head"]["kernel"]


def test_bfloat16_computes_short_and_keeps_long():
    end, _ = train(dtype="bfloat16", tx=optax.sgd(0.1))
    assert {x.dtype for x in jax.tree.leaves((end.params, end.stats))} == {
        jnp.dtype("float32")
    }
    exact, _ = train(tx=optax.sgd(0.1))
    gap = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
        end.params,
        exact.params,
    )
    assert 1e-6 < max(jax.tree.leaves(gap)) < 0.02
    text = str(
        jax.make_jaxpr(
            lambda p, x: Net().apply(
                {
                    "params": forward.cast_parameters(p, "bfloat16", frozenset({"bn"})),
                    "batch_stats": end.stats,
                },
                x,
            )
        )(end.params, jnp.zeros((1, *SHAPE), jnp.bfloat16))
    )
    convolutions = [
        line
        for line in text.splitlines()
        if "conv_general_dilated" in line or "dot_general" in line
    ]
    assert len(convolutions) >= 2
    assert all("bf16[" in line.split("=")[0] for line in convolutions)


def test_evaluation_counts_by_hand():
    """Logits are the images themselves; ranks 0, 1 and 5 of the true class make top-1 = 1, top-5 = 2; padding is out."""

    class Identity(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return x.reshape(x.shape[0], -1), {}

    images = np.tile(np.arange(6, 0, -1, dtype=np.float32), (4, 1)).reshape(
        4, 1, 1, 6
    )  # class 0 is the favourite
    rows = {
        "image": images,
        "label": np.array([0, 1, 5, 0]),
        "mask": np.array([True, True, True, False]),
    }
    measure = classification.measure
    sums, _ = step.make_evaluation(Identity(), measure)({"params": {}}, rows)
    assert (sums["top1"], sums["top5"], sums["examples"]) == (1, 2, 3)
    total = np.exp(images[0]).sum()
    assert sums["loss"] == pytest.approx(
        sum(np.log(total) - v for v in (6, 5, 1)), rel=1e-6
    )


def test_equal_logits_are_not_all_right():
    """A network that answers the same for every class is right where the first class is the true one."""

    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return jnp.zeros((x.shape[0], 10)), {}

    rows = {
        "image": np.zeros((10, 1, 1, 1)),
        "label": np.arange(10),
        "mask": np.ones(10, bool),
    }
    measure = classification.measure
    sums, _ = step.make_evaluation(Constant(), measure)({"params": {}}, rows)
    assert (sums["top1"], sums["top5"]) == (1, 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sharding.make_mesh(data=3), "does not make the 4 devices"),
        (lambda: sharding.make_mesh(data=0), "should be positive"),
        (lambda: sharding.check_batch(30, four(data=4)), "nearest that is: 32"),
        (
            lambda: train(mesh=four(fsdp=4), rules=(("nothing", "fsdp"),)),
            "matches no parameter",
        ),
        (
            lambda: train(mesh=four(fsdp=4), rules=(("head/kernel", ("model", None)),)),
            "unknown axis 'model'",
        ),
        (
            lambda: train(mesh=four(fsdp=4), rules=(("head/kernel", ("fsdp",)),)),
            "has shape (8, 4)",
        ),
        (
            lambda: train(
                mesh=four(fsdp=4), rules=(("conv/kernel", (None, None, "fsdp", None)),)
            ),
            "not divisible",
        ),
    ],
)
def test_bad_sharding_is_named(call, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        call()
