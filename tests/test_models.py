"""Contracts of every network of images, and what each network's options promise; test_encoders.py has those of text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import models, registry, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError

# (parameters, MACs in millions at 224 pixels or at SIZES), counted by PyTorch's own counter: on torchvision's networks;
# on timm's for EfficientNet Lite and for the narrow and minimalistic MobileNetV3; on the authors' networks for once-for-all and AttentiveNAS; for ShuffleNet on its authors' code
# where that has the variant, else on the network of test_models_parity.py.
PUBLISHED = {
    ("attentive_nas", "imagenet"): (23_404_080, 1_179.10),
    ("efficientnet", "b0"): (5_288_548, 385.81),
    ("efficientnet", "b1"): (7_794_184, 686.80),
    ("efficientnet", "b2"): (9_109_994, 993.56),
    ("efficientnet", "b3"): (12_233_232, 1_827.14),
    ("efficientnet", "b4"): (19_341_616, 4_393.77),
    ("efficientnet", "b5"): (30_389_784, 10_266.38),
    ("efficientnet", "b6"): (43_040_704, 19_067.59),
    ("efficientnet", "b7"): (66_347_960, 37_745.88),
    ("efficientnet", "lite0"): (4_652_008, 385.19),
    ("efficientnet", "lite1"): (5_416_680, 600.19),
    ("efficientnet", "lite2"): (6_092_072, 859.74),
    ("efficientnet", "lite3"): (8_197_096, 1_383.32),
    ("efficientnet", "lite4"): (13_006_568, 2_553.03),
    # By hand. Kernels of stages 9 * (3 * 16 + 16 * 32 + 32 * 64 + 64 * 64 + 64 * 96 + 96 * 96 + 96 * 128 + 128 * 128)
    # = 456,624, scales and biases 2 * (16 + 32 + 2 * 64 + 2 * 96 + 2 * 128) = 1,248; scores (128 + 1) * 21 = 2,709,
    # (96 + 1) * 21 = 2,037 and (64 + 1) * 21 = 1,365. MACs: 432 * 112**2 + 4,608 * 56**2 + 55,296 * 28**2
    # + 138,240 * 14**2 + 258,048 * 7**2 = 102,961,152; scores 2,688 * 7**2, 2,016 * 14**2 and 1,344 * 28**2.
    ("fcn", "16s"): (462_618, 103.49),
    ("fcn", "32s"): (460_581, 103.09),
    ("fcn", "8s"): (463_983, 104.54),
    ("mobilenet_v2", "0.35"): (1_677_128, 59.29),
    ("mobilenet_v2", "0.5"): (1_968_680, 97.13),
    ("mobilenet_v2", "0.75"): (2_636_424, 209.07),
    ("mobilenet_v2", "1.0"): (3_504_872, 300.77),
    ("mobilenet_v2", "1.4"): (6_108_776, 582.20),
    ("mobilenet_v3", "large"): (5_483_032, 216.59),
    ("mobilenet_v3", "large-0.75"): (3_993_528, 154.56),
    ("mobilenet_v3", "large-minimalistic"): (3_924_288, 209.14),
    ("mobilenet_v3", "small"): (2_542_856, 56.51),
    ("mobilenet_v3", "small-0.75"): (2_041_872, 43.40),
    ("mobilenet_v3", "small-minimalistic"): (2_044_736, 52.29),
    # By hand, of c channels expanded to w = 6 c: a block has w (c + 25 + o) weights, 4 w + 2 o of its normalisations, and (2 w + 1) s
    # + w of an excitation of s = w / 4 channels. At 32 pixels the blocks have 0.69, 0.67, 0.67, 0.38, 0.43, 0.43, 0.29, 0.47 and 0.47
    # million MACs, the stem and the first block 0.21, head and classifier 1.10.
    ("ofa_mobilenet_v3", "cifar"): (1_637_440, 5.83),
    ("ofa_mobilenet_v3", "w1.0"): (7_664_760, 566.17),
    ("ofa_mobilenet_v3", "w1.2"): (10_701_632, 843.10),
    ("ofa_proxyless", "w1.3"): (7_942_056, 1_004.91),
    ("ofa_resnet", "50"): (48_105_992, 7_491.64),
    ("resnet", "101"): (44_549_160, 7_801.41),
    ("resnet", "152"): (60_192_808, 11_513.63),
    ("resnet", "18"): (11_689_512, 1_814.07),
    ("resnet", "34"): (21_797_672, 3_663.76),
    ("resnet", "50"): (25_557_032, 4_089.18),
    ("shufflenet", "0.25-g1"): (208_746, 11.00),
    ("shufflenet", "0.25-g2"): (266_026, 11.16),
    ("shufflenet", "0.25-g3"): (304_902, 11.01),
    ("shufflenet", "0.25-g4"): (337_544, 11.81),
    ("shufflenet", "0.25-g8"): (453_504, 12.43),
    ("shufflenet", "0.5-g1"): (533_484, 38.52),
    ("shufflenet", "0.5-g2"): (642_932, 38.57),
    ("shufflenet", "0.5-g3"): (717_324, 37.59),
    ("shufflenet", "0.5-g4"): (777_040, 37.47),
    ("shufflenet", "0.5-g8"): (1_010_448, 40.47),
    ("shufflenet", "1.0-g1"): (1_530_936, 143.08),
    ("shufflenet", "1.0-g2"): (1_732_848, 140.84),
    ("shufflenet", "1.0-g3"): (1_864_728, 137.46),
    ("shufflenet", "1.0-g4"): (1_967_344, 134.34),
    ("shufflenet", "1.0-g8"): (2_433_768, 138.37),
    ("shufflenet", "1.5-g3"): (3_441_168, 292.44),
    ("shufflenet", "1.5-g8"): (4_268_952, 290.19),
    ("shufflenet", "2.0-g3"): (5_449_776, 524.05),
    ("shufflenet", "2.0-g8"): (6_521_232, 521.94),
    # By hand: 9 c c' weights of each convolution, 2 c of each normalisation, 128 x 1000 + 1000 of the classifier.
    ("slimmable", "small"): (795_144, 4205.28),
    ("squeezenet", "1.0"): (1_248_424, 818.92),
    ("squeezenet", "1.1"): (1_235_496, 349.15),
}
# Pixels where a variant is made for another number of them: the authors' efficientnet and efficientnet/lite READMEs.
SIZES = {
    ("efficientnet", "b1"): 240,
    ("efficientnet", "b2"): 260,
    ("efficientnet", "b3"): 300,
    ("efficientnet", "b4"): 380,
    ("efficientnet", "b5"): 456,
    ("efficientnet", "b6"): 528,
    ("efficientnet", "b7"): 600,
    ("efficientnet", "lite1"): 240,
    ("efficientnet", "lite2"): 260,
    ("efficientnet", "lite3"): 280,
    ("efficientnet", "lite4"): 300,
    ("ofa_mobilenet_v3", "cifar"): 32,
}
# A network of several widths is initialised and counted at one.
OPTIONS = {"slimmable": {"switches": (1.0,)}}
# Each architecture is in this table or, where it says that its inputs are tokens, in that of test_encoders_counts.py.
NAMES = [
    name
    for name in registry.names("squeeze_jax.models")
    if getattr(registry.load("squeeze_jax.models", name), "INPUTS", "") != "tokens"
]
DENSE = {"fcn"}  # networks that score every pixel
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

    def noise(a):
        return rng.uniform(-0.2, 0.3, a.shape).astype(np.float32)

    def fill(name, a):
        return noise(a) + name.endswith("/var")

    return tree.map_named(fill, like), noise(image(2, 32, 32, 3))


@functools.cache
def counted(name, variant):
    """Parameters and MACs of an image of the size that the variant is made for."""
    net = models.make(name, variant=variant, **OPTIONS.get(name, {}))
    size = SIZES.get((name, variant), 224)
    x = image(1, size, size, 3)
    sizes = []

    def run(x):
        # Initialisation multiplies no matrices: one trace tells both.
        found, variables = net.init_with_output(jax.random.key(0), x)
        sizes.append(tree.size(variables["params"]))
        return found

    macs = count.macs(run, x)
    assert macs.unknown == ()
    return *sizes, macs.total


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_parameters_and_macs_are_the_published_ones(name, variant):
    parameters, macs = counted(name, variant)
    assert (parameters, round(macs / 1e6, 2)) == PUBLISHED[name, variant]


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
    options = OPTIONS.get(name, {})
    net = models.make(name, variant="tiny", num_classes=7, **options)

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
    expected = (2, 45, 33, 7) if name in DENSE else (2, 7)
    assert logits.shape == half.shape == expected
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


class TestSqueezeNet:
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

        def score(v, x):
            return (plain.apply(v, x)[0], free.apply(v, x))

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
    def test_the_width_option_is_the_variant(self):
        x = image(1, 224, 224, 3)
        by_option = models.make("mobilenet_v2", width=1.4)
        assert count.parameters(by_option, x) == PUBLISHED["mobilenet_v2", "1.4"][0]

    def test_dropout_acts_in_training_alone(self):
        net = models.make("mobilenet_v2", variant="tiny", dropout=0.5)
        variables, x = filled(net)

        @jax.jit
        def run(*keys):
            def train(key):
                return net.apply(
                    variables,
                    x,
                    train=True,
                    rngs={"dropout": key},
                    mutable=["batch_stats"],
                )[0][0]

            return [train(key) for key in keys]

        first, second = run(jax.random.key(0), jax.random.key(1))
        assert np.abs(first - second).max() > 1e-3


class TestMobileNetV3:
    def test_the_width_option_is_the_variant(self):
        x = image(1, 224, 224, 3)
        net = models.make("mobilenet_v3", variant="small", width=0.75)
        published = PUBLISHED["mobilenet_v3", "small-0.75"]
        assert count.parameters(net, x) == published[0]


class TestEfficientNet:
    @pytest.mark.parametrize("variant", ["b3", "lite3"])
    def test_the_options_are_the_variant(self, variant):
        kind = variant.replace("3", "0")
        net = models.make("efficientnet", variant=kind, width=1.2, depth=1.4)
        found = count.parameters(net, image(1, 224, 224, 3))
        assert found == PUBLISHED["efficientnet", variant][0]

    def test_stochastic_depth_leaves_out_samples_and_makes_up_for_it(self):
        module = registry.load("squeeze_jax.models", "efficientnet")
        stages = (module.Stage(1, 8, 1, 1, 3), module.Stage(2, 8, 1, 1, 3))
        row = module.Row(1.0, 1.0, 0.0, stem=8, head=8, stages=stages)
        steady, skipping = (
            module.EfficientNet(row, 7, rate, (2, 2)) for rate in (0.0, 1.0)
        )
        variables, _ = filled(steady)
        x = np.random.default_rng(1).normal(size=(64, 8, 8, 3)).astype(np.float32)

        @jax.jit
        def parts(key):
            """What each block adds, [[b, h, w, c] of block 0, of block 1] of both nets."""
            options = dict(train=True, rngs={"dropout": key}, mutable=["batch_stats"])
            found = [
                net.apply(variables, x, **options)[0][1] for net in (steady, skipping)
            ]
            names = (("stage2", "conv1"), ("stage3", "stage2"))
            return [[e[after] - e[before] for after, before in names] for e in found]

        expected, found = parts(jax.random.key(0))
        # Rates 1 * 0 / 2 and 1 * 1 / 2: all samples pass block 0, half of them block 1, and those count twice.
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        passed = np.abs(found[1]).max((1, 2, 3)) > 0
        assert 16 <= passed.sum() <= 48  # four standard deviations
        factor = 2 * passed[:, None, None, None]
        np.testing.assert_allclose(found[1], factor * expected[1], atol=1e-5)

    def test_names_of_timm_checkpoints(self):
        module = registry.load("squeeze_jax.models", "efficientnet")
        names = module.timm_names(models.make("efficientnet", variant="b0"))
        expected = {
            "conv1": "conv_stem",
            "stage2_1/depthwise_norm": "blocks.0.0.bn1",
            "stage2_1/project": "blocks.0.0.conv_pw",
            "stage7_4/expand": "blocks.5.3.conv_pw",
            "stage7_4/squeeze_excite/reduce": "blocks.5.3.se.conv_reduce",
            "stage7_4/project_norm": "blocks.5.3.bn3",
            "head_norm": "bn2",
        }
        assert {ours: names[ours] for ours in expected} == expected
        lite = module.timm_names(models.make("efficientnet", variant="lite0"))
        excitation = {ours for ours in names if "squeeze_excite" in ours}
        assert lite == {k: v for k, v in names.items() if k not in excitation}


class TestShuffleNet:
    @pytest.mark.parametrize(
        ("groups", "features", "complexity"),
        [(1, 576, 143), (2, 800, 140), (3, 960, 137), (4, 1088, 133), (8, 1536, 137)],
    )
    def test_complexity_of_table_1(self, groups, features, complexity):
        _, macs = counted("shufflenet", f"1.0-g{groups}")
        # The table leaves out the last layer, 1000 sums over stage 4's features.
        assert round((macs - 1000 * features) / 1e6) == complexity

    @pytest.mark.parametrize(
        ("variant", "complexity"),
        [("0.5-g3", 38), ("1.5-g3", 292), ("2.0-g3", 524)],
    )
    def test_complexity_of_tables_5_and_8(self, variant, complexity):
        # These count the last layer.
        _, macs = counted("shufflenet", variant)
        assert round(macs / 1e6) == complexity

    def test_the_width_option_is_the_variant(self):
        x = image(1, 224, 224, 3)
        net = models.make("shufflenet", variant="1.0-g4", width=0.5)
        assert count.parameters(net, x) == PUBLISHED["shufflenet", "0.5-g4"][0]

    def test_channel_shuffle(self):
        module = registry.load("squeeze_jax.models", "shufflenet")
        # Figure 1(c): two groups of three.
        x = jnp.array([[10, 11, 12, 20, 21, 22]])
        shuffled = module.channel_shuffle(x, 2)
        assert shuffled.tolist() == [[10, 20, 11, 21, 12, 22]]
        assert module.channel_shuffle(shuffled, 3).tolist() == x.tolist()


class TestResNet:
    def test_width(self):
        net = models.make("resnet", variant="18", width=0.5)
        found = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        assert found["params"]["classifier"]["kernel"].shape == (256, 1000)
