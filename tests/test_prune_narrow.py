"""Narrowing between phases: what is removed, what is sliced with it, and that the rest computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import Plain
from squeeze_jax.prune import narrow
from squeeze_jax.train.state import State

SIZE = (1, 16, 16, 3)
# A network, the layers that are halved, and the arrays of the variables that get smaller with them.
CASES = {
    "a fire's squeeze": (
        dict(name="squeezenet", variant="tiny", norm=True),
        ("fire2/squeeze1x1",),
        {"fire2/squeeze1x1", "fire2/squeeze1x1_norm"}
        | {"fire2/expand1x1", "fire2/expand3x3"},
    ),
    "one half of a concatenation": (
        dict(name="squeezenet", variant="tiny", norm=True),
        ("fire2/expand3x3",),
        {"fire2/expand3x3", "fire2/expand3x3_norm", "fire3/squeeze1x1"},
    ),
    "two that follow each other": (
        dict(name="squeezenet", variant="tiny"),
        ("fire2/expand1x1", "fire3/squeeze1x1"),
        {"fire2/expand1x1", "fire3/squeeze1x1"}
        | {"fire3/expand1x1", "fire3/expand3x3"},
    ),
    "an expansion, its depthwise convolution and the projection": (
        dict(name="mobilenet_v2", variant="tiny"),
        ("bottleneck3/expand",),
        {f"bottleneck3/{k}" for k in ("expand", "expand_norm", "depthwise")}
        | {"bottleneck3/depthwise_norm", "bottleneck3/project"},
    ),
    "one with an excitation": (
        dict(name="mobilenet_v3", variant="tiny"),
        ("bottleneck1/expand",),
        {f"bottleneck1/{k}" for k in ("expand", "expand_norm", "depthwise")}
        | {"bottleneck1/depthwise_norm", "bottleneck1/project"}
        | {f"bottleneck1/squeeze_excite/{k}" for k in ("reduce", "expand")},
    ),
}


def plain():
    return Plain(
        lambda options: models.make(**options), jax.ShapeDtypeStruct(SIZE, jnp.float32)
    )


@functools.cache
def filled(case):
    """(options, state of noise): momentum and average are other numbers than the weights."""
    options = CASES[case][0] | dict(num_classes=5)
    net = models.make(**options)
    like = jax.eval_shape(net.init, jax.random.key(0), plain().example)
    rng = np.random.default_rng(0)

    def noise(name, a):
        array = rng.uniform(-0.4, 0.4, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    params = tree.map_named(noise, like["params"])
    stats = tree.map_named(noise, like.get("batch_stats", {}))
    average = {"params": tree.map_named(noise, params), "stats": stats}
    trace = optax.TraceState(tree.map_named(noise, params))
    return options, State(np.int32(3), params, stats, (trace,), average)


@pytest.mark.parametrize("case", CASES)
def test_what_belongs_together_is_sliced_together(case):
    _, layers, smaller = CASES[case]
    options, state = filled(case)
    after, cut = narrow.make(layers, keep=0.5).apply(dict(options), state, plain())
    widths = {
        layer: tree.flatten(state.params)[f"{layer}/kernel"].shape[-1] // 2
        for layer in layers
    }
    assert after == options | {"widths": widths}
    wanted = jax.eval_shape(models.make(**after).init, jax.random.key(0), plain().example)  # fmt: skip
    assert tree.differences(wanted["params"], cut.params) == []
    assert tree.differences(wanted.get("batch_stats", {}), cut.stats) == []
    changed = {
        name.rpartition("/")[0]
        for name, array in tree.flatten(state.params).items()
        if array.shape != tree.flatten(cut.params)[name].shape
    }
    assert changed == smaller
    for part in cut.opt[0].trace, cut.ema["params"]:
        assert tree.differences(cut.params, part) == []
    # The filters with the largest norms stay, in order.
    for layer in layers:
        kernel = tree.flatten(state.params)[f"{layer}/kernel"]
        norms = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
        stay = np.sort(np.argsort(norms)[len(norms) // 2 :])
        momentum = tree.flatten(state.opt[0].trace)[f"{layer}/kernel"][..., stay]
        sliced = tree.flatten(cut.opt[0].trace)[f"{layer}/kernel"]
        if sliced.shape == momentum.shape:  # its inputs are all there
            np.testing.assert_array_equal(sliced, momentum)


@pytest.mark.parametrize("case", CASES)
def test_without_the_filters_that_are_zero_the_network_is_the_same(case):
    """Filters, their biases and normalisations are zero, so that the layers after them see zeros."""
    _, layers, _ = CASES[case]
    options, state = filled(case)
    dead = {}
    for layer in layers:
        channels = tree.flatten(state.params)[f"{layer}/kernel"].shape[-1]
        dead[layer] = np.arange(channels) % 2 == 0
    following = {"bottleneck1": "depthwise", "bottleneck3": "depthwise"}

    def kill(name, array):
        for layer, which in dead.items():
            block = layer.partition("/")[0]
            names = [layer, f"{layer}_norm"]
            if block in following:
                names += [f"{block}/depthwise", f"{block}/depthwise_norm"]
            if name.rpartition("/")[0] in names and array.shape[-1] == which.size:
                return np.where(which, 0, array)
        return array

    params = tree.map_named(kill, state.params)
    x = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)

    def run(options, state):
        net = models.make(**options)
        variables = {"params": state.params, "batch_stats": state.stats}
        return jax.jit(lambda v: net.apply(v, x, train=False)[0])(variables)

    state = state._replace(params=params)
    after, cut = narrow.make(layers).apply(dict(options), state, plain())
    expected = run(options, state)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(run(after, cut), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "keep", "words"),
    [
        ((), 0.5, "names no layer"),
        (("fire2",), 1.0, "keep = 1.0"),
        (("fire2/expand2x2",), 0.5, "no layer 'fire2/expand2x2'; did you mean"),
    ],
)
def test_bad_values_are_named(layers, keep, words):
    options, state = filled("a fire's squeeze")
    with pytest.raises(UserError, match=words):
        narrow.make(layers, keep).apply(options, state, plain())


def test_a_layer_in_front_of_a_sum_is_refused():
    options = dict(name="mobilenet_v2", variant="tiny", num_classes=5)
    net = models.make(**options)
    like = jax.eval_shape(net.init, jax.random.key(0), plain().example)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like)
    state = State(np.int32(0), zeros["params"], zeros["batch_stats"], ())
    with pytest.raises(UserError, match="bottleneck3/project"):
        narrow.make(("bottleneck3/project",)).apply(options, state, plain())
