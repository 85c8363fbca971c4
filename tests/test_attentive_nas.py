"""AttentiveNAS' space and elastic image sizes: published costs, elastic widths, and images that networks resize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import models, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _plugs
from squeeze_jax.methods import Passes
from squeeze_jax.nas import costs, sort_channels, space, subnetwork
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.pieces import Runner, Sums
from squeeze_jax.train import forward
from squeeze_jax.train.state import State

SIZES = (192, 224, 256, 288)
# {network: (image size, features, kernels of stages, expansions, depths, parameters, MACs in millions)}: the seven networks of
# the authors' README, and the smallest and the largest. MACs by the authors' counter (203 M to 709 M in the README), parameters
# by PyTorch on their networks, without those that no output depends on.
PUBLISHED = {
    "a0": (192, (16, 16, 24, 32, 64, 112, 192, 216, 1792), (3, 3, 3, 3, 3, 3, 3), (1, 4, 4, 4, 4, 6, 6), (1, 3, 3, 3, 3, 3, 1), 8_954_184, 203.389568),
    "a1": (224, (16, 16, 24, 32, 64, 112, 192, 216, 1984), (3, 3, 3, 5, 3, 5, 3), (1, 4, 4, 4, 4, 6, 6), (1, 3, 3, 3, 3, 3, 1), 9_452_872, 279.238816),
    "a2": (224, (16, 16, 24, 32, 64, 112, 200, 224, 1984), (3, 3, 3, 3, 3, 5, 3), (1, 4, 5, 4, 4, 6, 6), (1, 3, 3, 3, 3, 4, 1), 11_149_824, 316.73008),
    "a3": (224, (16, 16, 24, 32, 64, 112, 208, 224, 1984), (3, 3, 3, 5, 3, 3, 3), (1, 4, 4, 4, 4, 6, 6), (2, 3, 3, 4, 3, 5, 1), 12_784_928, 356.5184),
    "a4": (256, (16, 16, 24, 32, 64, 112, 192, 216, 1984), (3, 3, 3, 5, 3, 5, 3), (1, 4, 4, 5, 4, 6, 6), (1, 3, 3, 4, 3, 5, 1), 11_809_640, 443.530752),
    "a5": (256, (16, 16, 24, 32, 72, 112, 192, 216, 1792), (3, 3, 3, 5, 3, 3, 3), (1, 4, 5, 4, 4, 6, 6), (1, 3, 3, 3, 4, 6, 1), 12_597_464, 490.520064),
    "a6": (288, (16, 16, 24, 32, 64, 112, 216, 224, 1984), (3, 3, 3, 3, 3, 5, 3), (1, 4, 6, 5, 4, 6, 6), (1, 3, 3, 4, 4, 6, 1), 15_154_792, 709.007232),
    "largest": (288, None, None, None, None, 23_404_080, 1939.335808),
}  # fmt: skip
TINY = dict(name="attentive_nas", variant="tiny", num_classes=3, stem_strides=1)
TINY |= dict(dropout=0.0, resolutions=(8, 12))


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    """The network resizes the image itself, so MACs are those of its own size."""
    resolution, features, kernel, expand, depth, parameters, macs = PUBLISHED[name]
    options = dict(resolution=resolution, features=features, kernel=kernel)
    options |= dict(expand=expand, depth=depth, resolutions=SIZES)
    net = models.make(name="attentive_nas", **options)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image(1, 224, 224, 3))
    assert tree.size(shapes["params"]) == parameters
    total = count.macs(net.apply, shapes, image(1, 224, 224, 3)).total
    assert total == round(macs * 1e6)
    if name == "a0":  # the authors' smallest network
        family = Family(dict(name="attentive_nas", resolutions=SIZES), _plugs.plain(image(1, 224, 224, 3)))  # fmt: skip
        arch = family.space.arch({k: v for k, v in options.items() if k != "resolutions"})  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, arch, family.space.smallest())


@pytest.mark.parametrize(
    ("options", "mega"),
    [
        (dict(name="ofa_mobilenet_v3"), 188.25),
        (dict(name="ofa_proxyless"), 329.25),
        (dict(name="ofa_resnet"), 2_447.63),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_images_of_every_space_are_resized(options, mega):
    """MACs of the largest networks at 128 pixels, counted by PyTorch on the authors' networks."""
    net = models.make(**options, resolutions=(128, 224), resolution=128)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image(1, 224, 224, 3))
    total = count.macs(net.apply, shapes, image(1, 224, 224, 3)).total
    assert round(total / 1e6, 2) == mega


@functools.cache
def filled():
    """(family, variables of noise, the method's own arrays of noise, images [2, 12, 12, 1])."""
    family = Family(TINY, _plugs.plain(image(2, 12, 12, 1)))
    rng = np.random.default_rng(0)

    def noise(name, a):
        array = rng.uniform(-0.5, 0.5, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    variables = tree.map_named(noise, family.shapes(family.holder()))
    own = subnetwork.identity_transforms(family.kernel_sizes())
    spare = subnetwork.initial_parameters(jax.random.key(0), family.spare_shapes())
    return family, variables, own | spare, noise("", np.zeros((2, 12, 12, 1)))


def test_shortcuts_that_only_smaller_networks_have():
    """Stem and stage 1 have 8 or 16 channels, and so has stage 2: both are equal in the largest network."""
    family, *_ = filled()
    shapes = {
        f"{layer}/{end}": leaf.shape
        for layer, arrays in family.spare_shapes().items()
        for end, leaf in arrays.items()
    }
    shortcuts = (f"stage{n}_block1/shortcut/kernel" for n in (1, 2))
    assert shapes == dict.fromkeys(shortcuts, (1, 1, 16, 16))
    whole = jax.eval_shape(family.holder().init, jax.random.key(0), image(2, 12, 12, 1))
    assert tree.differences(whole, family.shapes(family.holder())) == []


def test_costs_and_number_of_networks():
    """By hand: 2 kernels of 2 stages, 2 expansions of one, 2 depths of 2, 2 widths of 4 layers, and 2 image sizes."""
    family, *_ = filled()
    pieces = costs.Pieces(family, image(1, 12, 12, 1))
    assert pieces.number_of_networks() == 2**2 * 2 * 2**2 * 2**4 * 2
    table = pieces.tabulate(costs.macs)
    for key in jax.random.split(jax.random.key(0), 4):
        arch = jax.device_get(space.sample(family.space, key))
        net = family.network(arch)
        counted = count.macs(net.apply, family.shapes(net), image(1, 12, 12, 1))
        assert table(arch) == counted.total


def test_gradients_of_pieces_are_those_of_the_extracted_network():
    """By `jax.grad` through the whole network; its shortcuts are not in the largest one, and it resizes the images."""
    family, variables, own, x = filled()
    arch = family.space.arch(
        {"features": (8, 16, 8, 24), "kernel": 3, "depth": (2, 1), "resolution": 8}
    )

    def run(module, params, stats, x, key):
        network = forward.make(module, None)
        variables = {"params": params, **stats}
        (y, endpoints), changed = forward.run(network, variables, x, train=True, key=key)  # fmt: skip
        return y, endpoints, stats | changed

    def loss(params, own):
        _, small = family.extract(arch, variables | {"params": params}, own)
        stats = {"batch_stats": small["batch_stats"], "extra": {}}
        key = jax.random.key(0)
        y, *_ = run(family.network(arch), small["params"], stats, x, key)
        return jnp.sum(y * jnp.arange(6.0).reshape(2, 3)), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    expected, logits = gradient(variables["params"], own)
    runner, sums = Runner(Passes(None, None, None, run, None, named=False)), Sums()
    stats = {"batch_stats": variables["batch_stats"], "extra": {}}
    pieces = family.network(arch).pieces
    done = runner.run(pieces, variables["params"], stats, own, x, jax.random.key(0))
    np.testing.assert_allclose(done.logits, logits, rtol=1e-4, atol=1e-4)
    sums.add_whole(jax.tree.map(jnp.zeros_like, variables["params"]))
    runner.pull(done, jnp.arange(6.0).reshape(2, 3), {}, sums)
    grads = tree.flatten({"params": sums.total(), "own": sums.transforms})
    for name, value in tree.flatten(dict(zip(("params", "own"), expected, strict=True))).items():  # fmt: skip
        found = grads.pop(name, np.zeros_like(value))
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=1e-3, err_msg=name)
        if "shortcut" in name:
            assert np.any(value != 0)
    assert not grads


def test_sorted_channels_compute_the_same():
    """The first stage has depthwise convolutions without an expansion before them: their order stays that of the stem."""
    _, variables, _, x = filled()
    state = State(np.int32(0), variables["params"], variables["batch_stats"], {})
    plain = _plugs.plain(image(*x.shape))
    _, after = sort_channels.make().apply(TINY, state, plain)
    before, block = (s.params["stage1_block1"] for s in (state, after))
    jax.tree.map(np.testing.assert_array_equal, before, block)
    before, block = (s.params["stage2_block2"] for s in (state, after))
    excite = before["squeeze_excite"]["reduce"]["kernel"]
    importance = np.abs(before["project"]["kernel"]).sum((0, 1, 3))
    importance = importance + np.abs(excite).sum((0, 1, 3))
    order = np.argsort(-importance)
    np.testing.assert_array_equal(
        block["expand"]["kernel"], before["expand"]["kernel"][..., order]
    )


def test_an_image_of_the_wanted_size_stays_as_it_is():
    family, variables, own, x = filled()
    _, small = family.extract(family.space.arch({"resolution": 8}), variables, own)
    options = {k: v for k, v in TINY.items() if k != "resolutions"}
    plain, resizing = models.make(**options), models.make(**TINY, resolution=8)
    small_x = x[:, :8, :8]
    both = [jax.jit(n.apply)(small, small_x)[0] for n in (plain, resizing)]
    np.testing.assert_array_equal(*both)
    # By PyTorch: bilinear, half-pixel centres.
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    y = torch.nn.functional.interpolate(x, (8, 8), mode="bilinear")
    y = y.permute(0, 2, 3, 1).numpy()
    expected, found = jax.jit(plain.apply)(small, y)[0], jax.jit(resizing.apply)(small, filled()[3])[0]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(resolutions=(12, 8)), r"resolutions = \(12, 8\) should be ascending"),
        (dict(resolutions=(), resolution=8), r"resolution = 8 has no choices: set"),
        (dict(resolution=9), r"resolution = 9 is not in the space: choose one of 8, 12"),
        (dict(features=(8, 8, 8)), r"features has 3 values: .* 4, one for each"),
        (dict(features=(8, 8, 8, 8)), r"features\[3\] = 8 .* one of 24, 32"),
    ],
)  # fmt: skip
def test_bad_values_are_named(options, words):
    with pytest.raises(UserError, match=words):
        models.make(**TINY | options)
