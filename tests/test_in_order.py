"""Programs on several CPU devices run one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.in_order import in_order

pytestmark = pytest.mark.usefixtures("four_devices")


@jax.jit
def slow(x):
    return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ x), x)


def test_a_result_is_computed_when_it_is_returned():
    x = jnp.eye(256) / 2
    slow(x).block_until_ready()
    assert not slow(x).is_ready()  # so the program takes long enough to tell
    assert in_order(slow)(x).is_ready()


def test_within_a_program_it_changes_nothing():
    x = jnp.eye(4) / 2
    np.testing.assert_array_equal(jax.jit(in_order(slow))(x), slow(x))
    assert jax.eval_shape(in_order(slow), x).shape == (4, 4)
