"""The weights that once-for-all's authors released, in files of their layout: names, shapes, outputs, and kernels' matrices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import squeeze_jax as sj
from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _plugs
from squeeze_jax.models import ofa_mobilenet_v3, ofa_proxyless, ofa_resnet
from squeeze_jax.nas import matrices, once_for_all
from squeeze_jax.nas.family import Family
from squeeze_jax.weights import pretrained

TINY = dict(name="ofa_mobilenet_v3", variant="tiny", num_classes=3, stem_strides=1)
TINY |= dict(dropout=0.0)


def unit(name, *shape, elastic):
    """A convolution and its normalisation; layers of elastic width have one more level of names."""
    conv, norm = (f"{name}.{end}{elastic * f'.{end}'}" for end in ("conv", "bn"))
    arrays = {f"{conv}.weight": shape}
    for end in "weight", "bias", "running_mean", "running_var":
        arrays[f"{norm}.{end}"] = shape[:1]
    return arrays | {f"{norm}.num_batches_tracked": ()}


def bottlenecks(first, stages, expand, sides, branch="conv"):
    """Shapes of the blocks.

    Args:
      first: channels of the stem and after the first block, which has no expansion.
      stages: (channels, blocks, whether they have an excitation) of each stage.
      expand: largest expansion.
      sides: of the kernels, ascending.
      branch: name of the branch of a block, which the authors changed.
    """
    stem, inputs = first
    start = f"blocks.0.{branch}"
    arrays = unit(f"{start}.depth_conv", stem, 1, 3, 3, elastic=False)
    arrays |= unit(f"{start}.point_linear", inputs, stem, 1, 1, elastic=False)
    number = 0
    for features, blocks, excite in stages:
        for _ in range(blocks):
            number += 1
            start, wide = f"blocks.{number}.{branch}", expand * inputs
            kernel = (wide, 1, sides[-1], sides[-1])
            arrays |= unit(f"{start}.inverted_bottleneck", wide, inputs, 1, 1, elastic=True)  # fmt: skip
            arrays |= unit(f"{start}.depth_conv", *kernel, elastic=True)
            for small, large in itertools.pairwise(sides):
                name = f"{start}.depth_conv.conv.{large}to{small}_matrix"
                arrays[name] = (small**2, small**2)
            if excite:
                inside = divisible(wide // 4)
                for layer, shape in ("reduce", (inside, wide)), ("expand", (wide, inside)):  # fmt: skip
                    name = f"{start}.depth_conv.se.fc.{layer}"
                    arrays |= {f"{name}.weight": (*shape, 1, 1), f"{name}.bias": shape[:1]}  # fmt: skip
            arrays |= unit(f"{start}.point_linear", features, wide, 1, 1, elastic=True)
            inputs = features
    return arrays


def divisible(channels):
    """The multiple of 8 that is nearest, and not more than a tenth below."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def mobilenet(first, stages, expand, sides, head, hidden, classes, **keys):
    arrays = unit("first_conv", first[0], 3, 3, 3, elastic=False)
    arrays |= bottlenecks(first, stages, expand, sides, **keys)
    arrays |= unit("final_expand_layer", head, stages[-1][0], 1, 1, elastic=False)
    arrays["feature_mix_layer.conv.weight"] = (hidden, head, 1, 1)
    return arrays | classifier("classifier.linear", classes, hidden)


def proxyless():
    """Width 1.3: channels times 1.3, as multiples of 8."""
    stages = ((32, 4), (56, 4), (104, 4), (128, 4), (248, 4), (416, 1))
    stages = tuple((*stage, False) for stage in stages)
    arrays = unit("first_conv", 40, 3, 3, 3, elastic=False)
    arrays |= bottlenecks((40, 24), stages, 6, (3, 5, 7))
    arrays |= unit("feature_mix_layer", 1664, 416, 1, 1, elastic=False)
    return arrays | classifier("classifier.linear", 1000, 1664)


def resnet():
    """Blocks have 0.35 of their output channels inside, as multiples of 8."""
    arrays = unit("input_stem.0", 32, 3, 3, 3, elastic=True)
    arrays |= unit("input_stem.1.conv", 32, 32, 3, 3, elastic=True)
    arrays |= unit("input_stem.2", 64, 32, 3, 3, elastic=True)
    number, inputs = 0, 64
    rows = (256, 88, 4), (512, 176, 4), (1024, 360, 6), (2048, 720, 4)
    for features, inside, blocks in rows:
        for block in range(blocks):
            start = f"blocks.{number}"
            arrays |= unit(f"{start}.conv1", inside, inputs, 1, 1, elastic=True)
            arrays |= unit(f"{start}.conv2", inside, inside, 3, 3, elastic=True)
            arrays |= unit(f"{start}.conv3", features, inside, 1, 1, elastic=True)
            if block == 0:
                arrays |= unit(f"{start}.downsample", features, inputs, 1, 1, elastic=True)  # fmt: skip
            number, inputs = number + 1, features
    return arrays | classifier("classifier.linear.linear", 1000, 2048)


def classifier(name, classes, inputs):
    return {f"{name}.weight": (classes, inputs), f"{name}.bias": (classes,)}


WIDTHS = ((24, 4, False), (40, 4, True), (80, 4, False), (112, 4, True), (160, 4, True))
FILES = {  # {network: (its file, shapes of a released file, number of its arrays, number of its matrices)}
    "ofa_mobilenet_v3": (
        ofa_mobilenet_v3,
        mobilenet((16, 16), WIDTHS, 6, (3, 5, 7), 960, 1280, 1000),
        475,
        40,
    ),
    "ofa_proxyless": (ofa_proxyless, proxyless(), 446, 42),
    "ofa_resnet": (ofa_resnet, resnet(), 368, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_array_of_a_released_file_has_its_place(name):
    """The numbers of arrays are those of the authors' networks."""
    module, shapes, count, apart = FILES[name]
    assert len(shapes) == count
    arrays = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    net = models.make(name=name)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), x)
    fitted, lines = pretrained.fit(arrays, "released", net, module, like, "ofa.pth")
    assert tree.differences(like, fitted) == []
    told = [line for line in lines if line.startswith(f"{apart} matrices")]
    assert len(told) == bool(apart)
    with pytest.raises(UserError, match=r"epsilon"):
        module.released_names(models.make(name=name, epsilon=0.1))


@functools.cache
def stored():
    """Random arrays of the variant tiny in the layout of a released file, by their older names."""
    shapes = mobilenet((8, 8), ((16, 2, False), (16, 2, True)), 3, (3, 5), 48, 64, 3, branch="mobile_inverted_conv")  # fmt: skip
    rng = np.random.default_rng(0)
    return {
        name: (rng.uniform(-0.5, 0.5, s) + name.endswith("_var")).astype(np.float32)
        for name, s in shapes.items()
    }


def by_pytorch(weights, x, kernel, expand, depth):
    """Logits of a network with one kernel and expansion in all blocks."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}

    def norm(x, name):
        ends = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{end}"][: x.shape[1]] for end in ends))

    def pointwise(x, name, features, bias=False):
        kernel = w[f"{name}.weight"][:features, : x.shape[1]]
        return F.conv2d(x, kernel, w[f"{name}.bias"][:features] if bias else None)

    def block(x, start, features, strides, excite, activation):
        inputs, wide = x, divisible(x.shape[1] * expand)
        x = pointwise(x, f"{start}.inverted_bottleneck.conv.conv", wide)
        x = activation(norm(x, f"{start}.inverted_bottleneck.bn.bn"))
        filters = w[f"{start}.depth_conv.conv.conv.weight"][:wide]
        if kernel == 3:
            flat = filters[:, 0, 1:4, 1:4].reshape(wide, 9)
            filters = flat @ w[f"{start}.depth_conv.conv.5to3_matrix"].T
            filters = filters.reshape(wide, 1, 3, 3)
        x = F.conv2d(x, filters, stride=strides, padding=kernel // 2, groups=wide)
        x = activation(norm(x, f"{start}.depth_conv.bn.bn"))
        if excite:
            name, y = f"{start}.depth_conv.se.fc", x.mean((2, 3), keepdim=True)
            y = pointwise(y, f"{name}.reduce", divisible(wide // 4), bias=True).relu()
            x = x * F.hardsigmoid(pointwise(y, f"{name}.expand", wide, bias=True))
        x = pointwise(x, f"{start}.point_linear.conv.conv", features)
        x = norm(x, f"{start}.point_linear.bn.bn")
        return x + inputs if x.shape == inputs.shape else x

    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    x = F.conv2d(x, w["first_conv.conv.weight"], padding=1)
    x = first = F.hardswish(norm(x, "first_conv.bn"))
    start = "blocks.0.mobile_inverted_conv"
    x = F.conv2d(x, w[f"{start}.depth_conv.conv.weight"], padding=1, groups=8)
    x = norm(x, f"{start}.depth_conv.bn").relu()
    x = pointwise(x, f"{start}.point_linear.conv", 8)
    x = first + norm(x, f"{start}.point_linear.bn")
    for stage, (strides, activation) in enumerate(((1, F.relu), (2, F.hardswish))):
        for number in range(depth):
            start = f"blocks.{1 + 2 * stage + number}.mobile_inverted_conv"
            x = block(x, start, 16, 1 if number else strides, stage == 1, activation)
    x = pointwise(x, "final_expand_layer.conv", 48)
    x = F.hardswish(norm(x, "final_expand_layer.bn")).mean((2, 3), keepdim=True)
    x = F.hardswish(pointwise(x, "feature_mix_layer.conv", 64))[..., 0, 0]
    return F.linear(x, w["classifier.linear.weight"], w["classifier.linear.bias"])


@pytest.fixture
def path(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "ofa.pth"
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in stored().items()}
    torch.save({"state_dict": tensors}, path)
    return path


def family():
    return Family(TINY, _plugs.plain(jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)))


def test_outputs_of_the_largest_and_of_an_extracted_network(path, caplog):
    """By PyTorch's functions on the arrays of the file; a smaller kernel passes through its matrix."""
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    net = family().holder()
    variables = sj.load(path, model=net, example=(1, 8, 8, 3))
    assert "4 matrices that change the kernels of smaller networks left out" in caplog.text  # fmt: skip
    found = jax.jit(net.apply)(variables, x)[0]
    np.testing.assert_allclose(found, by_pytorch(stored(), x, 5, 3, 2), rtol=1e-4, atol=1e-5)  # fmt: skip
    arch = family().space.arch({"kernel": 3, "expand": 2, "depth": 1})
    own = matrices.read(path, net)
    options, small = family().extract(arch, variables, own)
    found = jax.jit(models.make(**options).apply)(small, x)[0]
    np.testing.assert_allclose(found, by_pytorch(stored(), x, 3, 2, 1), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_training_begins_with_the_matrices_of_the_file(path):
    """They stand in the method's own parameters, with the values of the file."""
    plain = _plugs.plain(jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    method = once_for_all.make(matrices=str(path)).bind(TINY, plain)
    own = method.init(jax.random.key(0), {})
    blocks = ("stage1_block1", "stage1_block2", "stage2_block1", "stage2_block2")
    assert list(own) == [f"{block}/depthwise" for block in blocks]
    for number, layer in enumerate(own, 1):
        name = f"blocks.{number}.mobile_inverted_conv.depth_conv.conv.5to3_matrix"
        np.testing.assert_array_equal(own[layer]["5to3"], stored()[name])


def test_files_without_matrices_and_options_without_effect_are_named(tmp_path):
    path = tmp_path / "plain.npz"
    np.savez(path, **{"first_conv.conv.weight": np.zeros((8, 3, 3, 3), np.float32)})
    with pytest.raises(UserError, match="has no matrices"):
        matrices.read(path, family().holder())
    np.savez(path, **{"blocks.9.conv.depth_conv.conv.5to3_matrix": np.eye(9)})
    with pytest.raises(UserError, match=r"5to3_matrix \(9, 9\) has no place"):
        matrices.read(path, family().holder())
    with pytest.raises(UserError, match="matrices has no effect with transforms"):
        once_for_all.make(transforms=False, matrices=str(path))
    with pytest.raises(UserError, match="no 5to3 of stage1_block1/depthwise"):
        matrices.replaced({"stage1_block1/depthwise": {"5to3": np.eye(9)}}, {})
