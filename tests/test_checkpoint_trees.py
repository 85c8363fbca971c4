"""Checkpoints of any pytree come back to the bit, with the kinds of their leaves."""

from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from squeeze_jax.errors import UserError
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.state import State


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_pytree_node_class
class Called:
    """A pytree that can be called, as a module of some libraries."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, aux, leaves):
        return cls(*leaves)


TREES = {
    "dict": {"a": jnp.arange(3.0), "b": [jnp.int8([1, -2])], "half": jnp.bfloat16(1.5)},
    "numbers": Pair(0.1, {"n": 3, "big": 2**40, "flag": True, "none": None}),
    "numpy": {"a": np.float64([0.1, 0.2]), "n": np.int64(2**40), "z": np.float32(0.1)},
    "keys": {"key": jax.random.key(7), "old": jax.random.PRNGKey(7)},
    "empty": {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
    "optax": TrainState.create(
        apply_fn=len, params={"w": jnp.ones(2)}, tx=optax.adam(0.1)
    ),
    "optax with functions": optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(0.1, 0.0, 9)
    ).init({"w": jnp.ones(2)}),
    "called": Called({"w": jnp.arange(2.0)}),
    "nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    "state": State(3, {"w": jnp.ones(2)}, {}, ()),
}


@pytest.mark.parametrize("name", TREES)
def test_it_comes_back_to_the_bit(name, tmp_path):
    tree = TREES[name]
    config = {"lr": np.float32(0.5), "sizes": (1, np.int64(2)), "name": "a"}
    step = None if name in ("optax", "state") else 5
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(tree, config=config, step=step)
    checkpoints.wait()
    restored = checkpoints.restore(tree)
    assert restored.note["config"] == {"lr": 0.5, "sizes": [1, 2], "name": "a"}
    assert jax.tree.structure(restored.state) == jax.tree.structure(tree)
    for a, b in zip(*map(jax.tree.leaves, (restored.state, tree)), strict=True):
        if name != "state":
            assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype or name == "state"
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("tree", "options", "message"),
    [
        ({"a": jnp.ones(2)}, {}, "a dict has no step: .*step="),
        ({"a": "text"}, {"step": 1}, r"\['a'\] is 'text': a checkpoint holds arrays"),
        ({"a": len}, {"step": 1}, r"\['a'\] is <.*len>: .*leave the function out"),
        ({}, {"step": 1}, "no arrays to save"),
        (
            {"a": jnp.ones(2)},
            {"step": 1, "config": {"f": {"g": len}}},
            r"config\.f\.g = .*cannot be saved",
        ),
    ],
)
def test_what_it_cannot_hold(tree, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).save(tree, **options)


@pytest.mark.parametrize(
    ("saved", "like", "names"),
    [
        (3, 1.5, "int64.*float64"),
        (0.1, 7, "float64.*int64"),
        (np.ones(2), np.ones(2, np.int64), "float64.*int64"),
        (jnp.ones(2), jnp.ones(2, jnp.bfloat16), "float32.*bfloat16"),
        (np.ones(2, np.float16), jnp.ones(2, jnp.bfloat16), "float16.*bfloat16"),
    ],
)
def test_another_dtype_is_no_damage_and_no_reinterpretation(
    tmp_path, saved, like, names
):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save({"a": saved, "b": np.ones(2)}, step=1)
        checkpoints.wait()
        with pytest.raises(UserError, match=f"has .*'a'.* in {names}"):
            checkpoints.restore({"a": like, "b": np.ones(2)})
        assert checkpoints.restore({"a": saved, "b": np.ones(2)}) is not None


def test_steps_of_a_pytree_ascend(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save({"a": np.ones(2)}, step=3)
        checkpoints.wait()
        for step in 3, 1:
            with pytest.raises(UserError, match=f"step = {step}, but .* of step 3"):
                checkpoints.save({"a": np.zeros(2)}, step=step)
        for step in -1, 4.5, True, "5", 2**40:
            with pytest.raises(UserError, match="should be a whole number from 0"):
                checkpoints.save({"a": np.zeros(2)}, step=step)


def test_views_and_byte_orders_come_back(tmp_path):
    tree = {
        "view": np.arange(10)[::3],
        "columns": np.arange(12.0).reshape(3, 4).T,
        "big": np.arange(3, dtype=">f4"),
        "big64": np.arange(3, dtype=">i8"),
    }
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(tree, step=1)
        checkpoints.wait()
        restored = checkpoints.restore(tree).state
    for name, array in tree.items():
        np.testing.assert_array_equal(restored[name], array)
        assert restored[name].dtype == array.dtype


@pytest.mark.parametrize(
    "leaf", [np.array(["a"]), np.array([None]), 2**70, np.zeros(2, [("a", "f4")])]
)
def test_what_is_no_number_is_named(tmp_path, leaf):
    opened = closing(Checkpoints(tmp_path))
    error = pytest.raises(UserError, match="a checkpoint holds arrays, numbers")
    with opened as checkpoints, error:
        checkpoints.save({"a": leaf}, step=1)
