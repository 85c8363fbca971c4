"""Foreign weights give the foreign outputs.

Of torchvision's networks, a ShuffleNet written from its paper, and the SqueezeNet of Deep Compression on photographs.
"""

import io
import itertools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from squeeze_jax import models, registry, tree
from squeeze_jax.weights import foreign, weight_files

pytestmark = pytest.mark.usefixtures("optimized")  # as users run it

NETS = {
    "efficientnet_b0": ("efficientnet", {"variant": "b0"}, 64),
    "efficientnet_b5": ("efficientnet", {"variant": "b5"}, 65),
    "squeezenet1_0": ("squeezenet", {"variant": "1.0"}, 67),
    "squeezenet1_1": ("squeezenet", {"variant": "1.1"}, 64),
    "mobilenet_v2": ("mobilenet_v2", {"variant": "1.0"}, 64),
    "mobilenet_v3_large": ("mobilenet_v3", {"variant": "large"}, 65),
    "mobilenet_v3_small": ("mobilenet_v3", {"variant": "small"}, 64),
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


def ours(name, options, state, size, *, naming="torchvision_names", **more):
    """Our network with a PyTorch state dict's weights: (net, variables)."""
    net = models.make(name, **options, **more)
    names = getattr(registry.load("squeeze_jax.models", name), naming)(net)
    arrays = {key: value.numpy() for key, value in state.items()}
    like = foreign.variable_shapes(net, jnp.zeros((1, size, size, 3)))
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
    net = getattr(torchvision.models, theirs)(weights=None, num_classes=10)
    logits_agree(net, name, options, size)


def test_efficientnet_lite_is_b0_with_relu6_and_without_excitation(torchvision):
    torch.manual_seed(0)
    net = torchvision.models.efficientnet_b0(weights=None, num_classes=10)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.SiLU):
                setattr(module, name, torch.nn.ReLU6())
            elif isinstance(child, torchvision.ops.SqueezeExcitation):
                setattr(module, name, torch.nn.Identity())
    logits_agree(net, "efficientnet", {"variant": "lite0"}, 64)


def logits_agree(net, name, options, size, **more):
    """Compares PyTorch's network of 10 classes in evaluation with ours, from the same random weights and statistics."""
    net.eval()
    randomise(net)
    x = np.random.default_rng(0).normal(size=(2, size, size - 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    state = net.state_dict()
    module, variables = ours(name, options, state, size, num_classes=10, **more)
    logits, _ = jax.jit(module.apply)(variables, x)
    close(logits, expected, 1e-4)


def mobilenet_v2(torchvision):
    """A few of MobileNetV2's parts: (torchvision's network, ours)."""
    stages = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 1]]
    theirs = torchvision.models.MobileNetV2(
        num_classes=5, inverted_residual_setting=stages, dropout=0.0
    )
    module = registry.load("squeeze_jax.models", "mobilenet_v2")
    rows = tuple(module.Stage(*stage) for stage in stages)
    net = module.MobileNetV2(module.Row(1.0, 32, 1280, rows), 5, 0.0, (2, 2))
    return theirs, net


def mobilenet_v3(torchvision):
    """MobileNetV3's parts, as the tiny variant has them: (torchvision's network, ours)."""
    parts = torchvision.models.mobilenetv3
    stages = [  # channels, kernel, width inside, output channels, excitation, activation, strides, dilation, multiplier
        parts.InvertedResidualConfig(8, 5, 24, 16, True, "RE", 2, 1, 1.0),
        parts.InvertedResidualConfig(16, 3, 16, 16, True, "HS", 1, 1, 1.0),
    ]
    theirs = parts.MobileNetV3(stages, 40, num_classes=5, dropout=0.0)
    net = models.make("mobilenet_v3", variant="tiny", num_classes=5, dropout=0.0)
    return theirs, net


def efficientnet(torchvision):
    """EfficientNet's parts, as the tiny variant has them: (torchvision's network, ours)."""
    parts = torchvision.models.efficientnet
    stages = [  # factor inside, kernel, strides, channels, output channels, blocks
        parts.MBConvConfig(6, 5, 2, 8, 16, 1),
        parts.MBConvConfig(1, 3, 1, 16, 16, 1),
    ]
    theirs = parts.EfficientNet(stages, 0.0, 0.0, num_classes=5)
    options = dict(variant="tiny", dropout=0.0, stochastic_depth=0.0)
    return theirs, models.make("efficientnet", num_classes=5, **options)


@pytest.mark.parametrize("build", [efficientnet, mobilenet_v2, mobilenet_v3])
def test_a_training_step_equals_torchvision(torchvision, build):
    # Every gradient and every running statistic.
    torch.manual_seed(0)
    theirs, net = build(torchvision)
    names = registry.load("squeeze_jax.models", build.__name__).torchvision_names(net)
    training_steps_agree(theirs, net, names)


def training_steps_agree(theirs, net, names):
    """Compares a step of PyTorch's network with ours, from the same random weights on the same images."""
    randomise(theirs)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(4, 24, 24, 3)).astype(np.float32)
    logits = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    functional.cross_entropy(logits, torch.arange(4)).backward()
    like = foreign.variable_shapes(net, jnp.zeros((1, 24, 24, 3)))
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


class ShuffleUnit(torch.nn.Module):
    """ShuffleNet's Figure 2: (c), where the channels grow, concatenates, (b) adds; layers named as released."""

    def __init__(self, inputs, outputs, groups, after_stem, released):
        super().__init__()
        self.groups, self.grows = groups, outputs != inputs
        # A quarter, section 3.3, to the nearest that the groups divide.
        inside = (outputs + 2 * groups) // (4 * groups) * groups
        added = outputs - inputs if self.grows else outputs
        self.shuffled = (inside // groups, groups) if released else (groups, -1)

        def conv(i, o, k, groups, strides=1):
            layer = torch.nn.Conv2d(i, o, k, strides, k // 2, groups=groups, bias=False)
            return layer, torch.nn.BatchNorm2d(o)

        self.branch_main_1 = torch.nn.Sequential(
            *conv(inputs, inside, 1, 1 if after_stem else groups),
            torch.nn.ReLU(),
            *conv(inside, inside, 3, inside, 2 if self.grows else 1),
        )
        self.branch_main_2 = torch.nn.Sequential(*conv(inside, added, 1, groups))

    def forward(self, x):
        y = self.branch_main_1[:3](x)
        y = y.unflatten(1, self.shuffled).transpose(1, 2).flatten(1, 2)
        y = self.branch_main_2(self.branch_main_1[3:](y))
        if not self.grows:
            return torch.relu(x + y)
        return torch.relu(torch.cat([functional.avg_pool2d(x, 3, 2, 1), y], 1))


class ShuffleNet(torch.nn.Module):
    """Table 1 of ShuffleNet: groups, channels of the stem and of stage 2."""

    def __init__(self, groups, stem, features, units, classes, released=False):
        super().__init__()
        self.first_conv = torch.nn.Sequential(
            torch.nn.Conv2d(3, stem, 3, 2, 1, bias=False),
            torch.nn.BatchNorm2d(stem),
        )
        stages = [[features * 2**stage] * n for stage, n in enumerate(units)]
        widths = [stem, *(width for stage in stages for width in stage)]
        self.features = torch.nn.Sequential(
            *(
                ShuffleUnit(inputs, outputs, groups, number == 0, released)
                for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
            )
        )
        last = torch.nn.Linear(widths[-1], classes, bias=False)
        self.classifier = torch.nn.Sequential(last)

    def forward(self, x):
        y = functional.max_pool2d(torch.relu(self.first_conv(x)), 3, 2, 1)
        return self.classifier(self.features(y).mean((2, 3)))


@pytest.mark.parametrize(
    ("variant", "groups", "stem", "features", "shuffle"),
    [("0.5-g3", 3, 12, 120, "paper"), ("0.25-g4", 4, 8, 68, "released")],
)
def test_shufflenet_is_that_of_the_paper(variant, groups, stem, features, shuffle):
    torch.manual_seed(0)
    released = shuffle == "released"
    net = ShuffleNet(groups, stem, features, (4, 8, 4), 10, released)
    options = {"variant": variant, "shuffle": shuffle}
    logits_agree(net, "shufflenet", options, 65, naming="released_names")


def test_a_training_step_of_shufflenet():
    torch.manual_seed(0)
    theirs = ShuffleNet(2, 8, 24, (2, 1), 5)
    net = models.make("shufflenet", variant="tiny", num_classes=5)
    names = registry.load("squeeze_jax.models", "shufflenet").released_names(net)
    training_steps_agree(theirs, net, names)


def caffe_squeezenet(w, x):
    """SqueezeNet 1.0 as its Caffe prototxt has it, in PyTorch's functions: [b, 3, 227, 227] BGR → [b, 1000]."""

    def conv(x, name, **kw):
        return functional.relu(
            functional.conv2d(x, w[f"{name}/w"], w[f"{name}/b"], **kw)
        )

    def pool(x):
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)

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
    arrays = weight_files.read(folder / "squeezenet_v1_0_deepcomp_f32.npz")
    images, labels = photographs(shared)
    assert len(images) == 50
    weights = {name: torch.tensor(array) for name, array in arrays.items()}
    with torch.no_grad():
        theirs = caffe_squeezenet(weights, torch.tensor(images).permute(0, 3, 1, 2))
    expected = theirs.numpy()

    net = models.make("squeezenet", variant="1.0", conv10_padding=1)
    names = registry.load("squeeze_jax.models", "squeezenet").caffe_names(net)
    like = foreign.variable_shapes(net, jnp.zeros((1, 227, 227, 3)))
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
