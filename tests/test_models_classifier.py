"""Which parameters belong to the classifier of each network, and networks without one."""

import jax
import numpy as np
import pytest

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError

ALL = registry.names("squeeze_jax.models")
WITHOUT_CLASSES = ("lstm",)  # its outputs are a vocabulary's
DENSE = ("fcn",)  # they score each pixel, at several sizes
NAMES = [name for name in ALL if name not in WITHOUT_CLASSES]
LENGTH = 5
# What belongs to the classifier though its shape does not depend on the classes: BERT's pooler, and the layer of its own
# that a classifier has in those without a pooler.
POOLER, TRANSFORM = {"pooler/dense"}, {"head/transform"}
HEAD_LAYERS = {
    "albert": POOLER,
    "attentive_nas": set(),
    "bert": POOLER,
    "distilbert": TRANSFORM,
    "efficientnet": set(),
    "elastic_squeezebert": POOLER,
    "fcn": set(),
    "electra": TRANSFORM,
    "gpt2": set(),
    "mobilebert": POOLER,
    "mobilenet_v2": set(),
    "mobilenet_v3": set(),
    "ofa_mobilenet_v3": set(),
    "ofa_proxyless": set(),
    "ofa_resnet": set(),
    "resnet": set(),
    "roberta": TRANSFORM,
    "shufflenet": set(),
    "slimmable": set(),
    "squeezebert": POOLER,
    "squeezenet": set(),
    # Has no classes: both heads.
    "electra_pretraining": {
        *(f"generator/head/masked_lm{part}" for part in ("", "/transform", "/norm")),
        *(f"discriminator/head/{part}" for part in ("transform", "replaced")),
    },
}


def encodes(name):
    return getattr(registry.load("squeeze_jax.models", name), "INPUTS", "") == "tokens"


def built(name, **options):
    own = name == "elastic_squeezebert"
    variant = "toy" if encodes(name) and not own else "tiny"
    if name != "electra_pretraining" and encodes(name):
        options = {"task": "classification", **options}
    return models.make(name, variant=variant, **options)


def batch(name):
    rng = np.random.default_rng(0)
    if encodes(name):
        return {"tokens": rng.integers(0, 99, (2, LENGTH)).astype(np.int32)}
    return rng.normal(size=(2, 32, 32, 3)).astype(np.float32)


def shapes(net, x):
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    return {name: a.shape for name, a in tree.flatten(variables["params"]).items()}


def filled(net, x):
    rng = np.random.default_rng(0)
    like = jax.eval_shape(net.init, jax.random.key(0), x)

    def noise(name, a):
        array = rng.uniform(-0.4, 0.4, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    return {kind: tree.map_named(noise, part) for kind, part in like.items()}


def test_every_network_has_a_row():
    assert sorted([*HEAD_LAYERS, *WITHOUT_CLASSES]) == sorted(ALL)


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_is_what_depends_on_the_classes_and_the_head(name):
    x = batch(name)
    choices = [{}, {}]
    if name != "electra_pretraining":
        choices = [{"num_classes": 5}, {"num_classes": 7}]
    five, seven = (shapes(built(name, **options), x) for options in choices)
    changed = {n for n in five if five[n] != seven[n]}
    extra = {n for n in five if n.rpartition("/")[0] in HEAD_LAYERS[name]}
    assert {n.rpartition("/")[0] for n in extra} == HEAD_LAYERS[name]
    starts = registry.load("squeeze_jax.models", name).CLASSIFIER
    under = {n for n in five if any(n.startswith(f"{start}/") for start in starts)}
    assert under == changed | extra
    if name != "electra_pretraining":
        assert changed
        without = shapes(built(name, num_classes=None), x)
        assert without == {n: s for n, s in five.items() if n not in under}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if not encodes(n) and n not in DENSE]
)
def test_the_features_of_an_image_are_what_the_classifier_reads(name):
    options = {"conv10_relu": False} if name == "squeezenet" else {}
    x, whole = batch(name), built(name, num_classes=7, **options)
    without = built(name, num_classes=None, **options)
    variables = filled(whole, x)
    (layer,) = registry.load("squeeze_jax.models", name).CLASSIFIER
    params = dict(variables["params"])
    last = params.pop(layer)

    @jax.jit
    def both(whole_variables, variables):
        return whole.apply(whole_variables, x)[0], without.apply(variables, x)

    logits, (features, endpoints) = both(variables, variables | {"params": params})
    assert features.dtype == np.float32
    assert layer not in endpoints
    # A mean over positions and a linear layer change places.
    kernel = last["kernel"].reshape(-1, 7)
    expected = features @ kernel + last.get("bias", 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_an_encoder_without_classes_returns_its_last_layer(name):
    x, net = batch(name), built(name, num_classes=None)
    last = built(name, task="features", **{"pooler": False} if name != "gpt2" else {})
    variables = filled(net, x)
    found, expected = jax.jit(lambda v: [n.apply(v, x)[0] for n in (net, last)])(
        variables
    )
    assert found.shape == (2, LENGTH, 32)
    np.testing.assert_array_equal(found, expected)


def test_a_pooler_stays_where_it_is_asked_for():
    x, net = batch("bert"), built("bert", num_classes=None, pooler=True)
    run = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
    (_, endpoints), variables = run
    assert endpoints["pooled"].shape == (2, 32)
    assert set(variables["params"]) == {"embeddings", "layer1", "layer2", "pooler"}


def test_a_network_without_a_head_is_saved_as_features_alone(tmp_path):
    with pytest.raises(UserError, match=r"no head.*task='features'"):
        models.save(tmp_path, built("bert", num_classes=None), {})


def test_a_language_model_for_another_vocabulary_changes_its_last_layer():
    module = registry.load("squeeze_jax.models", "lstm")
    x = {"tokens": np.zeros((1, 3), np.int32)}
    few, many = (
        shapes(models.make("lstm", variant="tiny", vocabulary=n), x) for n in (5, 9)
    )
    changed = {n for n in few if few[n] != many[n]}
    (layer,) = module.CLASSIFIER
    assert {n for n in few if n.startswith(f"{layer}/")} == changed - {
        n for n in changed if n.startswith("embedding")
    }


def test_a_network_of_maps_without_classes_returns_its_last_stage():
    x, net = batch("fcn"), built("fcn", num_classes=None)
    features, endpoints = jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0]
    assert features.shape == endpoints["stage5"].shape == (2, 1, 1, 16)
