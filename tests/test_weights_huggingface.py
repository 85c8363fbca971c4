"""What we save as folders `transformers` loads; test_weights_folders.py reads every kind of folder."""

import jax
import numpy as np
import pytest
import torch

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.weights import weight_files

MODELS = "squeeze_jax.models"
FAMILIES = {
    name: registry.load(MODELS, name).HUGGINGFACE
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
}
CASES = [(name, task) for name, family in FAMILIES.items() for task in family.classes]


pytestmark = pytest.mark.usefixtures("transformers")


def made(name, *, layers=1, **options):
    """(a small net, variables of noise)."""
    net = models.make(name, variant="toy", layers=layers, **options)
    rng = np.random.default_rng(0)
    tokens = np.zeros((1, 1, 1) if net.task == "choice" else (1, 1), np.int32)
    like = jax.eval_shape(net.init, jax.random.key(0), {"tokens": tokens})

    def noise(a):
        return rng.normal(0, 0.3, a.shape).astype(np.float32)

    return net, tree.map_named(lambda k, a: noise(a) + k.endswith("scale"), like)


def opened(transformers, folder, cls):
    """The network that `transformers` makes of a folder, to which nothing may be missing or left."""
    net, told = getattr(transformers, cls).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    return net.eval()


def same(found, expected):
    assert tree.differences(expected, found) == []
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def outputs(found):
    """The logits in the order of ours."""
    keys = ("prediction_logits", "seq_relationship_logits", "sop_logits", "end_logits")
    keys += ("start_logits", "logits", "last_hidden_state")
    if "mc_logits" in found:
        keys = ("mc_logits",)
    return [found[key].detach().numpy() for key in keys if key in found]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_what_is_saved_gives_the_same_in_transformers(
    tmp_path, transformers, name, task
):
    options = dict(task=task, activation="gelu_tanh", epsilon=1e-3)
    if name == "squeezebert":
        options |= dict(groups={"query": 2, "output": 2}, layer_epsilon=1e-12)
    if name == "distilbert":
        del options["epsilon"]
    if name == "mobilebert":
        options |= dict(normalization="layer_norm", ffn_epsilon=1e-5)
    net, variables = made(name, num_classes=3, head_dropout=0.1, **options)
    padding = {"pad_token_id": 0} if name == "gpt2" else None
    models.save(tmp_path, net, variables, config=padding)
    their = opened(transformers, tmp_path, FAMILIES[name].classes[task])
    shape = (2, 3, 9) if task == "choice" else (2, 9)
    tokens = np.random.default_rng(1).integers(1, 99, shape)
    with torch.no_grad():
        expected = outputs(their(torch.tensor(tokens)))
    logits, _ = jax.jit(net.apply)(variables, {"tokens": tokens})
    found = jax.tree.leaves(logits)
    if task == "span":
        assert logits["start"] is found[1]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    again, read = models.load(tmp_path)
    same(read, variables)
    assert again == (
        net if task in ("classification", "tokens") else net.clone(num_classes=2)
    )


def test_a_pooler_that_only_the_class_has_is_written_fresh(tmp_path, transformers):
    net, variables = made("squeezebert", task="masked_lm", layer_epsilon=1e-12)
    assert "pooler" not in variables["params"]
    models.save(tmp_path, net, variables)
    kernel = weight_files.read(tmp_path / "model.safetensors")[
        "transformer.pooler.dense.weight"
    ]
    assert 0.015 < kernel.std() < 0.02


def test_a_pooler_that_the_class_has_not_is_left_out(tmp_path, transformers):
    net, variables = made("bert", task="masked_lm", pooler=True)
    models.save(tmp_path, net, variables)
    opened(transformers, tmp_path, "BertForMaskedLM")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_input": "wide"}, "narrow = 16 features: .* load features = 32"),
        ({"normalization": "layer_norm"}, "not with ffn_epsilon = 1e-12"),
        ({"trigram": False, "embedding_features": 32}, "another embedding_features"),
    ],
)
def test_mobileberts_that_transformers_has_not_are_not_written(
    tmp_path, options, message
):
    net, variables = made("mobilebert", **options)
    with pytest.raises(UserError, match=message):
        models.save(tmp_path, net, variables)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # theirs
def test_a_mobilebert_with_embeddings_as_wide_as_its_layers(tmp_path, transformers):
    net, variables = made("mobilebert", task="masked_lm", embedding_features=32)
    models.save(tmp_path, net, variables)
    their = opened(transformers, tmp_path, "MobileBertForMaskedLM")
    tokens = np.random.default_rng(1).integers(1, 99, (2, 9))
    with torch.no_grad():
        (expected,) = outputs(their(torch.tensor(tokens)))
    found, _ = jax.jit(net.apply)(variables, {"tokens": tokens})
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    their.save_pretrained(tmp_path / "theirs")
    same(models.load(tmp_path / "theirs")[1], variables)


@pytest.mark.parametrize(
    "name", ["albert", "bert", "electra", "mobilebert", "roberta", "squeezebert"]
)
def test_an_encoder_without_segments_is_not_written(tmp_path, name):
    options = {"layer_epsilon": 1e-12} if name == "squeezebert" else {}
    net, variables = made(name, segments=0, task="features", **options)
    with pytest.raises(UserError, match="embeds segments: it could not load a netw"):
        models.save(tmp_path, net, variables)
    assert not list(tmp_path.iterdir())


def test_what_transformers_could_not_load_is_not_written(tmp_path):
    for name, options, message in (
        (
            "squeezebert",
            dict(task="pretraining"),
            "no squeezebert for task 'pretraining': save it for",
        ),
        (
            "squeezebert",
            dict(epsilon=1e-5),
            "whatever its config says: not with layer_epsilon = 1e-05",
        ),
        ("distilbert", dict(epsilon=1e-5), "its config says: not with epsilon = 1e-05"),
        ("albert", dict(task="next_sentence"), "no albert for task 'next_sentence'"),
    ):
        net, variables = made(name, **options)
        with pytest.raises(UserError, match=message):
            models.save(tmp_path, net, variables)
    net, variables = made("squeezebert", groups=[4, 1], layers=2)
    with pytest.raises(UserError, match="the same groups in every layer"):
        models.save(tmp_path, net, variables)
    net = models.make("squeezenet", variant="tiny")
    with pytest.raises(UserError, match="transformers has no encoder SqueezeNet"):
        models.save(tmp_path, net, variables)
    net, variables = made("bert")
    other = models.make("bert", variant="toy", layers=1, num_classes=3)
    with pytest.raises(
        UserError, match=r"the variables: weights do not fit: head/classifier/bias: ex"
    ):
        models.save(tmp_path, other, variables)
    net, variables = made("bert", num_classes=3)
    labels = {"id2label": {0: "no", 1: "yes"}}
    with pytest.raises(
        UserError, match="2 labels in id2label: the net has num_classes"
    ):
        models.save(tmp_path, net, variables, config=labels)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        models.save(tmp_path / "file", net, variables)


def test_labels_are_kept(tmp_path, transformers):
    net, variables = made("bert")
    models.save(tmp_path, net, variables, config={"id2label": {0: "no", 1: "yes"}})
    theirs = opened(transformers, tmp_path, "BertForSequenceClassification")
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    assert theirs.config.label2id == {"no": 0, "yes": 1}
    assert models.load(tmp_path)[0] == net
