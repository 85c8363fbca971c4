"""Costs of functions and modules with static arguments, weights and training mode: counted by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.cost import count, latency, layers, memory
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
    fn, arrays = latency.of_constants(lambda: x @ x)
    assert len(arrays) == 1
    np.testing.assert_array_equal(fn(*arrays)[0], x @ x)
    np.testing.assert_array_equal(fn(3 * arrays[0])[0], 9 * (x @ x))
    assert "dot" in jax.jit(fn).lower(*arrays).compile().as_text()
    assert latency.measure(lambda: x @ x, runs=2, warmup=1)["p50"] > 0
    with pytest.raises(UserError, match="pass the arrays as arguments"):
        latency.measure(lambda: jnp.ones((9, 9)) @ jnp.ones((9, 9)))
