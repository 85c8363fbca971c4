"""Networks with single layers narrower and with blocks left out: every network of the zoo, against hand counts and itself."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from squeeze_jax import models, registry, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError

LENGTH = 6
IMAGE = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = {
    "tokens": np.random.default_rng(1).integers(0, 99, (2, LENGTH)).astype(np.int32)
}


class Row(NamedTuple):
    """A network, one of its layers that loses channels, and a block that is left out.

    Attributes:
      options: of the network.
      layer: the one that is narrowed, to `width` features.
      parameters, macs: that the network loses, for one image or sequence; counted by hand.
      cuts: {regex of parameters and statistics: (axis, the channels that go)}.
      readers: the same for kernels that read them; a list of lists is one for each group of outputs.
      block: the block that is left out.
      branch: a regex of what is zero where the block's branch is.
      identity: a regex of the normalisations that are the identity on their input where scale is 1 and bias 0.
    """

    options: dict[str, Any]
    layer: str
    width: int
    parameters: int
    macs: int
    cuts: dict[str, tuple[int, list]]
    readers: dict[str, tuple[int, list]]
    block: str
    branch: str
    identity: str = "^$"


def inverted(block, channels, excite, gone, parameters, macs, other):
    """The expansion of an inverted residual: what is depthwise after it is as wide."""
    wide = {rf"^{block}/(expand|depthwise)(_norm)?/": (-1, gone)}
    readers = {rf"^{block}/project/kernel": (-2, gone)}
    if excite:
        wide[rf"^{block}/squeeze_excite/expand/"] = (-1, gone)
        readers[rf"^{block}/squeeze_excite/reduce/kernel"] = (-2, gone)
    return Row(
        {"variant": "tiny"},
        f"{block}/expand",
        channels - len(gone),
        parameters,
        macs,
        wide,
        readers,
        other,
        rf"^{other}/project_norm/(scale|bias)",
    )


def encoder(options, layer="layer1", width=63, gone=(5,), times=1, start="", **counts):
    """The first layer of a feed-forward network: 32 channels, and 64 between the two layers; one channel less."""
    gone = list(gone)
    plain = {"parameters": 32 + 1 + 32, "macs": times * LENGTH * (32 + 32)}
    ffn = "ffn1" if "ffn1" in layer else "ffn"
    layer = f"{start}{layer}".removesuffix("/ffn1")
    second = f"{start}layer2"
    return Row(
        **{
            "options": {"variant": "toy", **options},
            "layer": f"{layer}/{ffn}_in",
            "width": width,
            **plain,
            "cuts": {rf"^{layer}/{ffn}_in/": (-1, gone)},
            "readers": {rf"^{layer}/{ffn}_out/kernel": (-2, gone)},
            "block": second,
            "branch": rf"^{second}/(attention/)?(output|ffn\d?_out|wide)/",
            "identity": rf"^({start}layer1/ffn_norm|{second}/\w+_norm)/",
        }
        | counts,
    )


ROWS = {
    # conv1 gives 7x7 and pooling 3x3 positions; the next squeeze sees the 8 channels of 1x1 before those of 3x3.
    "squeezenet": Row(
        {"variant": "tiny", "bypass": "none"},
        "fire2/expand3x3",
        7,
        9 * 4 + 1 + 4,
        9 * (9 * 4 + 4),
        {"^fire2/expand3x3/": (-1, [3])},
        {"^fire3/squeeze1x1/kernel": (-2, [8 + 3])},
        "fire3",
        "^fire3/expand",
    ),
    # expand 8 → 48 at 8x8, depthwise 3x3 with strides 2, project to 8; normalisations have 2 each.
    "mobilenet_v2": inverted(
        "bottleneck2",
        48,
        False,
        [7],
        8 + 2 + 9 + 2 + 8,
        64 * 8 + 16 * 9 + 16 * 8,
        "bottleneck3",
    ),
    # expand 8 → 24 at 8x8, depthwise 5x5 with strides 2, excitation by 8, project to 16.
    "mobilenet_v3": inverted(
        "bottleneck1",
        24,
        True,
        [7],
        8 + 2 + 25 + 2 + 8 + 8 + 1 + 16,
        64 * 8 + 16 * 25 + 8 + 8 + 16 * 16,
        "bottleneck2",
    ),
    # expand 8 → 48 at 8x8, depthwise 5x5 with strides 2, excitation by 8 / 4, project to 16.
    "efficientnet": inverted(
        "stage2_1",
        48,
        True,
        [7],
        8 + 2 + 25 + 2 + 2 + 2 + 1 + 16,
        64 * 8 + 16 * 25 + 2 + 2 + 16 * 16,
        "stage3_1",
    ),
    # expand 16 → 48 at 8x8, depthwise 5x5 with strides 2, excitation by 16, project to 16.
    "attentive_nas": inverted(
        "stage2_block1",
        48,
        True,
        [7],
        16 + 2 + 25 + 2 + 16 + 16 + 1 + 16,
        64 * 16 + 16 * 25 + 16 + 16 + 16 * 16,
        "stage2_block2",
    ),
    # expand 8 → 24 at 8x8, depthwise 5x5, project to 16.
    "ofa_mobilenet_v3": inverted(
        "stage1_block1",
        24,
        False,
        [7],
        8 + 2 + 25 + 2 + 16,
        64 * (8 + 25 + 16),
        "stage1_block2",
    ),
    "ofa_proxyless": inverted(
        "stage1_block1",
        24,
        False,
        [7],
        8 + 2 + 25 + 2 + 16,
        64 * (8 + 25 + 16),
        "stage1_block2",
    ),
    # 1x1 and 3x3 convolutions of 16 channels at 16x16.
    "ofa_resnet": Row(
        {"variant": "tiny"},
        "stage1_block1/conv1",
        15,
        16 + 2 + 9 * 16,
        256 * (16 + 9 * 16),
        {"^stage1_block1/conv1(_norm)?/": (-1, [3])},
        {"^stage1_block1/conv2/kernel": (-2, [3])},
        "stage1_block2",
        "^stage1_block2/conv3_norm/(scale|bias)",
    ),
    # Two 3x3 convolutions of 8 channels at 4x4.
    "resnet": Row(
        {"variant": "18", "width": 1 / 8, "num_classes": 7},
        "conv2_1/conv1",
        7,
        9 * 8 + 2 + 9 * 8,
        16 * (72 + 72),
        {"^conv2_1/conv1(_norm)?/": (-1, [3])},
        {"^conv2_1/conv2/kernel": (-2, [3])},
        "conv2_2",
        "^conv2_2/conv2_norm/(scale|bias)",
    ),
    # Two groups, 24 → 6 → 24 channels at 2x2. Channel i of group a is shuffled to 2i + a: i = 1 goes to 2 and 3, the last
    # that the first group of the second convolution sees and the first that the second does.
    "shufflenet": Row(
        {"variant": "tiny"},
        "stage2_2/reduce",
        4,
        2 * 12 + 2 * 2 + 2 * 9 + 2 * 2 + 24,
        4 * (2 * 12 + 2 * 9 + 24),
        {
            "^stage2_2/reduce(_norm)?/": (-1, [1, 4]),
            "^stage2_2/depthwise(_norm)?/": (-1, [2, 3]),
        },
        {"^stage2_2/expand/kernel": (-2, [[2], [0]])},
        "stage2_2",
        "^stage2_2/expand_norm/(scale|bias)",
    ),
    # Two 3x3 convolutions of 8 channels at 16x16; scale and shift of one width.
    "slimmable": Row(
        {"variant": "tiny", "switches": (1.0,)},
        "block1/unit1/conv",
        7,
        9 * 8 + 2 + 9 * 8,
        256 * (72 + 72),
        {"^block1/unit1/": (-1, [3])},
        {"^block1/unit2/conv/kernel": (-2, [3])},
        "block1",
        "^block1/unit2/norm100/(scale|bias)",
    ),
    # 3x3 convolutions with strides 2 of 3, 8 and 8 channels: 8x8 and 4x4 positions.
    "fcn": Row(
        {"variant": "tiny"},
        "stage1/conv1",
        7,
        9 * 3 + 2 + 9 * 8,
        64 * 9 * 3 + 16 * 9 * 8,
        {"^stage1/conv1(_norm)?/": (-1, [3])},
        {"^stage2/conv1/kernel": (-2, [3])},
        "",  # it has no residual blocks
        "",
    ),
    "bert": encoder({}),
    "roberta": encoder({}),
    "distilbert": encoder({}),
    "electra": encoder({}),
    # The first layer is used twice of three times: (number of a layer) * 2 // 3 is 0, 0, 1.
    "albert": encoder({"layers": 3, "distinct": 2}, times=2),
    # Normalises before attention and feed-forward network: nothing has to be the identity.
    "gpt2": encoder({"task": "causal_lm"}, identity="^$"),
    # Four groups of 16 channels, a channel of each; a group has 8 of the 32.
    "squeezebert": encoder(
        {},
        width=60,
        gone=[3, 19, 35, 51],
        parameters=4 * 8 + 4 + 32,
        macs=LENGTH * (4 * 8 + 32),
        readers={"^layer1/ffn_out/kernel": (-2, [3])},
    ),
    # 24 channels, 48 in the feed-forward network; its pieces have no residual blocks.
    "elastic_squeezebert": encoder(
        {"variant": "tiny"},
        width=47,
        parameters=24 + 1 + 24,
        macs=LENGTH * (24 + 24),
        block="",
        branch="",
    ),
    # 16 channels inside a layer, 24 between the two of a feed-forward network.
    "mobilebert": encoder(
        {"layers": 2},
        "layer1/ffn1",
        23,
        parameters=16 + 1 + 16,
        macs=LENGTH * (16 + 16),
    ),
    # A generator of half the channels: 16, and 32 in the feed-forward network.
    "electra_pretraining": encoder(
        {},
        "generator/layer1",
        31,
        parameters=16 + 1 + 16,
        macs=LENGTH * (16 + 16),
        block="discriminator/layer2",
        branch="^discriminator/layer2/(attention/output|ffn_out)/",
        identity=r"^discriminator/(layer1/ffn_norm|layer2/\w+_norm)/",
    ),
}
ELSEWHERE = {"lstm"}  # its layers have four gates: tests/test_lstm.py
NAMES = [name for name in registry.names("squeeze_jax.models") if name not in ELSEWHERE]


def test_every_network_has_a_row():
    assert sorted(ROWS) == NAMES


def test_what_cannot_be_narrowed_says_so():
    x = {"tokens": np.zeros((1, 3), np.int32)}
    for layer, tied in ("output", False), ("lstm2", True):
        net = models.make("lstm", variant="tiny", tied=tied, widths={layer: 3})
        with pytest.raises(UserError, match=f"widths: .*{layer}"):
            jax.eval_shape(net.init, jax.random.key(0), x)


def batch(name, size=2):
    module = registry.load("squeeze_jax.models", name)
    x = TOKENS if getattr(module, "INPUTS", "") == "tokens" else IMAGE
    return jax.tree.map(lambda a: a[:size], x)


def built(name, **shape):
    return models.make(name, **ROWS[name].options, **shape)


def shapes(net, x):
    return jax.eval_shape(net.init, jax.random.key(0), x)


@functools.cache  # the network as it is serves several tests
def filled(net, name):
    """Variables of noise: quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)
    like = shapes(net, batch(name))

    def noise(name, a):
        array = rng.uniform(-0.4, 0.4, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    return {kind: tree.map_named(noise, part) for kind, part in like.items()}


def kept(array, axis, gone):
    """bool of the array's shape; `gone` for each of as many equal parts of the last axis if it is a list of lists."""
    keep = np.ones(array.shape, bool)
    parts = gone if isinstance(gone[0], list) else [gone]
    for part, rows in zip(np.split(keep, len(parts), -1), parts, strict=True):
        np.moveaxis(part, axis, 0)[rows] = False  # a view
    return keep


def edited(variables, edits, edit):
    """Applies edit(array, which elements stay) to what the regexes of `edits` match; each has to match something."""

    def one(name, array):
        for pattern, (axis, gone) in edits.items():
            if re.search(pattern, name):
                used.add(pattern)
                return edit(array, kept(array, axis, gone))
        return array

    used = set()
    found = {kind: tree.map_named(one, part) for kind, part in variables.items()}
    assert used == set(edits)
    return found


def sliced(array, keep):
    # Output channels first: each has lost as many numbers as the others, though not always the same.
    array, keep = np.moveaxis(array, -1, 0), np.moveaxis(keep, -1, 0)
    outputs = keep.reshape(len(keep), -1).any(1)
    rows = [a[k] for a, k in zip(array[outputs], keep[outputs], strict=True)]
    inner = keep[outputs][0]
    counts = [
        np.moveaxis(inner, axis, 0).reshape(size, -1).any(1).sum()
        for axis, size in enumerate(inner.shape)
    ]
    return np.moveaxis(np.stack(rows).reshape(len(rows), *counts), 0, -1)


@functools.cache  # the network as it is serves several tests
def outputs(net):
    return jax.jit(lambda v, x: net.apply(v, x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_narrowed_layer_costs_less_by_a_hand_count(name):
    row, x, sizes = ROWS[name], batch(name, 1), []

    def run(net, x):
        # Initialisation multiplies no matrices: one trace tells both.
        result, variables = net.init_with_output(jax.random.key(0), x)
        sizes.append(tree.size(variables["params"]))
        return result

    nets = built(name), built(name, widths={row.layer: row.width})
    before, after = (count.macs(functools.partial(run, net), x) for net in nets)
    assert sizes[0] - sizes[1] == row.parameters
    assert before.total - after.total == row.macs
    # Layers are called as before, but for the module's own name.
    names = [[n.partition("/")[2] for n in macs.by_layer] for macs in (before, after)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_nobody_reads_can_be_cut_off(name):
    row, x = ROWS[name], batch(name)
    net, narrow = built(name), built(name, widths={row.layer: row.width})
    variables = edited(
        filled(net, name), row.readers, lambda a, keep: np.where(keep, a, 0)
    )
    cut = edited(variables, row.cuts | row.readers, sliced)
    like = shapes(narrow, x)
    assert tree.differences(like, cut) == []
    expected, found = outputs(net)(variables, x), outputs(narrow)(cut, x)
    assert max(np.abs(a).max() for a in jax.tree.leaves(expected)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].block])
def test_an_absent_block_is_one_that_adds_nothing(name):
    row, x = ROWS[name], batch(name)
    options = row.options | ({"bypass": "simple"} if name == "squeezenet" else {})
    net = models.make(name, **options)
    without = models.make(name, **options, absent=(row.block,))
    branch = {row.branch: lambda leaf, a: 0 * a}
    identity = {row.identity: lambda leaf, a: 0 * a + leaf.endswith("/scale")}

    def value(leaf, a):
        for pattern, new in (branch | identity).items():
            if re.search(pattern, leaf):
                return new(leaf, a)
        return a

    variables = {k: tree.map_named(value, v) for k, v in filled(net, name).items()}
    like = shapes(without, x)
    rest = set(tree.flatten(like["params"]))
    everything = set(tree.flatten(variables["params"]))
    assert everything - rest == {n for n in everything if n.startswith(f"{row.block}/")}
    expected, found = outputs(net)(variables, x), outputs(without)(variables, x)
    assert max(np.abs(a).max() for a in jax.tree.leaves(expected)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


# {network: (what its layers' queries and keys are called before their names, channels, heads)}
QUERIES = {
    "squeezebert": ("layer1/attention/", 32, 4),
    "mobilebert": ("layer1/", 16, 4),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_channel_of_each_head_of_queries_and_keys_can_be_cut_off(name):
    start, channels, heads = QUERIES[name]
    x, gone = batch(name), [head * channels // heads + 1 for head in range(heads)]
    narrow = built(
        name,
        widths=dict.fromkeys((f"{start}query", f"{start}key"), channels - heads),
    )
    net = built(name)
    both = {rf"^{start}(query|key)/": (-1, gone)}
    variables = edited(filled(net, name), both, lambda a, keep: np.where(keep, a, 0))
    expected = outputs(net)(variables, x)
    found = outputs(narrow)(edited(variables, both, sliced), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_absent_layers_keep_the_numbers_of_the_others():
    x = batch("bert")
    net = models.make("bert", variant="toy", layers=3, absent=("layer1", "layer3"))
    (_, endpoints), variables = jax.eval_shape(
        net.init_with_output, jax.random.key(0), x
    )
    assert {n for n in variables["params"] if n.startswith("layer")} == {"layer2"}
    assert {n for n in endpoints if n.startswith("attention")} == {"attention2"}
    # One layer is a network of one layer.
    one = models.make("bert", variant="toy", layers=1)
    variables = filled(one, "bert")
    params = {k: v for k, v in variables["params"].items() if k != "layer1"}
    moved = {"params": params | {"layer2": variables["params"]["layer1"]}}
    found = outputs(net)(moved, x)
    np.testing.assert_array_equal(found, outputs(one)(variables, x))


def test_without_widths_and_absent_blocks_there_is_no_wrapper():
    net = models.make("mobilenet_v2", variant="tiny", widths={}, absent=())
    assert type(net) is type(models.make("mobilenet_v2", variant="tiny"))


def test_attributes_are_those_of_the_network():
    net = built("bert", widths={"layer1/ffn_in": 7})
    assert (net.row.ffn_features, net.task, net.num_classes) == (
        64,
        "classification",
        2,
    )
    with pytest.raises(AttributeError, match="stages"):
        _ = net.stages
    assert net.clone() == net
    assert hash(net) == hash(built("bert", widths={"layer1/ffn_in": 7}))


@pytest.mark.parametrize("name", ["mobilenet_v2", "bert"])
def test_an_exported_network_is_the_live_one(name):
    row, x = ROWS[name], batch(name)
    net = built(name, widths={row.layer: row.width}, absent=(row.block,))
    variables = filled(net, name)
    run = outputs(net)
    rows = export.symbolic_shape("b")[0]
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), x
    )
    exported = export.export(jax.jit(lambda x: run(variables, x)))(like)
    again = export.deserialize(exported.serialize())
    expected = run(variables, x)
    np.testing.assert_allclose(again.call(x), expected, rtol=1e-3, atol=1e-5)


def test_all_layers_of_a_residual_stream_change_together():
    # bottleneck2's output goes through the sum of bottleneck3.
    narrow = dict.fromkeys(("bottleneck2/project", "bottleneck3/project"), 5)
    net = built("mobilenet_v2", widths=narrow)
    params = shapes(net, IMAGE)["params"]
    assert params["bottleneck3"]["expand"]["kernel"].shape == (1, 1, 5, 48)
    assert params["bottleneck4"]["expand"]["kernel"].shape == (1, 1, 5, 48)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "mobilenet_v2",
            {"widths": {"bottleneck2/expnd": 5}},
            r"widths: unknown layer 'bottleneck2/expnd'; did you mean 'bottleneck2/expand'",
        ),
        (
            "bert",
            {"absent": ("layer3",)},
            r"absent: unknown block 'layer3'; did you mean .*choose from layer1, layer2",
        ),
        (
            "mobilenet_v2",
            {"absent": ("head",)},
            r"absent: unknown block 'head'; choose from bottleneck1",
        ),
        (
            "mobilenet_v2",
            {"absent": ("bottleneck2",)},
            r"absent: bottleneck2 cannot be left out: .* no residual connection",
        ),
        (
            "mobilenet_v2",
            {"widths": {"bottleneck2/project": 7}},
            r"^bottleneck3/project: its 8 features are added to 7 of the block's input",
        ),
        (
            "resnet",
            {"widths": {"conv2_1/conv2": 1}},  # would be broadcast
            r"^conv2_1/conv2: its 1 features are added to 8 of the block's input",
        ),
        (
            "mobilenet_v2",
            {"widths": {"bottleneck2/depthwise": 47}},
            r"^bottleneck2/depthwise: 47 features do not divide into groups=48: a depthwise",
        ),
        (
            "mobilenet_v2",
            {"widths": {"classifier": 10}},
            r"widths: classifier must have 1000 features, not 10",
        ),
        (
            "mobilenet_v3",
            {"widths": {"bottleneck1/squeeze_excite/expand": 1}},
            r"squeeze_excite/expand must have 24 features, not 1",
        ),
        (
            "shufflenet",
            {"widths": {"stage2_1/reduce": 5}},
            r"^stage2_1/reduce: 5 features do not shuffle into groups = 2",
        ),
        (
            "squeezebert",
            {"widths": {"layer1/ffn_in": 63}},
            r"^layer1/ffn_in: 63 features do not divide into groups=4",
        ),
        (
            "bert",
            {"widths": {"layer1/attention/query": 28}},
            r"queries have 28 features and keys 32",
        ),
        (
            "bert",
            {
                "widths": dict.fromkeys(
                    ["layer1/attention/query", "layer1/attention/key"], 30
                )
            },
            r"30 features do not divide into heads=4",
        ),
        (
            "bert",
            {"widths": {"layer1/ffn_out": 31}},
            r"^layer1/ffn_out: its 31 features are added to 32",
        ),
        (
            "bert",
            {"widths": {"layer1/ffn_in": 0}},
            r"'layer1/ffn_in'\] = 0 should be at least 1",
        ),
        ("bert", {"absent": ("layer1", "layer1")}, "absent: layer1 is named twice"),
    ],
)
def test_what_does_not_fit_is_named(name, shape, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(built(name, **shape).init, jax.random.key(0), batch(name))


def test_fine_tuning_goes_on_with_the_shape_of_the_discriminator():
    module = registry.load("squeeze_jax.models", "electra_pretraining")
    widths = {"discriminator/layer1/ffn_in": 9, "generator/layer1/ffn_in": 5}
    shape = {"widths": widths, "absent": ("discriminator/layer2",)}
    options = {"variant": "toy", **shape}
    own, part = module.fine_tuned(options)
    assert own["widths"] == {"layer1/ffn_in": 9}
    assert own["absent"] == ("layer2",)
    x = batch("electra")
    net = models.make("electra_pretraining", **options)
    variables = shapes(net, x)
    like = shapes(models.make(**own), x)
    assert tree.differences(like, part(variables)) == []


def test_a_network_of_another_shape_has_no_folder(tmp_path):
    net = built("bert", widths={"layer1/ffn_in": 7})
    with pytest.raises(UserError, match="no changed widths or absent layers"):
        models.save(tmp_path, net, {})


def test_a_reshaped_network_inside_another_one():
    import flax.linen as nn

    class Outer(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.backbone(x)[1]["head"]

    net = Outer(built("mobilenet_v2", widths={"head": 9}))
    found, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), IMAGE)
    assert found.shape[-1] == 9
    inside = variables["params"]["backbone"]["head"]["kernel"].shape
    assert inside[-1] == 9
    assert jnp.issubdtype(found.dtype, jnp.floating)
