"""Published weights of images' networks, from files of other projects and through a config."""

import functools

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment
from squeeze_jax.weights import foreign, pretrained, weight_files

SIZE = 32


@pytest.fixture(scope="module")
def mobilenet(torchvision):
    """torchvision's MobileNetV2 with random weights and statistics, 10 classes."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(weights=None, num_classes=10).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def saved(mobilenet, tmp_path_factory):
    """The same weights in every kind of file."""
    folder = tmp_path_factory.mktemp("weights")
    state = mobilenet.state_dict()
    torch.save(state, folder / "plain.pth")
    parallel = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": parallel, "epoch": 3}, folder / "wrapped.pth")
    under = {f"backbone.{k}": v for k, v in state.items()} | {"head.w": torch.ones(1)}
    safetensors.torch.save_file(under, folder / "under.safetensors")
    np.savez(folder / "arrays.npz", **{k: v.numpy() for k, v in state.items()})
    return folder


def load(path, names, *, classes=10, name="mobilenet_v2", **options):
    net = models.make(name, num_classes=classes)
    like = foreign.variable_shapes(net, jnp.zeros((1, SIZE, SIZE, 3)))
    module = registry.load("squeeze_jax.models", name)
    return net, *pretrained.load(str(path), names, net, module, like, **options)


@functools.partial(jax.jit, static_argnums=0)
def run(net, variables, x):
    return net.apply(variables, x)[0]


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("plain.pth", {}, ["52 counters of batches ignored"]),
        (
            "wrapped.pth",
            {},
            [
                "the weights are the checkpoint's 'state_dict'; epoch left out",
                "names without 'module.'",
                "52 counters",
            ],
        ),
        ("under.safetensors", {"under": "backbone"}, ["1 arrays outside", "52 count"]),
        ("arrays.npz", {}, ["52 counters of batches ignored"]),
    ],
)
def test_every_kind_of_file_gives_torchvisions_logits(
    saved, mobilenet, file, options, said
):
    net, variables, lines = load(saved / file, "torchvision", **options)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    x = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = mobilenet(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    logits = run(net, variables, x)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())  # fmt: skip


def test_a_classifier_of_other_classes_is_left_out_and_named(saved):
    _, variables, lines = load(saved / "plain.pth", "torchvision", classes=7)
    assert "classifier" not in variables["params"]
    assert any(
        "classifier is initialised anew: classifier.1.bias is (10,), should be (7,)"
        in line
        for line in lines
    )
    _, variables, lines = load(saved / "plain.pth", "torchvision", classes=None)
    assert "classifier" not in variables["params"]


def test_what_does_not_fit_is_named(saved):
    with pytest.raises(UserError, match=r"missing.*left over.*conv1") as caught:
        load(saved / "plain.pth", "torchvision", name="resnet")
    assert "\n" not in str(caught.value)
    for under, near in (
        ("encoder", r" choose from classifier, features$"),
        ("feature.", r" did you mean 'features'\? choose from classifier, features$"),
        ("features.20", r" did you mean 'features.\d+'\? choose from .*features"),
    ):
        words = rf"under = '{under}': no name in .* begins with '{under.rstrip('.')}\.';{near}"
        with pytest.raises(UserError, match=words):
            load(saved / "plain.pth", "torchvision", under=under)


def test_own_files_are_read_back_to_the_bit(saved, tmp_path):
    _, variables, _ = load(saved / "plain.pth", "torchvision")
    for ending in "safetensors", "npz":
        pretrained.save(tmp_path / f"own.{ending}", variables)
        _, again, lines = load(tmp_path / f"own.{ending}", "squeeze_jax")
        assert lines == []
        for name, array in tree.flatten(variables).items():
            np.testing.assert_array_equal(tree.flatten(again)[name], array)
    with pytest.raises(UserError, match=r"use \.safetensors or \.npz"):
        pretrained.save(tmp_path / "own.pth", variables)
    _, other, lines = load(tmp_path / "own.safetensors", "squeeze_jax", classes=3)
    assert "classifier" not in other["params"]
    assert len(lines) == 2
    with pytest.raises(UserError, match=r"weights do not fit: .*conv1"):
        load(tmp_path / "own.safetensors", "squeeze_jax", name="squeezenet")


@pytest.mark.parametrize("layout", ["legacy", "flat"])
def test_keras_kernels_are_as_ours(tmp_path, layout):
    """A convolution, a depthwise one and a dense layer by hand, in Keras' legacy layout and in one without a group for each layer."""
    rng = np.random.default_rng(0)
    arrays = {
        "conv/kernel": rng.normal(size=(3, 3, 2, 4)),
        "conv/bias": rng.normal(size=4),
        "deep/depthwise_kernel": rng.normal(size=(3, 3, 4, 1)),
        "bn/gamma": rng.normal(size=4),
        "bn/beta": rng.normal(size=4),
        "bn/moving_mean": rng.normal(size=4),
        "bn/moving_variance": rng.normal(size=4),
        "fc/kernel": rng.normal(size=(4, 5)),
    }
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            layer = name.partition("/")[0]
            place = f"model_weights/{layer}/{name}:0" if layout == "legacy" else name
            file[place] = array
    found = weight_files.read(path)
    assert set(found) == set(arrays)
    like = {
        "params": {
            "a": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
            "b": {"kernel": jnp.zeros((3, 3, 1, 4))},
            "n": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)},
            "d": {"kernel": jnp.zeros((4, 5))},
        },
        "batch_stats": {"n": {"mean": jnp.zeros(4), "var": jnp.zeros(4)}},
    }
    names = {"a": "conv", "b": "deep", "n": "bn", "d": "fc"}
    fitted = foreign.fit(found, like, names, channels_last=True)
    np.testing.assert_allclose(fitted["params"]["a"]["kernel"], arrays["conv/kernel"], rtol=1e-6)  # fmt: skip
    deep = fitted["params"]["b"]["kernel"]
    np.testing.assert_allclose(deep[:, :, 0, :], arrays["deep/depthwise_kernel"][..., 0], rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(fitted["batch_stats"]["n"]["var"], arrays["bn/moving_variance"], rtol=1e-6)  # fmt: skip


def build(saved, **init):
    config = dict(
        data=dict(source=dict(name="digits"), size=SIZE, channels=3),
        model=dict(name="mobilenet_v2"),
        optim=dict(lr=0.1),
        steps=1,
        batch=8,
        init=init,
    )
    return _experiment.build(_experiment.check(config))


def test_a_config_begins_with_them(saved, mobilenet, capsys):
    built = build(saved, file=str(saved / "plain.pth"), names="torchvision")
    params = built.create(built.initial_variables()).params
    assert "52 counters of batches ignored" in capsys.readouterr().out
    theirs = mobilenet.state_dict()["features.0.0.weight"].numpy()
    np.testing.assert_array_equal(
        params["conv1"]["kernel"], theirs.transpose(2, 3, 1, 0)
    )
    # Another network's layers of the same name in training are not the classifier: MobileNet's head is its last layer.
    head = mobilenet.state_dict()["features.18.0.weight"].numpy()
    np.testing.assert_array_equal(params["head"]["kernel"], head.transpose(2, 3, 1, 0))


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (dict(file="nowhere.pth", names="torchvision"), "no weights file nowhere.pth"),
        (
            dict(file="plain.pth", names="caffe"),
            "knows the names of keras, timm, torchvision, sq",
        ),
        (dict(file="plain.pth", names="keras"), r"set config\.model\.padding = 'same'"),
        (dict(file="arrays.npz", key="model"), "only PyTorch's checkpoints have parts"),
        (dict(key="model_ema"), r"config\.init\.key has no effect without"),
        (dict(file="plain.pth", names="tochvision"), "should be one of 'torchvision'"),
        (dict(file="notes.txt"), "unknown ending"),
        (dict(file="plain.pth", workdir="x"), "one of them"),
        (dict(under="backbone"), r"config.init.under has no effect without"),
    ],
)
def test_a_bad_init_is_one_line_before_any_work(saved, monkeypatch, init, words):
    monkeypatch.chdir(saved)
    with pytest.raises(UserError, match=words) as caught:
        build(saved, **init)
    assert "\n" not in str(caught.value)


def test_weights_of_integers_are_refused(saved, tmp_path):
    with np.load(saved / "arrays.npz") as file:
        arrays = dict(file)
    arrays["features.0.0.weight"] = arrays["features.0.0.weight"].astype(np.int8)
    np.savez(tmp_path / "int8.npz", **arrays)
    with pytest.raises(
        UserError, match=r"1 of integers.*features\.0\.0\.weight is int8"
    ):
        load(tmp_path / "int8.npz", "torchvision")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
        b'{"a":' + b"[" * 100_000,
    ],
    ids=["negative shape", "outside", "nested"],
)
def test_a_damaged_header_is_one_line(tmp_path, header):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"bad\.safetensors is damaged") as caught:
        weight_files.read(path)
    assert "\n" not in str(caught.value)


def test_shapes_that_no_file_holds_are_one_line(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**45)}, tmp_path / "huge.pth")
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("w", (2**40,), "f4", chunks=(2**10,))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["w"] = h5py.ExternalLink("elsewhere.h5", "w")
    header = (2**62).to_bytes(8, "little") + b"{}"
    (tmp_path / "long.safetensors").write_bytes(header)
    (tmp_path / "page.npz").write_text("<html>not found</html>")
    for name, words in (
        ("huge.pth", "not stored whole"),
        ("huge.h5", "is not stored"),
        ("link.h5", "link to another place"),
        ("long.safetensors", "header is cut off"),
        ("page.npz", "no archive of plain arrays"),
    ):
        with pytest.raises(UserError, match=rf"{name} is damaged .*{words}") as caught:
            weight_files.read(tmp_path / name)
        assert "pickle" not in str(caught.value)


def test_weights_in_two_wrappers_are_read_and_named(saved, mobilenet, tmp_path):
    """As training with an average leaves them."""
    inner = {"module": mobilenet.state_dict()}
    torch.save({"model_ema": inner, "epoch": 3}, tmp_path / "ema.pth")
    _, variables, lines = load(tmp_path / "ema.pth", "torchvision")
    assert lines[0].endswith("'model_ema'; epoch left out")
    assert lines[1].endswith("'module'")
    first = mobilenet.state_dict()["features.0.0.weight"].numpy()
    np.testing.assert_array_equal(
        variables["params"]["conv1"]["kernel"], first.transpose(2, 3, 1, 0)
    )


def test_a_key_chooses_between_two_networks_in_one_file(saved, mobilenet, tmp_path):
    state = mobilenet.state_dict()
    average = {"module": {name: 2 * array for name, array in state.items()}}
    parts = {"model": state, "model_ema": average, "epoch": 3}
    torch.save(parts, tmp_path / "both.pth")
    first = state["features.0.0.weight"].numpy().transpose(2, 3, 1, 0)
    takes = "{}; {}, epoch left out (config.init.key = {} takes that)"
    for key, taken, left, factor in (
        ("", "model", "model_ema", 1),
        ("model", "model", "model_ema", 1),
        ("model_ema", "model_ema", "model", 2),
    ):
        arrays = weight_files.read(tmp_path / "both.pth", notes := [], key=key)
        kernel = arrays["features.0.0.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, factor * first)
        line = takes.format(repr(taken), left, repr(left))
        assert notes[0] == f"the weights are the checkpoint's {line}"
    init = dict(file=str(tmp_path / "both.pth"), names="torchvision")
    built = build(saved, **init, key="model_ema")
    kernel = built.initial_variables()["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, 2 * first)
    with pytest.raises(UserError, match=r"key = 'ema': .* there is model, model_ema$"):
        weight_files.read(tmp_path / "both.pth", key="ema")
    with pytest.raises(UserError, match=r"key = 'ema': .* no such part: leave it out$"):
        weight_files.read(saved / "plain.pth", key="ema")


def test_numbers_that_are_not_finite_are_named(saved, tmp_path):
    with np.load(saved / "arrays.npz") as file:
        arrays = dict(file)
    arrays["features.0.0.weight"][0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    _, _, lines = load(tmp_path / "nan.npz", "torchvision")
    assert "1 arrays are not finite, features.0.0.weight first" in lines
    built = build(saved, file=str(tmp_path / "nan.npz"), names="torchvision")
    with pytest.raises(UserError, match="params/conv1/kernel has values that are not"):
        built.initial_variables()


def test_a_negative_variance_is_named(saved, tmp_path):
    with np.load(saved / "arrays.npz") as file:
        arrays = dict(file)
    arrays["features.0.1.running_var"][0] = -1
    np.savez(tmp_path / "negative.npz", **arrays)
    built = build(saved, file=str(tmp_path / "negative.npz"), names="torchvision")
    with pytest.raises(UserError, match="conv1_norm/var has a negative variance"):
        built.initial_variables()


@pytest.mark.parametrize(
    ("theirs", "name", "options"),
    [
        ("mobilenet_v3_small", "mobilenet_v3", {"variant": "small"}),
        ("resnet18", "resnet", {"variant": "18"}),
        ("squeezenet1_1", "squeezenet", {"variant": "1.1"}),
        ("efficientnet_b0", "efficientnet", {"variant": "b0"}),
    ],
)
def test_other_networks_give_torchvisions_logits(
    torchvision, tmp_path, theirs, name, options
):
    torch.manual_seed(0)
    peer = getattr(torchvision.models, theirs)(weights=None, num_classes=10).eval()
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    net = models.make(name, num_classes=10, **options)
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    like = foreign.variable_shapes(net, jnp.zeros(x.shape))
    module = registry.load("squeeze_jax.models", name)
    variables, _ = pretrained.load(
        str(tmp_path / "w.pth"), "torchvision", net, module, like
    )
    with torch.no_grad():
        expected = peer(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    logits = jax.jit(lambda v: net.apply(v, x)[0])(variables)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())  # fmt: skip
