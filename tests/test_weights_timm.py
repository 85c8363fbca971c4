"""Weights of timm's networks: logits as timm computes them, and names of all its arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import models, registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import lowering
from squeeze_jax.weights import foreign, pretrained

SIZE = 48  # strides meet even and odd sizes: 48, 24, 12, 6, 3
PLAIN = dict(padding="symmetric", epsilon=1e-5)
CONVERTED = dict(padding="same", epsilon=1e-3)


@pytest.fixture(scope="module")
def timm(torchvision):
    import timm

    return timm


@pytest.mark.parametrize(
    ("theirs", "name", "variant", "options"),
    [
        ("mobilenetv3_small_100", "mobilenet_v3", "small", PLAIN),
        (
            "tf_mobilenetv3_small_minimal_100",
            "mobilenet_v3",
            "small-minimalistic",
            CONVERTED,
        ),
    ],
)
def test_logits_are_timms(timm, tmp_path, theirs, name, variant, options):
    torch.manual_seed(0)
    peer = timm.create_model(theirs, num_classes=10).eval()
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    net = models.make(name, variant=variant, num_classes=10, **options)
    x = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    like = foreign.variable_shapes(net, jnp.zeros(x.shape))
    module = registry.load("squeeze_jax.models", name)
    variables, lines = pretrained.load(
        str(tmp_path / "w.pth"), "timm", net, module, like
    )
    assert [re.sub(r"\d+ ", "", line) for line in lines] == [
        "counters of batches ignored"
    ]
    with torch.no_grad():
        expected = peer(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    with lowering("native"):  # quicker to compile
        logits = jax.jit(lambda v: net.apply(v, x)[0])(variables)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("theirs", "name", "options"),
    [
        ("mobilenetv3_large_100", "mobilenet_v3", dict(variant="large", epsilon=1e-5)),
        ("mobilenetv2_140", "mobilenet_v2", dict(variant="1.4")),
        ("resnet18", "resnet", dict(variant="18")),
        ("resnet50", "resnet", dict(variant="50")),
        ("tf_efficientnet_b1", "efficientnet", dict(variant="b1", **CONVERTED)),
        ("efficientnet_lite0", "efficientnet", dict(variant="lite0")),
    ],
)
def test_layers_are_called_as_in_timm(timm, theirs, name, options):
    with torch.device("meta"):
        state = timm.create_model(theirs).state_dict()
    module = registry.load("squeeze_jax.models", name)
    names = module.timm_names(models.make(name, **options))
    assert set(names.values()) == {array.rpartition(".")[0] for array in state}


@pytest.mark.parametrize(
    ("names", "name", "options", "words"),
    [
        (
            "timm",
            "mobilenet_v2",
            CONVERTED,
            r"set config\.model\.padding = 'symmetric'",
        ),
        (
            "timm",
            "mobilenet_v3",
            {},
            r"epsilon = 1e-05, or config\.model\.padding = 'same' and config\.model\.epsilon = 0\.001$",
        ),
        ("timm", "efficientnet", dict(variant="b5"), r"model\.epsilon = 1e-05, or"),
        ("timm", "resnet", dict(strided="1x1"), r"set config\.model\.strided = '3x3'"),
        ("torchvision", "mobilenet_v3", PLAIN, r"model\.epsilon = 0\.001"),
        ("torchvision", "efficientnet", CONVERTED, r"model\.epsilon = 1e-05"),
        ("torchvision", "resnet", dict(epsilon=1e-3), r"model\.epsilon = 1e-05"),
    ],
)
def test_a_network_with_other_options_is_refused(names, name, options, words):
    module = registry.load("squeeze_jax.models", name)
    with pytest.raises(UserError, match=words) as caught:
        getattr(module, f"{names}_names")(models.make(name, **options))
    assert "\n" not in str(caught.value)
