"""Foreign weights give the foreign outputs: torchvision's networks, and the SqueezeNet of Deep Compression on photographs."""

import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from squeeze_jax import models, registry, tree
from squeeze_jax.weights import files, foreign

NETS = {
    "squeezenet1_0": ("squeezenet", {"variant": "1.0"}, 67),
    "squeezenet1_1": ("squeezenet", {"variant": "1.1"}, 64),
    "mobilenet_v2": ("mobilenet_v2", {"variant": "1.0"}, 64),
    "resnet18": ("resnet", {"variant": "18"}, 64),
    "resnet50": ("resnet", {"variant": "50"}, 65),
}


def randomise(net):
    """Gives normalisations statistics and affine parameters that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.3, 0.3),
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 1.5),
            ):
                with torch.no_grad():
                    getattr(module, name).uniform_(low, high, generator=generator)


def ours(name, options, state, size, **more):
    """Our network with a PyTorch state dict's weights: (net, variables)."""
    net = models.make(name, **options, **more)
    names = registry.load("squeeze_jax.models", name).torchvision_names(net)
    arrays = {key: value.numpy() for key, value in state.items()}
    like = foreign.shapes(net, jnp.zeros((1, size, size, 3)))
    return net, foreign.fit(arrays, like, names)


def close(found, expected, tolerance):
    """Compares relative to the largest value, which has to be far from nothing."""
    scale = np.abs(expected).max()
    assert scale > 1e-3
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("theirs", NETS)
def test_logits_equal_torchvision(torchvision, theirs):
    name, options, size = NETS[theirs]
    torch.manual_seed(0)
    net = getattr(torchvision.models, theirs)(weights=None, num_classes=10).eval()
    randomise(net)
    x = np.random.default_rng(0).normal(size=(2, size, size - 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    module, variables = ours(name, options, net.state_dict(), size, num_classes=10)
    logits, _ = jax.jit(module.apply)(variables, x)
    close(logits, expected, 1e-4)


def test_a_training_step_equals_torchvision(torchvision):
    # MobileNetV2's parts, few of them: every gradient and every running statistic.
    stages = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 1]]
    torch.manual_seed(0)
    theirs = torchvision.models.MobileNetV2(
        num_classes=5, inverted_residual_setting=stages, dropout=0.0
    )
    randomise(theirs)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(4, 24, 24, 3)).astype(np.float32)
    logits = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    functional.cross_entropy(logits, torch.arange(4)).backward()

    module = registry.load("squeeze_jax.models", "mobilenet_v2")
    rows = tuple(module.Stage(*stage) for stage in stages)
    net = module.MobileNetV2(module.Row(1.0, 32, 1280, rows), 5, 0.0, (2, 2))
    names = module.torchvision_names(net)
    like = foreign.shapes(net, jnp.zeros((1, 24, 24, 3)))
    variables = foreign.fit({k: v.numpy() for k, v in state.items()}, like, names)

    @jax.jit
    def step(params, stats):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            (logits, _), new = net.apply(
                variables, x, train=True, mutable=["batch_stats"]
            )
            scores = jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)]
            return -scores.mean(), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    gradient, stats = step(variables["params"], variables["batch_stats"])
    after = {
        **{key: p.grad.numpy() for key, p in theirs.named_parameters()},
        **{key: b.numpy() for key, b in theirs.named_buffers()},
    }
    expected = tree.flatten(foreign.fit(after, like, names))
    found = tree.flatten({"params": gradient, "batch_stats": stats})
    assert found.keys() == expected.keys()
    for key in found:
        scale = np.abs(expected[key]).max()
        error = np.abs(found[key] - expected[key]).max()
        assert error <= 2e-3 * scale + 1e-6, key


def caffe_squeezenet(w, x):
    """SqueezeNet 1.0 as its Caffe prototxt has it, in PyTorch's functions: [b, 3, 227, 227] BGR → [b, 1000]."""
    conv = lambda x, name, **kw: functional.relu(  # noqa: E731
        functional.conv2d(x, w[f"{name}/w"], w[f"{name}/b"], **kw)
    )
    pool = lambda x: functional.max_pool2d(x, 3, 2, ceil_mode=True)  # noqa: E731
    x = pool(conv(x, "conv1", stride=2))
    for n in range(2, 10):
        s = conv(x, f"fire{n}/conv1x1_1")
        left = conv(s, f"fire{n}/conv1x1_2")
        right = conv(s, f"fire{n}/conv3x3_2", padding=1)
        x = torch.cat([left, right], 1)
        x = pool(x) if n in (4, 8) else x
    return conv(x, "conv10", padding=1).mean((2, 3))


def photographs(shared):
    """(images [50, 227, 227, 3] BGR less the mean, labels [50]): the middle of the photographs."""
    images, labels = [], []
    with zipfile.ZipFile(shared / "data" / "photos" / "imagenet_50.zip") as archive:
        for name in sorted(archive.namelist()):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            left, top = (image.width - 227) // 2, (image.height - 227) // 2
            crop = image.crop((left, top, left + 227, top + 227))
            images.append(np.asarray(crop, np.float32)[..., ::-1] - (104, 117, 123))
            labels.append(int(name.split("_")[0]))
    return np.float32(images), np.array(labels)


def test_squeezenet_of_deep_compression_classifies_photographs(shared):
    folder = shared / "weights" / "squeezenet_v1_0"
    arrays = files.read(folder / "squeezenet_v1_0_deepcomp_f32.npz")
    images, labels = photographs(shared)
    assert len(images) == 50
    weights = {name: torch.tensor(array) for name, array in arrays.items()}
    with torch.no_grad():
        theirs = caffe_squeezenet(weights, torch.tensor(images).permute(0, 3, 1, 2))
    expected = theirs.numpy()

    net = models.make("squeezenet", variant="1.0", conv10_padding=1)
    names = registry.load("squeeze_jax.models", "squeezenet").deep_compression_names(
        net
    )
    like = foreign.shapes(net, jnp.zeros((1, 227, 227, 3)))
    variables = foreign.fit(arrays, like, names)
    apply = jax.jit(lambda x: net.apply(variables, x)[0])
    logits = np.concatenate([apply(images[i : i + 10]) for i in range(0, 50, 10)])

    close(logits, expected, 1e-4)
    assert (logits.argmax(1) == expected.argmax(1)).all()
    # 62.4% and 84.1% on the 1,000 photographs of which these are 50: within three standard deviations.
    top1 = (logits.argmax(1) == labels).mean()
    top5 = (np.argsort(-logits)[:, :5] == labels[:, None]).any(1).mean()
    assert abs(top1 - 0.624) < 3 * (0.624 * 0.376 / 50) ** 0.5
    assert abs(top5 - 0.841) < 3 * (0.841 * 0.159 / 50) ** 0.5
