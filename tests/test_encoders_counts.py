"""Parameters and multiply-accumulates of every encoder of text are the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import models, registry, tree
from squeeze_jax.cost import count

MODELS = "squeeze_jax.models"
# (parameters, MACs in billions at 128 tokens), counted by PyTorch's own counter on the classes of `transformers`: the
# encoder with its pooler, without a head.
PUBLISHED = {
    ("albert", "base"): (11_683_584, 11.1868),
    ("albert", "large"): (17_683_968, 39.4778),
    ("albert", "xlarge"): (58_724_864, 156.2672),
    ("albert", "xxlarge"): (222_595_584, 310.9321),
    ("bert", "base"): (109_482_240, 11.1742),
    ("bert", "large"): (335_141_888, 39.4611),
    ("bert", "medium"): (41_373_184, 3.3557),
    ("bert", "mini"): (11_170_560, 0.4363),
    ("bert", "small"): (28_763_648, 1.6780),
    ("bert", "tiny"): (4_385_920, 0.0587),
    ("bert", "tinybert4"): (14_350_248, 0.6237),
    ("bert", "tinybert6"): (66_955_008, 5.5874),
    ("distilbert", "base"): (66_362_880, 5.5868),
    ("electra", "base"): (108_891_648, 11.1736),
    ("electra", "base_generator"): (33_511_168, 1.3338),
    ("electra", "large"): (334_092_288, 39.4600),
    ("electra", "large_generator"): (50_999_552, 2.6508),
    ("electra", "small"): (13_483_008, 1.3128),
    ("electra", "small_generator"): (4_580_928, 0.1017),
    ("gpt2", "large"): (774_030_080, 92.1069),
    ("gpt2", "medium"): (354_823_168, 39.4600),
    ("gpt2", "small"): (124_439_808, 11.1736),
    ("gpt2", "xl"): (1_557_611_200, 191.2603),
    ("mobilebert", "base"): (24_844_544, 2.6930),
    # By hand from 2004.02984, Table 1: 293 million in its last row, which leaves the pooler out.
    ("mobilebert", "teacher"): (294_467_840, 37.8748),
    ("mobilebert", "tiny"): (15_748_352, 1.5354),
    ("roberta", "base"): (124_645_632, 11.1742),
    ("roberta", "large"): (355_359_744, 39.4611),
    ("squeezebert", "base"): (51_089_664, 3.7000),
    ("squeezebert", "released"): (51_094_272, 3.7000),
}
NAMES = [
    name
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
]
ALL = [
    (name, variant)
    for name in NAMES
    for variant in registry.load(MODELS, name).VARIANTS
    if variant != "toy"
]


def shapes(length):
    x = {"tokens": jnp.int32, "segments": jnp.int32, "attended": jnp.bool_}
    return {key: jax.ShapeDtypeStruct((1, length), dtype) for key, dtype in x.items()}


def counted(name, *, layers, **options):
    """Parameters and MACs."""
    net, x = models.make(name, task="features", layers=layers, **options), shapes(128)
    sizes = []

    def run(x):
        # Initialisation multiplies no matrices: one trace tells both.
        found, variables = net.init_with_output(jax.random.key(0), x)
        sizes.append(tree.size(variables["params"]))
        return found

    macs = count.macs(run, x)
    assert macs.unknown == ()
    return np.array([*sizes, macs.total])


def of_two(name, *, variant="base", **options):
    """As `counted`, of all layers: they are alike, which `base` shows, and two of them are quicker to trace."""
    one, two = (counted(name, variant=variant, layers=n, **options) for n in (1, 2))
    return one + (models.make(name, variant=variant).row.layers - 1) * (two - one)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_parameters_and_macs_are_the_published_ones(name, variant):
    if variant == "base":
        layers = models.make(name, variant=variant).row.layers
        parameters, macs = counted(name, variant=variant, layers=layers)
    else:
        parameters, macs = of_two(name, variant=variant)
    assert (parameters, round(macs / 1e9, 4)) == PUBLISHED[name, variant]


@pytest.mark.parametrize("name", NAMES)
def test_toys_are_small(name):
    assert count.parameters(models.make(name, variant="toy"), shapes(8)) < 25_000


def test_squeezebert_without_groups_costs_as_much_as_bert():
    parameters, macs = of_two("squeezebert", groups=1)
    assert parameters == PUBLISHED["bert", "base"][0]
    assert round(macs / 1e9, 4) == 11.1742


def test_a_shuffled_layer_after_attention_of_squeezebert():
    """Of 12 layers 768² (1 - 1/4) weights and as many MACs a token are saved."""
    saved = 12 * 768 * 768 * 3 // 4
    less = of_two("squeezebert") - of_two("squeezebert", groups=4, shuffle=True)
    assert less.tolist() == [saved, 128 * saved]


def test_two_feed_forward_networks_of_mobilebert():
    parameters, macs = of_two("mobilebert", stacks=2)
    assert parameters == 18_510_080
    assert round(macs / 1e9, 4) == 1.8877
