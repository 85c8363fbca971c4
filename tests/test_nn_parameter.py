"""The function `parameter` returns what `Module.param` returns, and runs an initializer only for a new parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import NameInUseError, ScopeParamNotFoundError, ScopeParamShapeError

from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.layer_norm import LayerNorm, NoNorm
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.recurrent import LSTM


class Scaled(nn.Module):
    size: int
    init_fn: object = nn.initializers.normal()

    @nn.compact
    def __call__(self, x):
        return x * parameter(self, "scale", self.init_fn, (self.size,), jnp.float32)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * parameter(self, "a", nn.ones, (1,)) * parameter(self, "a", nn.ones, (1,))  # fmt: skip


def test_the_initializer_runs_once():
    calls = []

    def init(*args):
        calls.append(args)
        return nn.initializers.normal()(*args)

    net = Scaled(3, init)
    variables = net.init(jax.random.key(0), jnp.ones(3))
    np.testing.assert_array_equal(net.apply(variables, 2.0), variables["params"]["scale"] * 2)  # fmt: skip
    jax.make_jaxpr(net.apply)(variables, jnp.ones(3))
    assert len(calls) == 1


def test_errors_are_those_of_flax():
    variables = Scaled(3).init(jax.random.key(0), jnp.ones(3))
    with pytest.raises(ScopeParamShapeError):
        Scaled(2).apply(variables, 1.0)
    with pytest.raises(ScopeParamNotFoundError):
        Scaled(3).apply({"params": {"other": jnp.ones(3)}}, 1.0)
    with pytest.raises(NameInUseError):
        Twice().init(jax.random.key(0), 1.0)


@pytest.mark.parametrize("layer", [Conv(4, (1, 1)), Dense(4)], ids=lambda m: type(m).__name__)  # fmt: skip
def test_boxed_parameters_are_unboxed(layer):
    """`nn.with_partitioning` boxes what an initializer returns."""
    init = nn.with_partitioning(nn.initializers.ones, (None,) * 4)
    layer = layer.clone(kernel_init=init)
    x = jnp.ones((1, 1, 1, 3))
    variables = layer.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    np.testing.assert_allclose(layer.apply(variables, x), np.full((1, 1, 1, 4), 3.0))


@pytest.mark.parametrize("layer", [LayerNorm(), NoNorm(), LSTM(4)], ids=lambda m: type(m).__name__)  # fmt: skip
def test_parameters_stay_in_float32_where_jax_computes_in_float64(layer):
    with jax.enable_x64(True):
        inputs = jnp.ones((2, 3, 4), jnp.float32)
        variables = jax.eval_shape(layer.init, jax.random.key(0), inputs)
    dtypes = {a.dtype.name for a in jax.tree.leaves(variables["params"])}
    assert dtypes == {"float32"}
