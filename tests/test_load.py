"""One call loads published weights into a network: files of every naming, folders, and work directories."""

import functools
import logging
import sys
import unittest.mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs._load import load
from squeeze_jax.nn.conv import lowering
from squeeze_jax.weights import pretrained, weight_files

SIZE = 32


@functools.partial(jax.jit, static_argnums=0)
def run(net, variables, x):
    with lowering("native"):  # quicker to compile
        return net.apply(variables, x, train=False)[0]


def images(size=SIZE):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())  # fmt: skip


def randomised(net):
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def logits(net, x):
    with torch.no_grad():
        return net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def resnet(torchvision):
    return randomised(torchvision.models.resnet18(weights=None, num_classes=10))


@pytest.fixture(scope="module")
def state(resnet):
    return resnet.state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPERS = {
    "plain": (lambda s: s, []),
    "DataParallel": (lambda s: prefixed(s, "module."), ["names without 'module.'"]),
    "compile": (lambda s: prefixed(s, "_orig_mod."), ["names without '_orig_mod.'"]),
    "both": (
        lambda s: prefixed(s, "module._orig_mod."),
        ["names without 'module.'", "names without '_orig_mod.'"],
    ),
    "compiled layer": (
        lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
        ["names without '_orig_mod.'"],
    ),
    "Lightning": (
        lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3},
        ["the weights are the checkpoint's 'state_dict'", "names without 'model.'"],
    ),
    "AveragedModel": (
        lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
        ["the weights are an average", "names without 'module.'"],
    ),
    "timm": (
        lambda s: {
            "state_dict": s,
            "state_dict_ema": {k: 0.0 * v for k, v in s.items()},
        },
        ["the weights are the checkpoint's 'state_dict'"],
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights_load_and_the_log_says_how(
    resnet, state, tmp_path, caplog, wrapper
):
    wrap, said = WRAPPERS[wrapper]
    torch.save(wrap(state), tmp_path / "w.pth")
    net = models.make("resnet", variant="18", num_classes=10)
    variables = load(tmp_path / "w.pth", net)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for start in [*said, "the names are recognised as those of torchvision"]:
        assert any(f"w.pth: {start}" in line for line in lines), (start, lines)
    assert len(lines) == len(said) + 1
    x = images()
    close(run(net, variables, x), logits(resnet, x))


def test_an_average_beside_the_weights_is_named_and_can_be_chosen(
    resnet, state, tmp_path, caplog
):
    average = {k: v + 1 if "fc" in k else v for k, v in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "w.pth")
    net, variables = load(tmp_path / "w.pth", "resnet", variant="18", num_classes=10)
    assert "state_dict_ema left out (key = 'state_dict_ema' takes" in caplog.text
    theirs = state["fc.bias"].numpy()
    np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], theirs)
    variables = load(tmp_path / "w.pth", net, key="state_dict_ema")
    ours = variables["params"]["classifier"]["bias"]
    np.testing.assert_array_equal(ours, theirs + 1)


@pytest.mark.parametrize("classes", [7, None])
def test_other_classes_leave_the_classifier_as_initialised(
    resnet, state, tmp_path, caplog, classes
):
    torch.save(state, tmp_path / "w.pth")
    net, variables = load(
        tmp_path / "w.pth", "resnet", variant="18", num_classes=classes
    )
    x = images()
    stored = state["layer4.1.conv2.weight"].numpy().transpose(2, 3, 1, 0)
    found = [a for a in jax.tree.leaves(variables["params"]) if a.shape == stored.shape]
    assert any(np.array_equal(a, stored) for a in found)
    if classes is None:
        assert "classifier fc left out: the network has none" in caplog.text
        return
    assert "classifier is initialised anew: fc.bias is (10,)" in caplog.text
    assert run(net, variables, x).shape == (2, 7)
    again = load(tmp_path / "w.pth", net)
    other = load(tmp_path / "w.pth", net, fresh=jax.random.key(1))
    kernels = [v["params"]["classifier"]["kernel"] for v in (variables, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0
    assert np.std(kernels[0]) > 0


def test_a_prefix_of_a_part_is_suggested(resnet, state, tmp_path):
    content = prefixed(state, "backbone.") | {"loss.weight": torch.ones(3)}
    torch.save(content, tmp_path / "w.pth")
    net = models.make("resnet", variant="18", num_classes=10)
    with pytest.raises(UserError, match=r"begin with 'backbone\.': give under='backb"):
        load(tmp_path / "w.pth", net)
    x = images()
    variables = load(tmp_path / "w.pth", net, under="backbone")
    close(run(net, variables, x), logits(resnet, x))


def test_caffe_weights_are_recognised(shared, caplog):
    # Pretrained on ImageNet: other layers than those that were stored would not give an image's class.
    path = shared / "weights" / "squeezenet_v1_0" / "squeezenet_v1_0_deepcomp_f32.npz"
    net, variables = load(path, "squeezenet", variant="1.0")
    assert "recognised as those of caffe" in caplog.text
    stored, ours = weight_files.read(path), variables["params"]
    np.testing.assert_array_equal(
        ours["fire9"]["expand3x3"]["kernel"],
        stored["fire9/conv3x3_2/w"].transpose(2, 3, 1, 0),
    )
    assert sum(a.size for a in jax.tree.leaves(ours)) == 1_248_424
    named = load(path, net, names="caffe")
    jax.tree.map(np.testing.assert_array_equal, named, variables)


def test_timm_weights_are_recognised(torchvision, tmp_path, caplog):
    import timm

    peer = randomised(timm.create_model("mobilenetv3_small_100", num_classes=10))
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    options = dict(variant="small", num_classes=10)
    options |= dict(padding="symmetric", epsilon=1e-5)
    net, variables = load(tmp_path / "w.pth", "mobilenet_v3", **options)
    assert "recognised as those of timm" in caplog.text
    x = images(48)
    close(run(net, variables, x), logits(peer, x))


def test_our_own_names_are_recognised(state, tmp_path, caplog):
    torch.save(state, tmp_path / "w.pth")
    net, variables = load(tmp_path / "w.pth", "resnet", variant="18", num_classes=10)
    pretrained.save(tmp_path / "own.npz", variables)
    without = load(tmp_path / "own.npz", "resnet", variant="18", num_classes=None)[1]
    assert "classifier" not in without["params"]
    assert "classifier params/classifier/bias left out" in caplog.text
    again = load(tmp_path / "own.npz", net)
    assert "the names are squeeze_jax's own" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, again, variables)


class Own(nn.Module):
    """A user's own network; in their script no constant names its classifier."""

    classes: int
    width: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(not train, name="norm")(x).mean((1, 2))
        return nn.Dense(self.classes, name="head")(x)


def test_another_number_of_classes_in_a_network_of_ones_own(tmp_path, caplog):
    x, path = (1, 8, 8, 3), tmp_path / "own.npz"
    variables = Own(3).init(jax.random.key(5), np.zeros(x), False)
    pretrained.save(path, variables)
    jax.tree.map(np.testing.assert_array_equal, load(path, Own(3), x), dict(variables))
    assert "anew" not in caplog.text
    found = load(path, Own(7), x)
    assert "params/head/kernel is initialised anew: of shape (4, 3)" in caplog.text
    assert found["params"]["head"]["kernel"].shape == (4, 7)
    for part in "params", "batch_stats":
        for layer in "conv", "norm":
            if layer in found[part]:
                jax.tree.map(np.testing.assert_array_equal, found[part][layer], variables[part][layer])  # fmt: skip
    with pytest.raises(UserError, match=r"conv/bias: expected \(5,\), found \(4,\).*CLASSIFIER = "):  # fmt: skip
        load(path, Own(3, width=5), x)
    without = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}
    pretrained.save(path, variables | without)
    with pytest.raises(UserError, match=r"head/bias: .*not there; .*CLASSIFIER = "):
        load(path, Own(3), x)
    caplog.clear()
    pretrained.save(path, variables)
    with unittest.mock.patch.object(sys.modules[__name__], "CLASSIFIER", ("head",), create=True):  # fmt: skip
        assert load(path, Own(7), x)["params"]["head"]["kernel"].shape == (4, 7)
        pretrained.save(path, variables | without)
        assert load(path, Own(3), x)["params"]["head"]["kernel"].shape == (4, 3)
    assert "params/head/bias is initialised anew: missing in the file" in caplog.text


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (None, {}, "does not name its network: give model="),
        (
            "squeezenet",
            {},
            "does not fit squeezenet by the names of torchvision, caffe, sq",
        ),
        ("mobilenet_v2", {}, "does not fit mobilenet_v2 by the names of torchvision"),
        ("bert", {}, "bert has no map of names"),
        ("resnt", {}, "unknown model 'resnt'; did you mean 'resnet'"),
        ("resnet", {"names": "tochvision"}, "knows the names of keras, timm, torchv"),
        (
            "resnet",
            {"variant": "34"},
            r"weights do not fit .*missing.*; make the network with .* variant \(one of 18, 34.*list=model.resnet",
        ),
        ("resnet", {"classes": 3}, "unknown key .*classes"),
    ],
)
def test_weights_of_another_network_are_one_line(
    state, tmp_path, model, options, words
):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "w.pth", model, **options)
    assert "\n" not in str(caught.value)
    assert "config." not in str(caught.value)


def test_options_of_a_network_that_is_made_are_refused(tmp_path):
    net = models.make("resnet", variant="18")
    with pytest.raises(UserError, match="num_classes has no effect on an existing"):
        load(tmp_path / "w.pth", net, num_classes=3)


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A BERT of transformers with a classifier of three classes, DataParallel's prefix in its tensors, and its net."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, vocab_size=99, max_position_embeddings=24)
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_labels=3)
    ).eval()
    folder = tmp_path_factory.mktemp("folder")
    net.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(prefixed(net.state_dict(), "module."), folder / "pytorch_model.bin")
    return folder, net


def test_a_folder_gives_network_and_variables(folder, caplog):
    folder, theirs = folder
    x = {"input_ids": np.array([[5, 6, 7, 0]]), "attention_mask": np.array([[1, 1, 1, 0]])}  # fmt: skip
    net, variables = load(folder)
    with torch.no_grad():
        expected = theirs(**{k: torch.tensor(v) for k, v in x.items()}).logits.numpy()
    np.testing.assert_allclose(run(net, variables, x), expected, atol=1e-5)
    assert "names without 'module.'" in caplog.text
    into = load(folder, net)
    jax.tree.map(np.testing.assert_array_equal, into, variables)
    assert "anew" not in caplog.text
    other, fresh = load(folder, num_classes=5)
    assert "head/classifier initialised anew" in caplog.text
    assert run(other, fresh, x).shape == (1, 5)
    with pytest.raises(UserError, match="holds the network 'bert', not 'roberta'"):
        load(folder, "roberta")
    with pytest.raises(UserError, match="names has no effect on the folder"):
        load(folder, names="torchvision")
    with pytest.raises(UserError, match="holds the network 'bert', not ResNet"):
        load(folder, models.make("resnet"))


def test_a_work_directory_knows_the_channels_of_its_images(tmp_path, monkeypatch):
    """The digits have one; the path begins with the home directory."""
    from squeeze_jax.jobs import _plain

    monkeypatch.setenv("HOME", str(tmp_path))
    options = dict(name="squeezenet", variant="tiny", num_classes=10)
    x = np.zeros((1, SIZE, SIZE, 1), np.float32)
    variables = jax.jit(models.make(**options).init)(jax.random.key(3), x)
    data = dict(source=dict(name="digits"), size=SIZE)
    config = dict(data=data, optim=dict(lr=0.1), steps=1, batch=8)
    _plain.write(tmp_path / "run", config, options, variables)
    _, loaded = load("~/run")
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


def test_a_work_directory_gives_network_and_variables(tmp_path, caplog):
    from squeeze_jax.jobs import _plain

    options = dict(name="resnet", variant="tiny", num_classes=10)
    net = models.make(**options)
    variables = jax.jit(net.init)(jax.random.key(3), images())
    config = dict(
        data=dict(source=dict(name="digits"), size=SIZE, channels=3),
        optim=dict(lr=0.1),
        steps=1,
        batch=8,
    )
    _plain.write(tmp_path / "run", config, options, variables)
    again, loaded = load(tmp_path / "run")
    assert again == net
    assert not tree.differences(loaded, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run", net), loaded)
    other, fresh = load(tmp_path / "run", num_classes=3)
    assert "classifier initialised anew" in caplog.text
    assert run(other, fresh, images()).shape == (2, 3)
    headless = load(tmp_path / "run", num_classes=None)[1]
    assert "classifier" not in headless["params"]
    assert "run: classifier left out: the network has none" in caplog.text
    with pytest.raises(
        UserError,
        match=r"run: weights do not fit: .*; make the network with the options",
    ):
        load(tmp_path / "run", "resnet", variant="18")
    with pytest.raises(UserError, match="holds the network 'resnet', not 'squeezenet'"):
        load(tmp_path / "run", "squeezenet")
