"""Costs of functions and modules with static arguments, weights and training mode: counted by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from squeeze_jax import models
from squeeze_jax.cost import call, count, latency, layers, memory, profile
from squeeze_jax.errors import UserError
from squeeze_jax.nn.norm import BatchNorm

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


class Mixed(nn.Module):
    """Products written by einsum, inside modules of Flax and of its own."""

    @nn.compact
    def __call__(self, x, kind="plain", train=False):
        w = self.param("w", nn.initializers.ones, (4, 5))
        y = jnp.einsum("bc,cd->bd", x, w)  # 2 4 5 = 40
        y = BatchNorm(not train, name="norm")(y)
        y = nn.Dropout(0.5, deterministic=not train)(y)
        y = nn.DenseGeneral((2, 3), name="general")(y)  # 2 5 6 = 60
        y = nn.MultiHeadDotProductAttention(1, name="attention")(y, y)
        y = nn.Einsum((3, 2), "bkc,cd->bkd", name="einsum")(y)  # 2 2 3 2 = 24
        return y if kind == "plain" else y @ jnp.ones((2, 2))


# Queries, keys, values and outputs 2 2 3 3 = 36 each; scores and their use 2 2 2 3 = 24 each.
PARTS = {"query": 36, "key": 36, "value": 36, "out": 36}
BY_LAYER = {
    "Mixed": 40,
    "general": 60,
    "attention": 48,
    "einsum": 24,
    **{f"attention/{name}": n for name, n in PARTS.items()},
}


@pytest.mark.parametrize("train", [False, True])
def test_einsum_is_named_by_its_module_in_both_modes(train):
    found = count.macs(Mixed(), X, train=train)
    assert found.by_layer == BY_LAYER
    assert found.unknown == ()
    rows = {row.name: row.macs for row in layers.layers(Mixed(), X, train=train)}
    assert {name: macs for name, macs in rows.items() if macs} == BY_LAYER
    assert memory.peak(Mixed(), X, train=train, bits=32).bytes > 0


def test_arguments_without_arrays_are_static():
    more = count.macs(Mixed(), X, "more").total
    assert more - count.macs(Mixed(), X, "plain").total == 2 * 2 * 2 * 2

    def fn(x, size, kind, double=False):
        y = x @ jnp.ones((x.shape[1], size))
        return y @ jnp.ones((size, 2)) if kind == "two" or double else y

    assert count.macs(fn, X, 7, "one").total == 2 * 4 * 7
    assert count.macs(fn, X, 7, "two").total == 2 * 4 * 7 + 2 * 7 * 2
    assert count.macs(fn, X, 7, None, double=True).total == 2 * 4 * 7 + 2 * 7 * 2
    assert memory.compiled(fn, X, 7, "one").outputs == 2 * 7 * 4
    assert memory.peak(fn, X, 7, "one", bits=32).bytes == 4 * (2 * 4 + 2 * 7)


def test_weights_of_a_function_are_told_from_activations():
    params = {"w": jax.ShapeDtypeStruct((4, 7), jnp.float32)}

    def fn(params, x):
        return x @ params["w"]

    activations = 4 * (2 * 4 + 2 * 7)
    assert memory.peak(fn, params, X, bits=32).bytes == activations + 4 * 28
    assert memory.peak(fn, params, X, bits=32, weight_argnums=0).bytes == activations
    plan = memory.compiled(fn, params, X, weight_argnums=(0,))
    assert (plan.weights, plan.inputs, plan.outputs) == (4 * 28, 4 * 8, 4 * 14)
    with pytest.raises(UserError, match=r"weight_argnums = 2: .*2 arguments, 0 to 1"):
        memory.peak(fn, params, X, weight_argnums=2)
    with pytest.raises(UserError, match="the weights of a module are its variables"):
        memory.peak(nn.Dense(3), X, weight_argnums=0)


def test_what_a_function_without_arguments_closes_over_becomes_its_arguments():
    """Folded by the compiler, nothing would be left to time."""
    x = jnp.arange(4.0).reshape(2, 2)
    fn, arrays = call.hoist_constants(lambda: x @ x)
    assert len(arrays) == 1
    np.testing.assert_array_equal(fn(*arrays), x @ x)
    np.testing.assert_array_equal(fn(3 * arrays[0]), 9 * (x @ x))
    assert "dot" in jax.jit(fn).lower(*arrays).compile().as_text()
    assert latency.measure(lambda: x @ x, runs=2, warmup=1)["p50"] > 0
    with pytest.raises(UserError, match="pass the arrays as arguments"):
        latency.measure(lambda: jnp.ones((9, 9)) @ jnp.ones((9, 9)))


def closures():
    """Functions without arguments of one array, 3x3: 3 · 3 · 3 = 27 MACs, 36 bytes."""
    x = jnp.arange(9.0).reshape(3, 3)
    array = np.asarray(x)
    jitted = jax.jit(lambda: x @ x)
    return {
        "plain": lambda: x @ x,
        "jitted": jitted,
        "nested": lambda: {"y": jitted()}["y"],
        "numpy": lambda: jnp.dot(array, array),
        "loop": lambda: jax.lax.fori_loop(0, 1, lambda i, y: y @ x, x),
    }


@pytest.mark.parametrize("name", closures())
def test_every_measurement_makes_constants_arguments(name):
    fn = closures()[name]
    x = np.arange(9.0).reshape(3, 3)
    hoisted, (array,) = call.hoist_constants(fn)
    np.testing.assert_array_equal(hoisted(array), x @ x)
    np.testing.assert_array_equal(hoisted(2 * array), 4 * (x @ x))
    plan = memory.compiled(fn)
    assert (plan.weights, plan.inputs, plan.outputs) == (36, 0, 36)
    assert latency.measure(fn, runs=1, warmup=0)["p50"] > 0
    assert count.macs(fn).total == 27


def test_a_profile_makes_constants_arguments_and_keeps_layers(optimized):
    weights = jnp.ones((300, 300))

    def fn():
        with jax.named_scope("product"):
            return weights @ weights

    assert "product" in profile.measure(fn, runs=1, traced=3, warmup=1).by_layer
    with pytest.raises(UserError, match="pass the arrays as arguments"):
        profile.measure(lambda: jnp.ones((3, 3)) @ jnp.ones((3, 3)), runs=1, traced=1)


def test_named_arrays_are_inputs_and_a_profile_takes_static_arguments():
    matrix = jax.ShapeDtypeStruct((4, 7), jnp.float32)

    def fn(x, kind, *, matrix):
        return x @ matrix if kind == "product" else x

    arguments = dict(matrix=matrix, kind="product")
    assert count.macs(fn, X, **arguments).total == 2 * 4 * 7
    # Product of two activations: 8 · 8 bits a MAC; 8, 28 and 14 numbers of a byte.
    (row,) = layers.layers(fn, X, weight_bits=4, **arguments)
    assert (row.bops, row.bytes) == (56 * 64, 50)
    (row,) = layers.layers(lambda m, x: x @ m, matrix, X, weight_argnums=0, weight_bits=4)  # fmt: skip
    assert (row.bops, row.bytes) == (56 * 32, 8 + 14 + 14)
    assert memory.peak(fn, X, bits=8, **arguments).bytes == 50
    plan = memory.compiled(fn, X, **arguments)
    assert (plan.inputs, plan.outputs) == (4 * (8 + 28), 4 * 14)
    ones = jnp.ones((2, 4))
    keys = dict(runs=1, traced=1, warmup=0)
    assert profile.measure(fn, ones, "none", matrix=ones, **keys).latency["p50"] > 0
    assert profile.measure(Mixed(), ones, "more", train=True, **keys).by_layer


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(self.conv(x)))
        return self.dense(x.mean((1, 2))), x


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modules_of_nnx_and_their_split_functions(mode):
    module = Network(nnx.Rngs(0))
    getattr(module, mode)()
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    graph, state = nnx.split(module)

    def fn(graph, state, x):
        return nnx.merge(graph, state)(x)

    macs = 8 * 8 * 9 * 3 * 8 + 8 * 5
    assert count.macs(module, x).total == macs
    assert count.macs(fn, graph, state, x).total == macs
    # Convolution, weights of 4 bits: 192 B in, 108 B of kernel, 512 B out; dense: 8, 20 and 5 B.
    (row,) = layers.layers(module, x, weight_bits=4)
    assert (row.bytes, row.bops) == (192 + 108 + 512 + 8 + 20 + 5, macs * 32)
    assert layers.layers(fn, graph, state, x, weight_bits=4, weight_argnums=1) == (row,)
    # 216 + 8 of the convolution, 4 · 8 of the normalisation, 40 + 5 of the dense layer.
    floats = 4 * (216 + 8 + 32 + 45)
    streams = 4 + 8  # dropout's counter and key
    for plan in (
        memory.compiled(module, x),
        memory.compiled(fn, graph, state, x, weight_argnums=1),
    ):
        assert plan.inputs == 4 * 192
        assert plan.weights == floats + streams
    if mode == "eval":  # in and out of the convolution
        assert memory.peak(module, x, bits=8).bytes == 192 + 512
    assert module.norm.mean[...].sum() == 0  # unchanged


def test_training_mode_needs_no_flag_and_takes_random_streams():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3, name="dense")(x))

    for keys in {}, {"rngs": {"dropout": jax.random.key(1)}}, {"mutable": ["cache"]}:
        assert count.macs(Noisy(), X, **keys).by_layer == {"dense": 2 * 4 * 3}


def test_a_published_count_in_training_mode():
    """torchvision's SqueezeNet 1.1: 349.15 million MACs, with dropout or without."""
    model = models.make("squeezenet", variant="1.1")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    for train in False, True:
        assert round(count.macs(model, x, train=train).total / 1e6, 2) == 349.15


def test_equations_without_an_arrow_are_no_layers():
    class Implicit(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("ij,jk", x, jnp.ones((4, 5)))

    assert count.macs(Implicit(), X).by_layer == {"Implicit": 40}


@pytest.mark.parametrize(
    ("fn", "args", "line"),
    [
        (
            nn.Dense(3),
            (),
            "Dense takes (inputs), and the call does not match: missing a",
        ),
        (nn.Dense(3), (X, X), "Dense takes (inputs), and the call does not match: too"),
        (nn.Dense(3), ((2, 4),), "Dense gets (2, 4), which is not an array: pass an"),
        (jnp.dot, (X,), "dot takes (a, b, precision, preferred_element_type"),
        (7, (X,), "7 is neither a function nor a module"),
    ],
)
def test_a_call_that_does_not_fit_is_one_line(fn, args, line):
    for cost in count.macs, layers.layers, memory.peak, memory.compiled:
        with pytest.raises(UserError) as error:
            cost(fn, *args)
        assert str(error.value).startswith(line)
        assert "\n" not in str(error.value)


def test_where_operations_write_over_their_input():
    """100 floats of a byte each, y = sin(x), of which only elementwise operations write over y."""
    x = jax.ShapeDtypeStruct((10, 10), jnp.float32)

    def during(after):
        def fn(x):
            y = jnp.sin(x)
            with jax.named_scope("after"):
                return after(y)

        return memory.peak(fn, x, in_place=True).by_layer["after"]

    assert during(jnp.tanh) == 100
    # y and y > 2, then the choice, written over one of them
    assert during(lambda y: jnp.where(y > 2, y, 3.0)) == 200
    # y and the sums of its columns, then the result, written over y
    assert during(lambda y: y + y.sum(0)) == 110
    # These need a result of their own.
    assert during(lambda y: y.T) == 200
    assert during(lambda y: jnp.cumsum(y, 0)) == 200
    assert during(lambda y: jnp.pad(y, 1)) == 100 + 144
    assert during(lambda y: jnp.concatenate([y, y])) == 300
    # y is read again later: y, cos(tanh(y)) in one buffer, and their product
    assert during(lambda y: jnp.cos(jnp.tanh(y)) @ y) == 300
    # An input of the function stays.
    assert memory.peak(jnp.tanh, x, in_place=True).bytes == 200


def test_parameters_of_an_nnx_module():
    network = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    assert count.parameters(network) == 5 * 3 + 3
