"""A network of several widths and the sandwich rule: what each width computes, and what a step's gradient is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import Own, Passes
from squeeze_jax.models import slimmable
from squeeze_jax.nas import sandwich

OPTIONS = dict(variant="tiny", num_classes=3)
WIDTHS = (0.25, 0.5, 0.75, 1.0)


@functools.cache
def filled():
    """(network, variables of noise, images)."""
    net = slimmable.make(**OPTIONS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), x)

    def noise(name, a):
        array = rng.uniform(-0.4, 0.4, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    return net, {k: tree.map_named(noise, part) for k, part in like.items()}, x


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_alone_is_a_plain_network(width):
    net, variables, x = filled()
    options, alone = slimmable.extract(dict(OPTIONS, name="slimmable"), variables, width)  # fmt: skip
    plain = models.make(**options)
    like = jax.eval_shape(plain.init, jax.random.key(0), x)
    assert tree.differences(like, alone) == []
    assert alone["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, 8 * width)
    assert [k for k in alone["params"]["stem"] if k != "conv"] == ["norm100"]
    expected = jax.jit(functools.partial(net.apply, width=width))(variables, x)[0]
    found = jax.jit(plain.apply)(alone, x)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_width_that_it_does_not_have_is_named():
    net, variables, x = filled()
    with pytest.raises(UserError, match=r"width = 0\.3 is none of the switches"):
        net.apply(variables, x, width=0.3)


def passes(net, x, labels):
    """The passes of a training step of plain cross-entropy."""

    def outputs(params, stats, batch, key, **options):
        (logits, endpoints), changed = net.apply(
            {"params": params, **stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            **options,
        )
        return logits, endpoints, {"batch_stats": changed["batch_stats"]}

    def objective(logits, endpoints, batch, params, key, stats):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean(), {"accuracy": jnp.float32(0.5)}, stats

    return Passes(outputs, objective, None)


def test_the_gradient_is_the_sum_over_the_widths():
    """Of the labels' loss at the full width, and of the soft labels' at the smallest and the drawn ones."""
    net, variables, x = filled()
    labels = np.array([0, 1, 2, 0])
    batch = {"image": x, "mask": np.ones(4, bool)}
    stats = {"batch_stats": variables["batch_stats"]}
    method = sandwich.make(WIDTHS, random=2, temperature=2.0)
    assert not method.fused
    key = jax.random.key(3)
    own = Own({}, None, key, jnp.int32(0), True)
    run = passes(net, x, labels)
    grads, after, metrics = method.compute(run, variables["params"], stats, batch, own)

    def logits(params, width):
        return net.apply(
            {"params": params, **stats},
            x,
            train=True,
            mutable=["batch_stats"],
            width=width,
        )[0][0]

    def by_hand(params):
        full = logits(params, 1.0)
        soft = jax.nn.softmax(logits(variables["params"], 1.0) / 2)
        total = optax.softmax_cross_entropy_with_integer_labels(full, labels).mean()
        for width in WIDTHS[:-1]:  # two of two are drawn
            log_q = jax.nn.log_softmax(logits(params, width) / 2)
            total += 4 * -jnp.sum(soft * log_q, -1).mean()
        return total

    expected = jax.jit(jax.grad(by_hand))(variables["params"])
    for name, value in tree.flatten(expected).items():
        np.testing.assert_allclose(
            tree.flatten(grads)[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert set(metrics) == {"loss", "accuracy", "smallest", "random"}
    # Each width has moved its own statistics.
    for name, before in tree.flatten(stats["batch_stats"]).items():
        assert not np.array_equal(tree.flatten(after["batch_stats"])[name], before)


def test_the_drawn_widths_are_a_function_of_the_key():
    keys = [jax.random.key(n) for n in range(20)]
    drawn = [tuple(sandwich._draw_widths(key, [0.5, 0.75], 1)) for key in keys]
    assert drawn == [tuple(sandwich._draw_widths(key, [0.5, 0.75], 1)) for key in keys]
    assert set(drawn) == {(0.5,), (0.75,)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(widths=(1.0,)), "should be two or more"),
        (dict(widths=(0.5, 0.5, 1.0)), "each once"),
        (dict(widths=(0.5, 1.0)), "random = 2, but 0 widths lie between"),
        (dict(widths=WIDTHS, temperature=0), "temperature = 0 should be positive"),
    ],
)
def test_bad_values_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        sandwich.make(**arguments)


def test_roundings_that_differ_are_named():
    """8 channels times 0.7 are 6, of which a quarter are 2; 8 times 0.175 are 1."""
    _, variables, _ = filled()
    with pytest.raises(UserError, match=r"8 channels times 0\.7 times 0\.25"):
        slimmable.extract(dict(OPTIONS, width=0.7), variables, 0.25)


@pytest.mark.parametrize(
    "switches", [(), (0.5,), (0.0, 1.0), (0.25, 0.251, 1.0), (1.0, 1.0)]
)
def test_switches_out_of_range_are_named(switches):
    with pytest.raises(UserError, match="switches = "):
        slimmable.make("tiny", switches=switches)
