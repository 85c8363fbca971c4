"""Taps: where they stand, what replacing an array does, and that without a replacement they do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from squeeze_jax import models
from squeeze_jax.nn import conv
from squeeze_jax.nn.attention import SelfAttention
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.intercept import intercepting

# The layers of three networks as their papers' tables have them.
FIRE = ["squeeze1x1", "expand1x1", "expand3x3"]
SQUEEZENET = ["conv1", *(f"fire{n}/{part}" for n in (2, 3) for part in FIRE), "conv10"]
BOTTLENECK = ["expand", "depthwise", "project"]
MOBILENET = [
    "conv1",
    *("bottleneck1/depthwise", "bottleneck1/project"),  # t = 1: no expansion
    *(f"bottleneck{n}/{part}" for n in (2, 3, 4) for part in BOTTLENECK),
    *("head", "classifier"),
]
ENCODER = ["query", "key", "value", "output"]
SQUEEZEBERT = [
    *(f"layer{n}/attention/{part}" for n in (1, 2) for part in ENCODER),
    *(f"layer{n}/{part}" for n in (1, 2) for part in ("ffn_in", "ffn_out")),
    *("pooler/dense", "head/classifier"),
]
IMAGE = jnp.zeros((1, 16, 16, 3))
TOKENS = {"tokens": jnp.zeros((1, 4), jnp.int32)}
NETWORKS = {
    "squeezenet": ("tiny", IMAGE, SQUEEZENET, []),
    "mobilenet_v2": ("tiny", IMAGE, MOBILENET, []),
    "squeezebert": (
        "toy",
        TOKENS,
        SQUEEZEBERT,
        ["layer1/attention", "layer2/attention"],
    ),
}


def recorded(fn, *args):
    """Returns the taps that `fn` passes while it is traced."""
    taps = []

    def replace(tap, x):
        taps.append(tap)
        return x

    def run(*args):
        with intercepting(replace):
            return fn(*args)

    jax.eval_shape(run, *args)
    return taps


@pytest.mark.parametrize("name", NETWORKS)
def test_the_taps_of_a_network(name):
    variant, x, layers, attentions = NETWORKS[name]
    net = models.make(name, variant=variant)
    taps = recorded(net.init, jax.random.key(0), x)
    layer_roles = ("inputs", "kernel", "outputs")
    attention_roles = ("query", "key", "value", "probabilities")
    expected = {f"{layer}/{role}" for layer in layers for role in layer_roles}
    expected |= {f"{at}/{role}" for at in attentions for role in attention_roles}
    assert {tap.name for tap in taps} == expected
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    kernels = {tap.name: tap for tap in taps if tap.name.endswith("/kernel")}
    shapes = jax.tree_util.tree_leaves_with_path(params)
    shapes = {"/".join(k.key for k in path): leaf.shape for path, leaf in shapes}
    assert {name: tap.shape for name, tap in kernels.items()} == {
        name: shape for name, shape in shapes.items() if name.endswith("/kernel")
    }


def replacing(role, array):
    return intercepting(lambda tap, x: array if tap.name == role else x)


@pytest.mark.parametrize(
    ("layer", "x", "kernel"),
    [
        (Dense(2), [[1.0, 2.0]], [[1.0, 0.0], [3.0, 1.0]]),
        (conv.Conv(2, (1,)), [[[1.0, 2.0]]], [[[1.0, 0.0], [3.0, 1.0]]]),
        (conv.Conv(2, (1, 1)), [[[[1.0, 2.0]]]], [[[[1.0, 0.0], [3.0, 1.0]]]]),
    ],
    ids=["dense", "sequence", "image"],
)
def test_replaced_arrays_reach_the_result(layer, x, kernel):
    x, kernel = jnp.array(x), jnp.array(kernel)
    variables = {"params": {"kernel": kernel, "bias": jnp.array([10.0, 20.0])}}

    def run():
        return np.ravel(layer.apply(variables, x))

    # [1, 2] [[1, 0], [3, 1]] = [7, 2].
    np.testing.assert_array_equal(run(), [17, 22])
    with replacing("inputs", 0 * x + 1):  # [1, 1] K = [4, 1]
        np.testing.assert_array_equal(run(), [14, 21])
    with replacing("kernel", 0 * kernel + 2):  # [1, 2] 2 = [6, 6]
        np.testing.assert_array_equal(run(), [16, 26])
    with replacing("outputs", jnp.broadcast_to(5.0, (*x.shape[:-1], 2))):
        np.testing.assert_array_equal(run(), [5, 5])
    np.testing.assert_array_equal(run(), [17, 22])


def test_groups_that_stay_apart_are_taps_of_their_own():
    layer = conv.Conv(2, (1,), feature_group_count=2)
    x = jnp.array([[[1.0, 2.0]]])
    variables = {
        "params": {"kernel": jnp.array([[[3.0, 5.0]]]), "bias": jnp.zeros(2)},
    }

    def doubled(tap, x):
        return 2 * x if tap.name == "outputs" else x

    with conv.separate_groups():
        parts = layer.apply(variables, x, join_groups=False)
        taps = recorded(lambda x: layer.apply(variables, x, join_groups=False), x)
        fed = recorded(lambda x: layer.apply(variables, (x[..., :1], x[..., 1:])), x)
        with intercepting(doubled):
            changed = layer.apply(variables, x, join_groups=False)
    assert [float(part[0, 0, 0]) for part in parts] == [3, 10]
    assert [float(part[0, 0, 0]) for part in changed] == [6, 20]
    shapes = [(tap.name, tap.shape) for tap in taps]
    whole, half, kernel = (1, 1, 2), (1, 1, 1), ("kernel", (1, 1, 2))
    assert shapes == [kernel, ("inputs", whole), *[("outputs", half)] * 2]
    shapes = [(tap.name, tap.shape) for tap in fed]
    assert shapes == [kernel, *[("inputs", half)] * 2, ("outputs", whole)]


def test_attention_mixes_replaced_values_by_replaced_probabilities():
    layer, length = SelfAttention(1), 2
    x = jnp.ones((1, length, 1))
    one = {"kernel": jnp.ones((1, 1, 1)), "bias": jnp.zeros(1)}
    names = ("query", "key", "value", "output")
    variables = {"params": dict.fromkeys(names, one)}
    with replacing("value", jnp.array([[[[3.0], [5.0]]]])):
        # Equal keys: each position takes the mean of 3 and 5.
        y, _ = layer.apply(variables, x)
        np.testing.assert_allclose(np.ravel(y), [4, 4], rtol=1e-6)
    arrays = {
        "value": jnp.array([[[[3.0], [5.0]]]]),
        "probabilities": jnp.array([[[[1.0, 0.0], [0.25, 0.75]]]]),
    }
    with intercepting(lambda tap, x: arrays.get(tap.name, x)):
        y, attended = layer.apply(variables, x)
    np.testing.assert_allclose(np.ravel(y), [3, 4.5], rtol=1e-6)
    np.testing.assert_array_equal(attended.probabilities, arrays["probabilities"])
    arrays = {
        "query": jnp.array([[[[0.0], [1.0]]]]),
        "key": jnp.array([[[[0.0], [np.log(3.0)]]]]),
    }
    with intercepting(lambda tap, x: arrays.get(tap.name, x)):
        _, attended = layer.apply(variables, x)
    # softmax([0, 0]) and softmax([0, log 3]).
    expected = [[0.5, 0.5], [0.25, 0.75]]
    np.testing.assert_allclose(attended.probabilities[0, 0], expected, rtol=1e-6)


def test_a_replacement_inside_jit_and_nothing_outside_of_it():
    net = models.make("squeezenet", variant="tiny", num_classes=3, conv10_relu=False)
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    zero = jnp.zeros(3)

    @jax.jit
    def without_scores(variables, x):
        with intercepting(lambda tap, x: x * 0 if tap.name == "conv10/kernel" else x):
            return net.apply(variables, x)[0]

    plain = jax.jit(lambda v, x: net.apply(v, x)[0])
    before = plain(variables, x)
    assert np.abs(before).min() > 0
    # Without its kernel conv10 gives its bias, which begins at zero.
    np.testing.assert_array_equal(without_scores(variables, x), [zero, zero])
    np.testing.assert_array_equal(plain(variables, x), before)
    text = str(jax.make_jaxpr(lambda v, x: net.apply(v, x)[0])(variables, x))
    with intercepting(lambda tap, x: x):
        same = str(jax.make_jaxpr(lambda v, x: net.apply(v, x)[0])(variables, x))
    assert text == same


def test_a_replacement_of_another_shape_is_named():
    layer = Dense(2, name="classifier")
    with (
        replacing("outputs", jnp.zeros((1, 3))),
        pytest.raises(ValueError, match=r"outputs.*\(1, 3\) for \(1, 2\)"),
    ):
        layer.init(jax.random.key(0), jnp.zeros((1, 2)))


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_that_of_flax(dtype, use_bias):
    x = jax.random.normal(jax.random.key(1), (3, 2, 7), jnp.bfloat16)
    ours = Dense(5, use_bias, dtype)
    theirs = linen.Dense(5, use_bias, dtype)
    variables = theirs.init(jax.random.key(0), x)
    own = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    y, expected = ours.apply(variables, x), theirs.apply(variables, x)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)
