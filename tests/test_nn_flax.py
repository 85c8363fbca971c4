"""`Conv` and `BatchNorm` replace Flax's by changing an import, and every layer promotes integers as Flax's layers do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.nn.attention import SelfAttention
from squeeze_jax.nn.blocks import SqueezeExcite
from squeeze_jax.nn.conv import Conv, conv
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.layer_norm import LayerNorm
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean, max_pool, mean_pool
from squeeze_jax.nn.recurrent import LSTM
from squeeze_jax.nn.resize import bilinear, nearest

IMPORT = "from flax.linen import BatchNorm, Conv"
OURS = """
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.norm import BatchNorm
"""

# Each is a program of its own, after the structure of public Flax models; only the line of IMPORT differs.
RESNET = """
from functools import partial
import flax.linen as nn, jax.numpy as jnp
from flax.linen import BatchNorm, Conv

class Block(nn.Module):
    features: int
    strides: tuple
    conv: type
    norm: type

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(2 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(2 * self.features, (1, 1), self.strides, name="proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)

class Net(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = partial(Conv, use_bias=False, dtype=self.dtype)
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        x = conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), (2, 2), "SAME")
        for i in range(2):
            x = Block(8, (1 + i, 1 + i), conv, norm)(x)
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2)))
"""

TEMPORAL = """
import flax.linen as nn, jax.numpy as jnp
from flax.linen import BatchNorm, Conv

class Net(nn.Module):
    dtype: type = None

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1, 6)
        x = Conv(8, 3, padding="CAUSAL", dtype=self.dtype)(x)
        total = 0
        for i in range(3):
            gate = Conv(16, kernel_size=(2,), padding="CAUSAL", kernel_dilation=2**i, dtype=self.dtype)(x)
            filters, gate = jnp.split(gate, 2, axis=-1)
            y = nn.tanh(filters) * nn.sigmoid(gate)
            x = x + Conv(8, (1,), dtype=self.dtype)(y)
            total = total + Conv(4, kernel_size=[1], feature_group_count=2, dtype=self.dtype)(y)
        total = BatchNorm(use_bias=False)(total, use_running_average=not train)
        return Conv(3, (5,), strides=(2,), padding="REFLECT", param_dtype=jnp.float32)(nn.relu(total))
"""

MIXED = """
import flax.linen as nn, jax.numpy as jnp, numpy as np
from flax.linen import BatchNorm, Conv

class Net(nn.Module):
    dtype: type = None

    @nn.compact
    def __call__(self, x, train):
        norm = BatchNorm(not train, use_scale=False, use_fast_variance=False, dtype=self.dtype)
        x = Conv(8, (4, 4), 4, "VALID", dtype=self.dtype)(x)
        y = norm(Conv(8, (7, 7), padding="CIRCULAR", feature_group_count=8, dtype=self.dtype)(x))
        y = nn.gelu(Conv(16, (1, 1), bias_init=nn.initializers.ones)(y))
        x = x + Conv(8, (1, 1), use_bias=False)(y)
        x = Conv(6, (3, 3), mask=jnp.asarray(np.tri(9 * 8, 6).reshape(3, 3, 8, 6)), padding=((2, 0), 1))(x)
        x = Conv(6, (3, 2), input_dilation=(2, 1), kernel_dilation=(1, 2), padding=2, precision="highest")(x)
        x = Conv(6, (3, 3), (1, None or 2), padding="SAME_LOWER")(x)
        film = Conv(4, (2, 3, 3), strides=(1, 2, 2), feature_group_count=2)(jnp.stack([x, 2 * x, -x], 1))
        one = Conv(4, (3, 3))(film[0, 0])
        rows = Conv(4, (3,))(film)
        return BatchNorm(axis=1, use_running_average=not train, momentum=0.5)(rows), one
"""


def net(source, theirs):
    namespace = {"__name__": "model"}
    exec(source if theirs else source.replace(IMPORT, OURS), namespace)
    return namespace["Net"]


def results(model, x):
    """Variables, value, gradients, outputs and statistics of a step of training, and outputs of evaluation."""
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, True)

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            y, new = model.apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            waves = [jnp.sum(jnp.sin(3 * a)) for a in jax.tree.leaves(y)]
            return sum(waves), (y, new)

        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (value, aux), grads = gradient(variables["params"], x)
        return grads, (value, aux, model.apply(variables, x, False))

    return {"variables": variables} | dict(
        zip(("grads", "rest"), run(variables, x), strict=True)
    )


def errors(found, expected):
    """The largest difference of each array at its scale; of gradients at least at a twentieth of the largest one's."""
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(expected["grads"]))

    def error(path, a, b):
        least = 0.05 * largest if path[0].key == "grads" else 1e-6
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), least))

    return jax.tree_util.tree_map_with_path(error, found, expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("source", [RESNET, TEMPORAL, MIXED])
def test_changing_the_import_changes_no_number(source, dtype):
    assert IMPORT in source
    x = np.random.default_rng(0).normal(size=(4, 24, 16, 3)).astype(np.float32)
    arguments = [] if dtype is None else [dtype]
    theirs = results(net(source, theirs=True)(*arguments), x)
    ours = results(net(source, theirs=False)(*arguments), x)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), r) for r in (theirs, ours)]
    assert kinds[0] == kinds[1]
    if dtype is None:
        assert max(jax.tree.leaves(errors(ours, theirs))) < 1e-4
        return
    exact = results(net(source, theirs=True)(jnp.float32), x)
    own, flax = (jax.tree.leaves(errors(r, exact)) for r in (ours, theirs))
    assert np.mean(own) < 1.2 * np.mean(flax)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_layers_promote_integers_as_flax_does(dtype):
    x = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 4)).astype(dtype)
    pairs = [
        (Conv(5, (3, 3)), nn.Conv(5, (3, 3))),
        (Dense(5), nn.Dense(5)),
        (BatchNorm(True), nn.BatchNorm(True)),
        (LayerNorm(1e-6), nn.LayerNorm(use_fast_variance=False)),
    ]
    for ours, theirs in pairs:
        variables = theirs.init(jax.random.key(0), x)
        y, expected = ours.apply(variables, x), theirs.apply(variables, x)
        assert y.dtype == expected.dtype == jnp.float32, theirs
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    layer, theirs = BatchNorm(False), nn.BatchNorm(False)
    both = [n.init_with_output(jax.random.key(0), x) for n in (layer, theirs)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_flax_does_not_have_computes_on_integers_as_on_floats():
    """PyTorch's and Flax's counterparts refuse or truncate; the sensible answer is that of float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 4)).astype(np.uint8)
    rows = pixels.reshape(2, 36, 4)
    key = jax.random.key(0)
    for layer, x in [
        (SqueezeExcite(2), pixels),
        (LSTM(3), rows),
        (SelfAttention(2), rows),
    ]:
        floats = x.astype(np.float32)
        expected, variables = layer.init_with_output(key, floats)
        for a, b in zip(
            jax.tree.leaves(layer.apply(variables, x)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=1e-6)
    floats = pixels.astype(np.float32)
    np.testing.assert_array_equal(max_pool(pixels, 2, 2, 1), max_pool(floats, 2, 2, 1))
    assert max_pool(pixels, 2, 2).dtype == jnp.uint8
    for function in (
        lambda x: mean_pool(x, 2, 2),
        lambda x: bilinear(x, (9, 7)),
        lambda x: Dropout(0.5).apply({}, x, train=True, rngs={"dropout": key}),
    ):
        np.testing.assert_allclose(function(pixels), function(floats), rtol=1e-6)


def test_a_kernel_of_another_dtype_promotes():
    x, k = jnp.ones((1, 5, 5, 2), jnp.uint8), jnp.full((3, 3, 2, 4), 0.25, jnp.bfloat16)
    y = conv(x, k)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 2, 2, 0]) == 4.5  # 18 products


def test_the_axes_of_the_kernel_decide():
    image = jnp.ones((6, 5, 3))
    assert Conv(4, (3, 3)).init_with_output(jax.random.key(0), image)[0].shape == (
        6,
        5,
        4,
    )
    assert Conv(4, 3).init_with_output(jax.random.key(0), image)[0].shape == (6, 5, 4)
    for size, shape, message in [
        (3, (2, 6, 5, 3), r"kernel_size=3 has one axis.*give \(3, 3\)"),
        ((3, 3), (5, 3), r"needs inputs of 2 axes of positions.*\(5, 3\)"),
        ((3, 3, 3, 3), (2, 5, 5, 5, 5, 3), "4 axes: give one to three"),
    ]:
        with pytest.raises(UserError, match=message):
            jax.eval_shape(Conv(4, size).init, jax.random.key(0), jnp.ones(shape))
    with pytest.raises(UserError, match=r"needs images.*\(6, 5, 3\)"):
        conv(image, jnp.ones((3, 3, 3, 4)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: max_pool(x, 2, 2),
        lambda x: mean_pool(x, 2, 2),
        global_mean,
        lambda x: bilinear(x, (3, 2)),
        lambda x: nearest(x, (3, 2)),
        lambda x: SqueezeExcite(2).init(jax.random.key(0), x),
    ],
)
def test_layers_of_images_refuse_one_image(layer):
    """Its height would be taken for the examples, and its channels for a width."""
    with pytest.raises(UserError, match=r"\(6, 5, 3\): write image\[None\]"):
        layer(jnp.ones((6, 5, 3)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Conv(4, (3, 3), padding="CAUSAL"), "only sequences have an order"),
        (Conv(4, (3, 3), padding="circula"), "did you mean 'CIRCULAR'"),
        (Conv(4, (3, 3), mask=jnp.ones((3, 3))), "the mask is"),
        (Conv(4, (3, 3), input_dilation=2, lowering="patches"), "can only be computed"),
        (BatchNorm(True, axis=(1, 3)), "one axis"),
    ],
)
def test_mistakes_are_named(layer, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 6, 5, 3)))


def test_masked_and_mapped_batch_statistics_are_flax():
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype(np.float32)
    mask = np.random.default_rng(1).integers(0, 2, (4, 3, 5, 1)).astype(bool)
    for fast in (True, False):
        both = []
        for kind in (BatchNorm, nn.BatchNorm):
            layer = kind(False, use_fast_variance=fast)
            variables = layer.init(jax.random.key(0), x)
            masked = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            layer = kind(False, axis_name="part", use_fast_variance=fast)
            whole = jax.vmap(
                lambda x, layer=layer, v=variables: layer.apply(
                    v, x, mutable=["batch_stats"]
                ),
                axis_name="part",
            )(x)
            both.append((masked, whole))
        for a, b in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_dense_has_flaxs_dtypes_and_precision():
    x = jnp.ones((2, 3), jnp.bfloat16)
    options = dict(features=4, param_dtype=jnp.bfloat16, precision="highest", name="d")
    ours, theirs = Dense(**options), nn.Dense(**options)
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.result_type, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.result_type, variables)  # fmt: skip
    np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))
    assert "HIGHEST" in str(jax.make_jaxpr(ours.apply)(variables, x))


def test_padding_is_written_in_any_case():
    x, kernel = jnp.ones((1, 5, 5, 1)), jnp.ones((3, 3, 1, 1))
    for name in "same", "valid", "Circular":
        np.testing.assert_array_equal(conv(x, kernel, padding=name), conv(x, kernel, padding=name.upper()))  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 128, 8), {}),
        ((4, 128, 8), dict(padding=1)),
        ((4, 128, 8), dict(padding=((0, 2),))),
        ((4, 128, 8), dict(input_dilation=2, padding=0)),
        ((4, 128, 8), dict(strides=2)),
        ((512, 8), {}),
        ((8, 128, 4, 8), {}),
        ((4, 128, 8), dict(precision="highest")),
    ],
    ids=str,
)  # fmt: skip
def test_grouped_layers_with_kernel_1_of_many_positions(shape, options):
    """From 512 positions on, a CPU computes their groups one by one."""
    x = jax.random.normal(jax.random.key(0), shape)
    options = dict(features=6, kernel_size=(1,), feature_group_count=2, **options)
    theirs = nn.Conv(**options)
    variables = theirs.init(jax.random.key(1), x)
    expected = theirs.apply(variables, x)
    np.testing.assert_allclose(Conv(**options).apply(variables, x), expected, atol=1e-5)
