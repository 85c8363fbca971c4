"""Names, rules, sizes and differences of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import tree
from squeeze_jax.errors import UserError

PARAMS = {
    "fire2": {"squeeze": {"kernel": np.zeros((1, 1, 4, 2)), "bias": np.zeros(2)}},
    "head": [np.zeros(3)],
}


def test_names_are_paths():
    assert list(tree.flatten(PARAMS)) == [
        "fire2/squeeze/bias",
        "fire2/squeeze/kernel",
        "head/0",
    ]


def test_first_matching_rule_wins_and_the_rest_gets_the_default():
    values = tree.apply_rules((("bias", 0), ("fire2", 8)), PARAMS, default=32)
    assert values == {"fire2": {"squeeze": {"kernel": 8, "bias": 0}}, "head": [32]}


def test_a_dead_rule_is_an_error_that_shows_names():
    with pytest.raises(
        UserError,
        match="'fire9' matches no parameter; names look like fire2/squeeze/bias",
    ):
        tree.apply_rules((("fire9", 1),), PARAMS)


def test_a_malformed_rule_is_an_error():
    with pytest.raises(
        UserError, match=r"config.bits: '\(' is not a regular expression"
    ):
        tree.apply_rules((("(", 1),), PARAMS, where="config.bits")


def test_sizes_of_arrays_and_of_shapes():
    arrays = {"a": jnp.zeros((3, 4), jnp.float32), "b": jnp.zeros(5, jnp.int8)}
    shapes = jax.eval_shape(lambda: arrays)
    assert tree.size(arrays) == tree.size(shapes) == 17
    assert tree.nbytes(arrays) == tree.nbytes(shapes) == 53


def test_differences_name_both_shapes():
    other = {
        "fire2": {"squeeze": {"kernel": np.zeros((1, 1, 4, 3))}},
        "head": [np.zeros(3)],
        "extra": np.zeros(1),
    }
    assert tree.differences(PARAMS, other) == [
        "fire2/squeeze/bias: expected (2,), not there",
        "fire2/squeeze/kernel: expected (1, 1, 4, 2), found (1, 1, 4, 3)",
        "extra: found (1,), not expected",
    ]
    assert tree.differences(PARAMS, PARAMS) == []
