"""Weights of Keras' networks: every kind of file that Keras writes, and logits as Keras computes them."""

import os
import re
import warnings
import zipfile

import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import lowering
from squeeze_jax.weights import foreign, pretrained, weight_files

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # Keras on NumPy 2
)
SIZE = 48  # strides meet even and odd sizes: 48, 24, 12, 6, 3
SAME = dict(padding="same", epsilon=1e-3)


@pytest.fixture(scope="module")
def keras(torchvision):
    """Keras on PyTorch, which compiles nothing."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

    return keras


def randomised(model, seed=0):
    """Gives a network random statistics and biases too."""
    rng = np.random.default_rng(seed)
    ranges = {"gamma": (0.5, 1.5), "moving_variance": (0.5, 1.5)}
    ranges |= dict.fromkeys(("beta", "bias", "moving_mean"), (-0.3, 0.3))
    for weight in model.weights:
        if limits := ranges.get(weight.name):
            weight.assign(rng.uniform(*limits, weight.shape).astype(np.float32))
    return model


def mobilenet_v2(keras):
    return keras.applications.MobileNetV2(alpha=0.35, **common())


def mobilenet_v3(keras):
    return keras.applications.MobileNetV3Small(include_preprocessing=False, **common())


def efficientnet(keras):
    """B0 with one block a stage."""
    from keras.src.applications.efficientnet import EfficientNet

    return EfficientNet(1.0, 0.25, SIZE, **common())


def resnet(keras):
    """ResNet-50's blocks, two with strides of 1 and one of 2."""
    from keras.src.applications import resnet as module

    def stages(x):
        x = module.stack_residual_blocks_v1(x, 64, 2, stride1=1, name="conv2")
        return module.stack_residual_blocks_v1(x, 128, 1, name="conv3")

    return module.ResNet(stages, preact=False, use_bias=True, **common())


def common():
    return dict(
        input_shape=(SIZE, SIZE, 3),
        weights=None,
        classes=10,
        classifier_activation=None,
    )


def our_resnet():
    module = registry.load("squeeze_jax.models", "resnet")
    options = module.UnitOptions(epsilon=1.001e-5)
    row = module.Row(True, (2, 1))
    return module.ResNet(row, 10, "imagenet", "1x1", options)


def ours(name, **options):
    return lambda: models.make(name, num_classes=10, **options)


def load(path, net, names="keras", **options):
    like = foreign.variable_shapes(net, jnp.zeros((1, SIZE, SIZE, 3)))
    module = registry.load("squeeze_jax.models", type(net).__module__.split(".")[-1])
    return pretrained.load(str(path), names, net, module, like, **options)


def logits_agree(model, net, variables, scale=1.0):
    x = np.random.default_rng(1).uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(scale * x).numpy()
    with lowering("native"):  # quicker to compile
        logits = jax.jit(lambda v: net.apply(v, x)[0])(variables)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("theirs", "make", "scale", "said"),
    [
        (mobilenet_v2, ours("mobilenet_v2", variant="0.35", **SAME), 1, ()),
        (mobilenet_v3, ours("mobilenet_v3", variant="small", **SAME), 1, ()),
        (
            efficientnet,
            ours("efficientnet", depth=0.25, **SAME),
            255,  # Keras' network divides by it
            (
                "normalization/mean = [0.0, 0.0, 0.0] left out",
                "normalization/variance = [1.0, 1.0, 1.0] left out",
            ),
        ),
        # The stem's, two blocks' of three and a shortcut's, another block's four.
        (
            resnet,
            our_resnet,
            1,
            (
                "12 biases of convolutions subtracted",
                "the ImageNet weights of keras expect channels in the order blue, green, red",
            ),
        ),
    ],
    ids=["mobilenet_v2", "mobilenet_v3", "efficientnet", "resnet"],
)
def test_logits_are_keras(keras, tmp_path, theirs, make, scale, said):
    model, net = randomised(theirs(keras)), make()
    model.save(tmp_path / "model.keras")
    variables, lines = load(tmp_path / "model.keras", net)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    logits_agree(model, net, variables, scale)


@pytest.mark.parametrize(
    ("theirs", "keys", "name", "options"),
    [
        ("MobileNetV2", dict(alpha=1.4), "mobilenet_v2", dict(variant="1.4")),
        ("MobileNetV3Large", {}, "mobilenet_v3", dict(variant="large")),
        (
            "MobileNetV3Large",
            dict(minimalistic=True),
            "mobilenet_v3",
            dict(variant="large-minimalistic"),
        ),
        ("EfficientNetB3", {}, "efficientnet", dict(variant="b3")),
    ],
)
def test_layers_of_other_variants_are_called_as_in_keras(
    keras, theirs, keys, name, options
):
    with keras.device("meta"):
        model = getattr(keras.applications, theirs)(**common() | keys)
    expected = {layer.name for layer in model.layers if layer.weights}
    module = registry.load("squeeze_jax.models", name)
    names = module.keras_names(models.make(name, **options, **SAME))
    layers = {n if isinstance(n, str) else n[0] for n in names.values()}
    assert layers == {n for n in expected if not n.startswith("normalization")}


@pytest.fixture(scope="module")
def saved(keras, tmp_path_factory):
    """A network of three kinds of layers in each of Keras' files, after a training step."""
    layers, folder = keras.layers, tmp_path_factory.mktemp("keras")
    shape = keras.Input((4, 4, 3))
    model = keras.Sequential([shape], name="inner")
    model.add(layers.DepthwiseConv2D(3, name="deep"))
    model.add(layers.BatchNormalization(name="norm"))
    model.add(layers.Dropout(0.5))
    model.add(layers.Conv2D(5, 1, name="conv"))
    y = layers.GlobalAveragePooling2D()(model(layers.Normalization()(shape)))
    whole = keras.Model(shape, layers.Dense(2, name="out")(y))
    whole.compile("adam", "mse")
    whole.fit(np.ones((2, 4, 4, 3)), np.ones((2, 2)), verbose=0)
    for ending in "keras", "weights.h5":
        (whole.save_weights if "w" in ending else whole.save)(folder / f"w.{ending}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.save(folder / "w.h5")
    return whole, folder


def test_every_layout_has_the_same_arrays(saved):
    model, folder = saved
    # Keras calls them outer/inner/array too; the input's normalisation has a number that counts those made before.
    expected = {weight.path: weight.numpy() for weight in model.weights}
    assert len(expected) == 13
    for ending, left in (
        ("keras", ["optimizer left out"]),
        ("weights.h5", ["optimizer left out"]),
        ("h5", ["optimizer_weights left out"]),
    ):
        notes = []
        arrays = weight_files.read(folder / f"w.{ending}", notes)
        assert notes == left
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_bfloat16_is_read(keras, tmp_path):
    inputs = keras.Input((4,))
    policy = keras.dtype_policies.DTypePolicy("bfloat16")
    model = keras.Model(inputs, keras.layers.Dense(3, dtype=policy, name="d")(inputs))
    expected = model.layers[-1].kernel.value.detach().float().numpy()
    model.save(tmp_path / "w.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "w.h5")
    for ending in "keras", "h5":
        kernel = weight_files.read(tmp_path / f"w.{ending}")["d/kernel"]
        assert kernel.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(kernel.astype(np.float32), expected)


def unnamed(source, target):
    """Copies weights without the layers' names, as Keras 3.0 writes them."""
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "a") as file:
        for path in [p for p in nodes(file) if p.rpartition("/")[2] == "vars"]:
            file[path].attrs.clear()


def nodes(file):
    paths = []
    file.visit(paths.append)
    return paths


def test_an_archive_of_unnamed_layers_is_read_by_its_config(saved, tmp_path):
    _, folder = saved
    weights = tmp_path / "w.weights.h5"
    unnamed(folder / "w.weights.h5", weights)
    with zipfile.ZipFile(folder / "w.keras") as whole:
        config = whole.read("config.json")
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("config.json", config)
        archive.write(weights, "model.weights.h5")
    arrays = weight_files.read(tmp_path / "w.keras")
    expected = weight_files.read(folder / "w.keras")
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    with pytest.raises(
        UserError, match=r"does not name the layer .*save the model as \.keras or"
    ):
        weight_files.read(weights)


def earlier(arrays, path):
    """Writes a file as tf.keras 2 did: layers with a slash in their names, in lists that need two attributes."""
    layers = {}
    for name, array in arrays.items():
        layers.setdefault(name.rpartition("/")[0], {})[name] = array
    with h5py.File(path, "w") as file:
        half = len(layers) // 2
        file.attrs["layer_names0"] = [n.encode() for n in list(layers)[:half]]
        file.attrs["layer_names1"] = [n.encode() for n in list(layers)[half:]]
        for layer, weights in layers.items():
            group = file.create_group(layer) if layer not in file else file[layer]
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in weights]
            for name, array in weights.items():
                group[f"{name}:0"] = array


def renamed(name):
    """The name of an array of MobileNetV3 in tf.keras 2, by its mobilenet_v3.py."""
    name = re.sub(r"^(expanded_conv(?:_\d+)?)_", r"\1/", name)
    name = re.sub(r"^(conv|logits)", lambda start: start[0].capitalize(), name)
    name = name.replace("squeeze_excite_conv", "squeeze_excite/Conv")
    name = name.replace("depthwise/kernel", "depthwise/depthwise_kernel")
    return name.replace("_bn/", "/BatchNorm/")


def test_files_of_keras_2_have_names_with_slashes(tmp_path):
    net = models.make("mobilenet_v3", variant="tiny", num_classes=10, **SAME)
    like = foreign.variable_shapes(net, jnp.zeros((1, 16, 16, 3)))
    module = registry.load("squeeze_jax.models", "mobilenet_v3")
    layers = {ours: names[0] for ours, names in module.keras_names(net).items()}
    rng, arrays = np.random.default_rng(0), {}
    leaves = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
    for part in like.values():
        for name, leaf in tree.flatten(part).items():
            layer, _, end = name.rpartition("/")
            shape = leaf.shape
            if layer.endswith("depthwise"):
                shape = (*shape[:2], shape[3], 1)
            if layer in ("hidden", "classifier") and end == "kernel":
                shape = (1, 1, *shape)
            norm_bias = end == "bias" and layer.endswith("_norm")
            their = "beta" if norm_bias else leaves.get(end, end)
            arrays[f"{layers[layer]}/{their}"] = rng.normal(size=shape).astype("f")
    earlier({renamed(name): array for name, array in arrays.items()}, tmp_path / "w.h5")
    assert "expanded_conv_1/squeeze_excite/Conv_1/kernel" in weight_files.read(
        tmp_path / "w.h5"
    )
    np.savez(tmp_path / "w.npz", **arrays)
    (old, _), (new, _) = (
        pretrained.load(str(tmp_path / f"w.{ending}"), "keras", net, module, like)
        for ending in ("h5", "npz")
    )
    assert len(tree.flatten(old)) == len(arrays)
    for name, array in tree.flatten(old).items():
        np.testing.assert_array_equal(tree.flatten(new)[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "mobilenet_v2",
            {},
            r"padding = 'symmetric' and epsilon = 1e-05: set config\.model\.padding = 'same' and config\.model\.epsilon = 0\.001$",
        ),
        ("mobilenet_v3", {}, r"set config\.model\.padding = 'same'"),
        (
            "efficientnet",
            dict(padding="same"),
            r"set .*config\.model\.epsilon = 0\.001",
        ),
        ("efficientnet", dict(variant="lite0"), "Keras has no EfficientNet Lite"),
        (
            "resnet",
            {},
            r"strided = '3x3' and epsilon = 1e-05: set config\.model\.strided = '1x1'",
        ),
        ("resnet", dict(variant="18"), "Keras has no ResNet without bottlenecks"),
    ],
)
def test_a_network_with_other_options_is_refused(tmp_path, name, options, words):
    """Before the file is read, in one line that says what to set."""
    (tmp_path / "w.h5").touch()
    module = registry.load("squeeze_jax.models", name)
    with pytest.raises(UserError, match=words) as caught:
        pretrained.check(
            str(tmp_path / "w.h5"), "keras", name, module, models.make(name, **options)
        )
    assert "\n" not in str(caught.value)


def test_strides_and_epsilons_that_no_network_has_are_refused():
    with pytest.raises(UserError, match="variant '18' have no 1x1 convolution"):
        models.make("resnet", variant="18", strided="1x1")
    with pytest.raises(UserError, match=r"padding = 'SAME' .*should be one of"):
        models.make("mobilenet_v2", padding="SAME")
    with pytest.raises(UserError, match=r"epsilon = 0\.0 should be positive"):
        models.make("mobilenet_v2", variant="tiny", epsilon=0.0)
