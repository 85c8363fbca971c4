"""Running statistics are weighted means of the batches' alone: by hand, in steps, over devices, checkpoints and phases."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from squeeze_jax import models, tree
from squeeze_jax.comm import mean
from squeeze_jax.errors import UserError
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.norm import SHARES, BatchNorm, shares
from squeeze_jax.train import forward, log, sharding
from squeeze_jax.train import step as training_step
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.losses import cross_entropy
from squeeze_jax.train.state import State, create, hand_over

MEANS = np.array([3.0, -1.0, 7.0, 2.0, 2.0], np.float32)


def updated(momentum, means, share=0.0):
    """The running mean, variance and share after batches [2, 1] of mean m: m - 1 and m + 1, whose variance is 2."""
    layer = BatchNorm(momentum=momentum, unbiased=True)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 1)), True)
    variables |= {SHARES: {"share": jnp.float32(share)}}
    run = jax.jit(
        lambda v, x: layer.apply(v, x, False, mutable=["batch_stats", SHARES])[1]
    )
    for m in means:
        x = jnp.array([[m - 1], [m + 1]], jnp.float32)
        variables |= run(variables, x)
    stats = variables["batch_stats"]
    return stats["mean"][0], stats["var"][0], variables[SHARES]["share"]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_constant_statistics_are_found_exactly_after_any_number_of_updates(
    momentum, count
):
    average, var, share = updated(momentum, [5.0] * count)
    np.testing.assert_allclose(average, 5, rtol=1e-6)
    np.testing.assert_allclose(var, 2, rtol=1e-6)  # unbiased, of m - 1 and m + 1
    np.testing.assert_allclose(share, 1 - momentum**count, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_they_are_adams_average(momentum):
    """optax's `bias_correction` of an average that begins at 0 (arXiv 1412.6980, algorithm 1)."""
    average = np.float32(0)
    for count, m in enumerate(MEANS, 1):
        average = momentum * average + (1 - momentum) * m
        expected = optax.tree.bias_correction(average, momentum, count)
        found, _, _ = updated(momentum, MEANS[:count])
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_two_updates_by_hand():
    # (0.9 * 0.1 * 3 + 0.1 * -1) / (0.9 * 0.1 + 0.1) = 0.17 / 0.19
    np.testing.assert_allclose(updated(0.9, [3, -1])[0], 0.17 / 0.19, rtol=1e-6)


def test_statistics_that_are_known_are_not_corrected():
    """A share of 1, as of pretrained statistics: 0.9 * 0 + 0.1 * 3, PyTorch's update."""
    average, var, share = updated(0.9, [3.0], share=1.0)
    np.testing.assert_allclose([average, var, share], [0.3, 0.9 + 0.2, 1], rtol=1e-6)


class Net(nn.Module):
    """Two layers; `second_norm` is wider."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = BatchNorm(not train, momentum=0.9, unbiased=True, name="first_norm")(
            Dense(4, name="first")(x)
        )
        x = BatchNorm(not train, momentum=0.9, unbiased=True, name="second_norm")(
            Dense(3, name="second")(x)
        )
        return x, {}


TX = optax.sgd(0.0)  # the weights stay, and so do the statistics of each batch
EXAMPLE = jax.ShapeDtypeStruct((1, 2), jnp.float32)


def batches(count, size=8):
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield {
            "image": rng.normal(3, 2, (size, 2)).astype(np.float32),
            "label": rng.integers(0, 3, size).astype(np.int32),
            "mask": np.ones(size, bool),
        }


def begun(**options) -> State:
    return jax.jit(lambda: create(Net(), TX, EXAMPLE, jax.random.key(0), **options))()


def trained(state, rows, **options):
    step = jax.jit(training_step.make(Net(), TX, cross_entropy.make(), **options))
    for batch in rows:
        state, _ = step(state, batch, jax.random.key(1))
    return state


def first_layer(state, batch):
    kernel, bias = (np.asarray(state.params["first"][k]) for k in ("kernel", "bias"))
    return batch["image"] @ kernel + bias


def weighted(values, momentum=0.9):
    """The mean of values with weights momentum^0 for the last, momentum^1 for the one before, ..."""
    weights = momentum ** np.arange(len(values))[::-1]
    return np.average(values, axis=0, weights=weights)


def test_a_step_counts_its_batches():
    state = trained(begun(), rows := list(batches(3)))
    outputs = [first_layer(state, batch) for batch in rows]
    stats = state.stats["first_norm"]
    means, variances = (weighted([f(y) for y in outputs]) for f in (mean_of, var_of))
    np.testing.assert_allclose(stats["mean"], means, rtol=2e-5)
    np.testing.assert_allclose(stats["var"], variances, rtol=2e-4)
    for layer in ("first_norm", "second_norm"):
        share = state.extra[SHARES][layer]["share"]
        np.testing.assert_allclose(share, 1 - 0.9**3, rtol=1e-5)


def mean_of(y):
    return y.mean(0)


def var_of(y):
    return y.var(0, ddof=1)


def test_each_accumulated_part_is_an_update():
    """Part i of n has the rows i, i + n, ... of a batch."""
    state = trained(begun(), rows := list(batches(2)), accumulate=2)
    parts = [first_layer(state, b)[i::2] for b in rows for i in range(2)]
    expected = weighted([mean_of(y) for y in parts])
    np.testing.assert_allclose(state.stats["first_norm"]["mean"], expected, rtol=2e-5)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(("exchange", "accumulate"), [(False, 1), (True, 1), (True, 2)])
def test_four_devices_are_one(exchange, accumulate):
    mesh = sharding.make_mesh(data=4)
    one = trained(begun(), batches(3), accumulate=accumulate)
    options = dict(exchange=mean.make(), mesh=mesh) if exchange else {}
    rows = [sharding.put_batch(b, mesh) for b in batches(3)]
    state = jax.device_put(begun(), sharding.replicated(mesh))
    four = trained(state, rows, accumulate=accumulate, **options)
    shared_out = jax.tree.leaves(tree.flatten(four.extra))
    assert all(x.sharding.is_fully_replicated for x in shared_out)
    np.testing.assert_allclose(
        *(s.extra[SHARES]["first_norm"]["share"] for s in (four, one)), rtol=1e-6
    )
    if not (exchange and accumulate > 1):  # there the parts have other rows
        for a, b in zip(*map(jax.tree.leaves, (four.stats, one.stats)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_evaluation_reads_the_corrected_statistics():
    """A layer whose outputs have mean 3 in training has them at mean 0 in evaluation, after two steps."""
    state = trained(begun(), rows := [*batches(1, 64)] * 2)
    x = rows[0]["image"]
    live, _ = forward.run(
        forward.Network(Net()), state.variables(), x, train=True, key=jax.random.key(0)
    )
    still, _ = forward.run(forward.Network(Net()), state.variables(), x)
    np.testing.assert_allclose(still[0], live[0], atol=0.06)  # 63 / 64 of the variance


def test_the_average_of_statistics_is_an_average_of_corrected_ones():
    """At the first step it keeps 1 / 10 of the state before, at the second 2 / 11."""
    rows = list(batches(2))
    begin = begun(ema=True)
    one, two = (trained(begin, rows[:n], ema=0.999) for n in (1, 2))
    first, second = (s.stats["first_norm"]["var"] for s in (one, two))
    expected = 2 / 11 * (0.1 + 0.9 * first) + 9 / 11 * second
    np.testing.assert_allclose(
        two.ema["stats"]["first_norm"]["var"], expected, rtol=1e-5
    )


def test_given_statistics_go_on_as_pytorch_would():
    known = {"first_norm": {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 3.0)}}
    state = trained(begun(given={"batch_stats": known}), rows := list(batches(1)))
    output = first_layer(state, rows[0])
    stats = state.stats["first_norm"]
    np.testing.assert_allclose(stats["mean"], 1.8 + 0.1 * mean_of(output), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 2.7 + 0.1 * var_of(output), rtol=1e-5)
    counted = tree.flatten(state.extra[SHARES])
    np.testing.assert_allclose(counted["first_norm/share"], 1)
    np.testing.assert_allclose(counted["second_norm/share"], 0.1, rtol=1e-5)


def test_the_next_phase_goes_on_counting():
    before = trained(begun(), batches(2))
    fresh = begun(given={"batch_stats": before.stats})
    after, lines = hand_over(before, fresh)
    assert not lines
    for a, b in zip(*map(jax.tree.leaves, (after.extra, before.extra)), strict=True):
        np.testing.assert_array_equal(a, b)
    uncounted, _ = hand_over(before._replace(extra=None), fresh)
    assert set(map(float, jax.tree.leaves(uncounted.extra))) == {1.0}


def test_a_network_without_statistics_counts_nothing():
    net = Dense(3, name="alone")
    assert shares({}) == {}
    tx = optax.sgd(0.1)
    state = jax.eval_shape(lambda: create(net, tx, EXAMPLE, jax.random.key(0)))
    assert state.extra is None


def test_checkpoints_keep_the_count_and_older_ones_have_none(tmp_path):
    """Resumed, a run is bit for bit the one that was not interrupted; an older one goes on as it was."""
    rows = list(batches(4))
    half, whole = trained(begun(), rows[:2]), trained(begun(), rows)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
    )
    for name, saved in ("new", half), ("old", half._replace(extra=None)):
        with contextlib.closing(Checkpoints(tmp_path / name)) as checkpoints:
            checkpoints.save(saved, 16, {})
            checkpoints.wait()
            restored = checkpoints.restore(like).state
        same = jax.tree.structure(restored) == jax.tree.structure(half)
        assert same, name
        end = trained(restored, rows[2:])
        if name == "new":
            for a, b in zip(*map(jax.tree.leaves, (end, whole)), strict=True):
                np.testing.assert_array_equal(a, b)
            continue
        stats = half.stats["first_norm"]["mean"]
        for batch in rows[2:]:
            stats = 0.9 * stats + 0.1 * mean_of(first_layer(half, batch))
        np.testing.assert_allclose(end.stats["first_norm"]["mean"], stats, rtol=2e-5)


MODELS = {
    "efficientnet": {"variant": "tiny"},
    "mobilenet_v3": {"variant": "tiny"},
    "squeezenet": {"variant": "tiny", "norm": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_norm_momentum_is_that_of_every_layer(name):
    """At momentum 0 the statistics are those of the batch, whatever they were: two histories become one."""
    net = models.make(name, num_classes=3, norm_momentum=0.0, **MODELS[name])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    own = models.make(name, num_classes=3, **MODELS[name])
    shapes = jax.eval_shape(own.init, jax.random.key(0), x)
    assert tree.differences(shapes, variables) == []

    @jax.jit
    def after(stats):
        variables_of = {"params": variables["params"], "batch_stats": stats}
        rngs = {"dropout": jax.random.key(1)}
        return net.apply(
            variables_of, x, train=True, mutable=["batch_stats"], rngs=rngs
        )[1]

    other = jax.tree.map(lambda s: s + 5, variables["batch_stats"])
    pairs = (after(variables["batch_stats"]), after(other))
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_norm_momentum_that_cannot_be_is_an_error():
    for value in (1.0, -0.1):
        with pytest.raises(UserError, match=r"norm_momentum = .* \[0, 1\)"):
            models.make("resnet", variant="tiny", norm_momentum=value)
    net = models.make("squeezenet", variant="tiny", norm_momentum=0.9)
    with pytest.raises(UserError, match="the network has no BatchNorm; leave it out"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("training", "test", "warned"),
    [
        (0.976, 0.097, True),
        (0.98, 0.5, True),  # chance of two classes
        (0.99, 0.75, False),  # ordinary overfitting
        (0.2, 0.9, False),  # dropout and augmentation
        (float("nan"), 0.5, False),
        (None, 0.1, False),
    ],
)
def test_accuracies_far_apart_get_a_line_at_the_end(
    tmp_path, capsys, training, test, warned
):
    record = {"loss": 0.1, "examples_per_s": 1.0, "input_wait": 0.0, "skipped": 0}
    record |= {} if training is None else {"accuracy": training}
    with contextlib.closing(log.Log(tmp_path, 20, batch_norm=True)) as writer:
        for step in 10, 20:
            writer.train(step, record)
            capsys.readouterr()
            writer.evaluation(step, {"eval_loss": 1.0, "eval_accuracy": test})
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 1 + (warned and step == 20)
    if warned:
        assert lines[1].startswith(f"warning: training accuracy {training:.3f}")
        assert "config.model.norm_momentum=0.9" in lines[1]


@pytest.mark.parametrize(
    ("training", "evaluation", "words"),
    [
        ("accuracy", "eval_pixel_accuracy", "training pixel accuracy 0.900 and test p"),
        ("label_accuracy", "eval_label_accuracy", "training label accuracy 0.900 and "),
        ("accuracy", "eval_label_accuracy", None),
        ("label_accuracy", "eval_accuracy", None),
        ("accuracy", "eval_mean_iou", None),
    ],
)
def test_accuracies_of_one_kind_are_compared(training, evaluation, words):
    line = log.accuracy_gap({training: 0.9}, {evaluation: 0.4})
    assert line is None if words is None else words in line
    assert log.accuracy_gap({training: 0.9}, {evaluation: 0.7}) is None
