"""Contracts of every network, and what each network's options promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import models, registry, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError

# (parameters, MACs in millions at 224 pixels), counted on torchvision's networks by PyTorch's own counter.
PUBLISHED = {
    ("mobilenet_v2", "0.35"): (1_677_128, 59.29),
    ("mobilenet_v2", "0.5"): (1_968_680, 97.13),
    ("mobilenet_v2", "0.75"): (2_636_424, 209.07),
    ("mobilenet_v2", "1.0"): (3_504_872, 300.77),
    ("mobilenet_v2", "1.4"): (6_108_776, 582.20),
    ("resnet", "101"): (44_549_160, 7_801.41),
    ("resnet", "152"): (60_192_808, 11_513.63),
    ("resnet", "18"): (11_689_512, 1_814.07),
    ("resnet", "34"): (21_797_672, 3_663.76),
    ("resnet", "50"): (25_557_032, 4_089.18),
    ("squeezenet", "1.0"): (1_248_424, 818.92),
    ("squeezenet", "1.1"): (1_235_496, 349.15),
}
NAMES = registry.names("squeeze_jax.models")
ALL = [
    (name, variant)
    for name in NAMES
    for variant in registry.load("squeeze_jax.models", name).VARIANTS
    if variant != "tiny"
]


def image(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def filled(net):
    """(variables of noise, images): quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(net.init, jax.random.key(0), image(1, 32, 32, 3))
    noise = lambda a: rng.uniform(-0.2, 0.3, a.shape).astype(np.float32)  # noqa: E731
    fill = lambda name, a: noise(a) + name.endswith("/var")  # noqa: E731
    return tree.map_named(fill, like), noise(image(2, 32, 32, 3))


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_parameters_and_macs_are_the_published_ones(name, variant):
    parameters, macs = PUBLISHED[name, variant]
    net = models.make(name, variant=variant)
    x = image(1, 224, 224, 3)
    assert count.parameters(net, x) == parameters
    found = count.macs(net, x)
    assert round(found.total / 1e6, 2) == macs
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("variant", "size", "padding", "macs"),
    [("1.0", 227, 0, 832.67), ("1.1", 227, 0, 387.75), ("1.0", 227, 1, 861.34)],
)
def test_squeezenet_at_the_size_of_its_paper(variant, size, padding, macs):
    net = models.make("squeezenet", variant=variant, conv10_padding=padding)
    total = count.macs(net, image(1, size, size, 3)).total
    assert round(total / 1e6, 2) == macs


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name):
    net = models.make(name, variant="tiny", num_classes=7)

    @jax.jit
    def gradient(x):
        variables = net.init(jax.random.key(1), x)

        def loss(params):
            (logits, _), _ = net.apply(
                {**variables, "params": params},
                x,
                train=True,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats"],
            )
            return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)].mean()

        return jax.grad(loss)(variables["params"])

    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    for key, g in tree.flatten(gradient(x)).items():
        assert np.isfinite(g).all(), key
        assert np.any(g), key


@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_bfloat16_give_float32_logits(name):
    net = models.make(name, variant="tiny", num_classes=7)
    variables, _ = filled(net)
    x = jax.random.normal(jax.random.key(3), (2, 45, 33, 3))
    both = jax.jit(lambda v, *xs: [net.apply(v, x) for x in xs])
    found = both(variables, x, x.astype(jnp.bfloat16))
    (logits, endpoints), (half, half_endpoints) = found
    assert logits.shape == half.shape == (2, 7)
    assert logits.dtype == half.dtype == jnp.float32
    assert {e.dtype for e in endpoints.values()} == {jnp.dtype(jnp.float32)}
    assert {e.dtype for e in half_endpoints.values()} == {jnp.dtype(jnp.bfloat16)}
    # Eight bits of mantissa, a dozen layers.
    scale = float(jnp.abs(logits).max())
    assert scale > 0.01
    np.testing.assert_allclose(half, logits, atol=0.05 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_variants_are_small(name):
    net = models.make(name, variant="tiny", num_classes=7)
    assert count.parameters(net, image(1, 32, 32, 3)) < 20_000


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variants_and_options_are_named(name):
    with pytest.raises(UserError, match=rf"unknown variant of {name} 'tinny'.*'tiny'"):
        models.make(name, variant="tinny")
    with pytest.raises(UserError, match=r"config\.model\.num_clases.*'num_classes'"):
        models.make(name, num_clases=10)


def shapes(net, size):
    """{endpoint: its height}, without computing anything; in no order."""
    x = image(1, size, size, 3)
    found = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
    return {name: e.shape[1] for name, e in found[0][1].items()}


def test_an_image_too_small_for_the_strides_is_an_error():
    with pytest.raises(UserError, match="smaller than a window"):
        shapes(models.make("squeezenet", variant="1.0"), 16)


class TestSqueezeNet:
    def test_published_maps_at_224(self):
        # Table 1: 111 (of 227), pooled to 55, 27, 13.
        net = models.make("squeezenet", variant="1.0")
        found = shapes(net, 227)
        fires = dict.fromkeys(("fire2", "fire3", "fire4"), 55)
        fires |= dict.fromkeys(("fire5", "fire6", "fire7", "fire8"), 27)
        assert found == dict(conv1=111, **fires, fire9=13, conv10=13)

    def test_stem_and_pools_for_small_images(self):
        net = models.make("squeezenet", stem_strides=1, pools=["fire3", "fire5"])
        found = shapes(net, 32)
        # 3x3 without padding 30, ceil(27 / 2) + 1 = 15, ceil(12 / 2) + 1 = 7.
        before = dict.fromkeys(("conv1", "fire2", "fire3"), 30)
        between = dict.fromkeys(("fire4", "fire5"), 15)
        after = dict.fromkeys(("fire6", "fire7", "fire8", "fire9", "conv10"), 7)
        assert found == before | between | after
        with pytest.raises(UserError, match="unknown layer 'fire33' in pools"):
            models.make("squeezenet", pools=("fire33",))

    def test_bypass_parameters(self):
        x = image(1, 224, 224, 3)
        plain, simple, complex_ = (
            count.parameters(models.make("squeezenet", variant="1.0", bypass=b), x)
            for b in ("none", "simple", "complex")
        )
        assert simple == plain
        # Figure 2: 1x1 convolutions with bias around fire2, fire4, fire6 and fire8.
        pairs = ((96, 128), (128, 256), (256, 384), (384, 512))
        assert complex_ == plain + sum(i * o + o for i, o in pairs)

    @pytest.mark.parametrize("bypass", ["simple", "complex"])
    def test_a_bypassed_fire_that_computes_nothing_is_its_bypass(self, bypass):
        net = models.make("squeezenet", variant="tiny", bypass=bypass, pools=())
        variables, x = filled(net)
        params = tree.map_named(
            lambda name, leaf: 0 * leaf if "expand" in name else leaf,
            variables["params"],
        )
        _, endpoints = jax.jit(net.apply)({"params": params}, x)
        np.testing.assert_array_equal(endpoints["fire3"], endpoints["fire2"])
        if bypass == "complex":
            bypass1x1 = params["fire2"]["bypass1x1"]
            expected = endpoints["conv1"] @ bypass1x1["kernel"][0, 0]
            expected += bypass1x1["bias"]
            np.testing.assert_allclose(endpoints["fire2"], expected, atol=1e-5)

    def test_norm_replaces_biases(self):
        net = models.make("squeezenet", variant="tiny", norm=True)
        variables = jax.eval_shape(net.init, jax.random.key(0), image(1, 32, 32, 3))
        names = tree.flatten(variables["params"])
        assert [n for n in names if n.endswith("conv1/bias")] == []
        assert "fire2/expand3x3_norm/scale" in names
        assert "fire2/expand3x3_norm/mean" in tree.flatten(variables["batch_stats"])

    def test_without_its_relu_conv10_may_score_below_zero(self):
        plain, free = (
            models.make("squeezenet", variant="tiny", conv10_relu=relu)
            for relu in (True, False)
        )
        variables, x = filled(plain)
        score = lambda v, x: (plain.apply(v, x)[0], free.apply(v, x))  # noqa: E731
        logits, (scores, endpoints) = jax.jit(score)(variables, x)
        assert logits.min() == 0 > scores.min()
        maps = np.asarray(endpoints["conv10"])
        np.testing.assert_allclose(logits, maps.clip(0).mean((1, 2)), rtol=1e-5)

    def test_width_halves_the_channels(self):
        net = models.make("squeezenet", variant="1.0", width=0.5)
        found = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        kernels = found["params"]
        assert kernels["fire9"]["squeeze1x1"]["kernel"].shape == (1, 1, 256, 32)
        assert kernels["conv10"]["kernel"].shape == (1, 1, 256, 1000)


class TestMobileNetV2:
    def test_published_maps_at_224(self):
        # Table 2, the inputs of each line.
        found = shapes(models.make("mobilenet_v2"), 224)
        stages = dict(stage1=112, stage2=56, stage3=28, stage4=14, stage5=14, stage6=7)
        assert found == dict(conv1=112, **stages, stage7=7, head=7)

    def test_strides_for_small_images(self):
        net = models.make("mobilenet_v2", stem_strides=1, strides=[1, 1, 2, 2, 1, 2, 1])
        stages = dict(stage1=32, stage2=32, stage3=16, stage4=8, stage5=8, stage6=4)
        assert shapes(net, 32) == dict(conv1=32, **stages, stage7=4, head=4)
        with pytest.raises(UserError, match="7 stages need as many"):
            models.make("mobilenet_v2", strides=(1, 2))

    def test_the_width_option_is_the_variant(self):
        x = image(1, 224, 224, 3)
        by_option = models.make("mobilenet_v2", width=1.4)
        assert count.parameters(by_option, x) == PUBLISHED["mobilenet_v2", "1.4"][0]

    def test_dropout_acts_in_training_alone(self):
        net = models.make("mobilenet_v2", variant="tiny", dropout=0.5)
        variables, x = filled(net)

        @jax.jit
        def run(*keys):
            train = lambda key: net.apply(  # noqa: E731
                variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )[0][0]
            return [train(key) for key in keys]

        first, second = run(jax.random.key(0), jax.random.key(1))
        assert np.abs(first - second).max() > 1e-3


class TestResNet:
    def test_published_maps_at_224(self):
        # Table 1.
        found = shapes(models.make("resnet"), 224)
        assert found == dict(conv1=112, conv2=56, conv3=28, conv4=14, conv5=7)

    def test_cifar_stem_keeps_the_size(self):
        found = shapes(models.make("resnet", variant="18", stem="cifar"), 32)
        assert found == dict(conv1=32, conv2=32, conv3=16, conv4=8, conv5=4)

    def test_width(self):
        net = models.make("resnet", variant="18", width=0.5)
        found = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        assert found["params"]["classifier"]["kernel"].shape == (256, 1000)
