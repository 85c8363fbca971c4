"""The space of SqueezeBERTs: counts, weights of sub-networks, gradients, sorted heads, and an extracted work directory."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import run as run_py
from squeeze_jax import models, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _plugs, _workdir, fit
from squeeze_jax.methods import Own
from squeeze_jax.models.elastic_squeezebert import GROUPS
from squeeze_jax.nas import costs, once_for_all, sandwich, sort_channels, space
from squeeze_jax.nas.family import Family
from squeeze_jax.nn.attention import Groups, shuffle_channels
from squeeze_jax.nn.chain import Chain, Classifier, Piece
from squeeze_jax.train import step as training_step
from squeeze_jax.train.state import State

NAME = "elastic_squeezebert"
TINY = dict(name=NAME, variant="tiny", num_classes=3, dropout=0.0, attention_dropout=0.0)  # fmt: skip
POSITIONS = tuple(f"{position}_groups" for position in Groups._fields)
PAPER = dict(zip(POSITIONS, (4, 4, 4, 1, 4, 4), strict=True))
FAST = dict(zip(POSITIONS, (3, 3, 4, 4, 4, 4), strict=True)) | dict(shuffle=True)
LENGTH = 7


def tokens(rows, length):
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "attended": jnp.bool_}
    return {k: jax.ShapeDtypeStruct((rows, length), d) for k, d in kinds.items()}


def batch(rows=2):
    rng = np.random.default_rng(1)
    real = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (rows, 1))
    ids = rng.integers(0, 99, (rows, LENGTH))
    return {"tokens": ids, "segments": 1 * (ids > 50), "attended": real}


def family_of(**options):
    return Family(TINY | options, _plugs.plain(tokens(2, LENGTH)))


def filled(shapes):
    rng = np.random.default_rng(0)

    def noise(name, a):
        array = rng.normal(0, 0.3, a.shape).astype(np.float32)
        return array + name.endswith("/scale")

    return tree.map_named(noise, shapes)


def archs(family, number):
    keys = jax.random.split(jax.random.key(7), number)
    return [jax.device_get(space.sample(family.space, key)) for key in keys]


# (parameters, MACs in billions at 128 tokens), counted by PyTorch on `BertModel` and `SqueezeBertModel`; the last row by
# hand: a layer has 768**2 * (2 / 3 + 2 / 4) + 2 * 768 * 1536 / 4 = 1,277,952 weights and 11 * 768 = 8,448 biases and scales,
# and its attention 2 * 128 * 768 MACs a token. Embeddings 31,036 * 768 + 1,536 = 23,837,184, pooler 590,592.
COUNTS = {
    "largest": ({}, 109_482_240, 11.1742),
    "paper": (PAPER, 51_089_664, 3.7000),
    "fast": (FAST | dict(ffn=1536), 39_864_576, 2.2655),
}


@pytest.mark.parametrize("row", COUNTS)
def test_published_counts(row):
    options, parameters, macs = COUNTS[row]
    net = models.make(NAME, task="features", **options)
    shapes = jax.eval_shape(net.init, jax.random.key(0), tokens(1, 128))
    assert tree.size(shapes) == parameters
    total = count.macs(net.apply, shapes, tokens(1, 128)).total
    assert round(total / 1e9, 4) == macs


@pytest.mark.parametrize("task", ["classification", "tokens", "span"])
def test_a_network_with_the_papers_groups_is_squeezebert(task):
    """The same parameters under the same names, and the same outputs and endpoints to the bit."""
    ours = models.make(**TINY, **PAPER, task=task)
    sizes = dict(layers=2, features=24, heads=2, ffn_features=48, positions=64)
    theirs = models.make(
        "squeezebert", num_classes=3, vocabulary=99, task=task, **sizes
    )
    shapes = [
        jax.eval_shape(n.init, jax.random.key(0), batch()) for n in (ours, theirs)
    ]
    assert tree.differences(*shapes) == []
    variables = filled(shapes[0])
    found, expected = (jax.jit(n.apply)(variables, batch()) for n in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_variant_that_was_found_by_hand_is_in_the_space():
    """`configs/glue_squeezebert.py` with the groups, the shuffle and the width that `squeezebert_general.py` reports."""
    path = pathlib.Path(__file__).parents[1] / "configs" / "glue_squeezebert.py"
    config = run_py.load_config(path)["model"]
    groups = dict(zip(Groups._fields, (3, 3, 4, 4, 4, 4), strict=True))
    config |= dict(ffn_features=768, groups=groups, shuffle=True, vocabulary=99)
    theirs = models.make(**config)
    ours = models.make(NAME, variant="small", ffn=768, vocabulary=99, **FAST)
    shapes = [
        jax.eval_shape(n.init, jax.random.key(0), batch()) for n in (ours, theirs)
    ]
    assert tree.differences(*shapes) == []
    variables = filled(shapes[0])
    found, expected = (jax.jit(n.apply)(variables, batch())[0] for n in (ours, theirs))
    np.testing.assert_array_equal(found, expected)


def masked(params, options, shuffle):
    """The largest network's parameters with zeros wherever a smaller network has no weight, as NumPy masks by hand.

    Of two heads of 12 channels the first remains; of 48 hidden channels the first two of every four.
    """
    masks = {}
    for place, layer in enumerate(("layer1", "layer2")):
        g = Groups(*(options[name][place] for name in POSITIONS))
        heads = np.arange(24) < 12 * options["heads"][place]
        ffn = np.arange(48) % 4 < options["ffn"][place] // 12
        whole = np.ones(24, bool)

        def group_of(remaining, groups):  # the group of each remaining channel
            return (np.cumsum(remaining) - 1) * groups // remaining.sum()

        reads = group_of(heads, g.output)
        if shuffle and g.output > 1:  # channels of the values, in their new order
            order = shuffle_channels(np.flatnonzero(heads), g.value, g.output)
            reads = np.zeros(24, int)
            reads[order] = np.arange(heads.sum()) * g.output // heads.sum()
        for name, (ins, in_group), (outs, out_group) in (
            ("attention/query", (whole, group_of(whole, g.query)), (heads, group_of(heads, g.query))),
            ("attention/key", (whole, group_of(whole, g.key)), (heads, group_of(heads, g.key))),
            ("attention/value", (whole, group_of(whole, g.value)), (heads, group_of(heads, g.value))),
            ("attention/output", (heads, reads), (whole, group_of(whole, g.output))),
            ("ffn_in", (whole, group_of(whole, g.ffn_in)), (ffn, group_of(ffn, g.ffn_in))),
            ("ffn_out", (ffn, group_of(ffn, g.ffn_out)), (whole, group_of(whole, g.ffn_out))),
        ):  # fmt: skip
            mask = (in_group[:, None] == out_group) & ins[:, None] & outs
            masks[f"{layer}/{name}/kernel"] = mask
    return tree.map_named(lambda name, a: a * masks.get(name, 1), params)


@pytest.mark.parametrize("shuffle", [False, True], ids=["plain", "shuffled"])
def test_a_smaller_network_is_the_largest_one_with_zeros(shuffle):
    """Grouped layers equal dense layers with block-diagonal kernels, and absent heads and hidden channels weigh nothing."""
    family = family_of(shuffle=shuffle)
    variables = filled(family.shapes(family.holder()))
    holder = jax.jit(family.holder().apply)
    for arch in archs(family, 5):
        arch = arch._replace(depth=family.space.largest().depth)
        options, small = family.extract(arch, variables)
        apply = models.make(**options).apply
        params = masked(variables["params"], options, shuffle)
        expected = holder({"params": params}, batch())[0]
        found = jax.jit(apply)(small, batch())[0]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_shuffle_whose_groups_do_not_divide_the_channels():
    """12 channels of three groups of 4, into three groups: 0 4 8 1 | 5 9 2 6 | 10 3 7 11."""
    found = shuffle_channels(np.arange(12), 3, 3)
    assert found.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_weights_of_narrower_layers_are_inside_those_of_wider_ones():
    """With as many groups in both: number the weights of the largest network, and take them for two networks."""
    family = family_of()
    shapes = family.shapes(family.holder())
    numbered = tree.map_named(lambda n, a: np.arange(1.0, a.size + 1).reshape(a.shape), shapes)  # fmt: skip
    for groups in GROUPS:
        fixed = dict(ffn_in_groups=groups, ffn_out_groups=groups)
        wide, narrow = (
            family.extract(family.space.arch(fixed | dict(ffn=ffn)), numbered)[1]
            for ffn in (48, 24)
        )
        for layer in "ffn_in", "ffn_out":
            kernels = [v["params"]["layer1"][layer]["kernel"] for v in (wide, narrow)]
            assert kernels[1].size == 24 * 24 // groups
            assert set(kernels[1].ravel()) < set(kernels[0].ravel())


def loss(logits, endpoints, batch):
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return each.mean() + (endpoints["layer1"] ** 2).mean() + endpoints["attention2"].std(), {}  # fmt: skip


def test_the_gradient_is_the_sum_over_the_networks():
    """By `jax.grad` through the extracted networks, which are built and run whole; two layers share weights, and the loss
    reads endpoints."""
    options = dict(distinct=1)
    family = family_of(**options)
    variables = filled(family.shapes(family.holder()))
    plain = _plugs.plain(tokens(2, LENGTH))
    bound = once_for_all.make(random=1).bind(TINY | options, plain)
    caught = []

    def catch(passes, params, stats, batch, own):
        caught.append(passes)
        return jax.tree.map(jnp.zeros_like, params), stats, {"loss": jnp.float32(0)}

    def inputs(batch):
        return {k: batch[k] for k in ("tokens", "segments", "attended")}

    named = training_step.Named("once_for_all", bound._replace(compute=catch))
    run = training_step.make(family.holder(), optax.sgd(0.1), loss, gradients=named, inputs=inputs)  # fmt: skip
    x = batch() | dict(label=np.array([0, 2]), mask=np.ones(2, bool))
    run(run.init(jax.random.key(0), x), x, jax.random.key(0))
    key, stats = jax.random.key(5), {"batch_stats": {}, "extra": {}, "step": jnp.int32(0)}  # fmt: skip
    own = Own({}, None, key, jnp.int32(0), True)
    grads, _, metrics = bound.compute(caught[0], variables["params"], stats, x, own)
    drawn = space.sample(family.space, jax.random.split(jax.random.fold_in(key, 1), 1)[0])  # fmt: skip

    def run_network(params, arch):
        options, small = family.extract(jax.device_get(arch), {"params": params})
        return models.make(**options).apply(small, batch())

    def by_hand(params, soft):
        logits, endpoints = run_network(params, family.space.largest())
        total = loss(logits, endpoints, x)[0]
        for arch in (family.space.smallest(), drawn):
            log_q = jax.nn.log_softmax(run_network(params, arch)[0])
            total += -jnp.sum(soft * log_q, -1).mean()
        return total

    largest = family.space.largest()
    soft = jax.nn.softmax(run_network(variables["params"], largest)[0])
    expected = tree.flatten(jax.jit(jax.grad(by_hand))(variables["params"], soft))
    assert tree.differences(variables["params"], grads) == []
    for name, value in tree.flatten(grads).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
        assert np.any(value) or name.endswith("key/bias")
    assert set(metrics) == {"loss", "smallest", "random"}


def test_layers_that_share_their_weights():
    """As a network of two layers with equal weights; the two layers have one set of elastic options."""
    shared = family_of(distinct=1)
    assert len(shared.space.choices["ffn"]) == 1
    arch = shared.space.arch(PAPER | dict(ffn=24, heads=1))
    options, variables = shared.extract(arch, filled(shared.shapes(shared.holder())))
    assert sorted(variables["params"]) == ["embeddings", "head", "layer1", "pooler"]
    twice = {k: 2 * v if k in shared.space.choices else v for k, v in options.items()}
    plain = models.make(**twice | dict(distinct=None, depth=2))
    params = variables["params"] | {"layer2": variables["params"]["layer1"]}
    found = models.make(**options).apply(variables, batch())
    expected = plain.apply({"params": params}, batch())
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    twelve = models.make(NAME, distinct=5).pieces[1:-2:8]
    # As `albert`: layer n of 12 has the weights n * 5 // 12.
    owners = [int(p.scope.partition("/")[0].removeprefix("layer")) for p in twelve]
    assert owners == [1, 1, 1, 4, 4, 6, 6, 6, 9, 9, 11, 11]


def test_a_layer_with_the_weights_of_another_module_is_named():
    net = Chain((Piece("a", Classifier(3)), Piece("b", Classifier(4), owner="a")))
    with pytest.raises(UserError, match="b uses the weights of a, but is another"):
        net.init(jax.random.key(0), np.zeros((1, 3)))


def test_macs_of_networks_are_sums_over_their_pieces():
    """Each convolution is a piece, so few programs serve all networks; the number of networks by hand."""
    choices = dict.fromkeys(POSITIONS, (1, 12))
    family = Family(TINY, _plugs.plain(tokens(2, LENGTH)), choices)
    pieces = costs.Pieces(family, tokens(1, LENGTH))
    # 2 numbers of heads, 2 widths, 2 numbers of groups of 6 convolutions.
    assert pieces.number_of_networks() == 2**8 + 2**16
    # 2 * 2 choices of each convolution; both normalisations, embeddings, pooler and head have one.
    assert len(pieces.distinct) == 6 * 4 + 5
    total = jax.jit(pieces.tabulate(costs.macs))
    for arch in (family.space.smallest(), *archs(family, 3)):
        net = family.network(arch)
        counted = count.macs(net.apply, family.shapes(net), tokens(1, LENGTH))
        assert total(arch) == counted.total


def sorted_state(variables, **keys):
    state = State(np.int32(0), variables["params"], {}, {"trace": variables["params"]})
    plain = _plugs.plain(tokens(2, LENGTH))
    return sort_channels.make(**keys).apply(TINY, state, plain)[1]


def test_sorted_heads_and_hidden_channels_compute_the_same():
    """The most important head is the first, and the most important channels are at the beginnings of 12 blocks of 4."""
    family = family_of()
    variables = filled(family.shapes(family.holder()))
    after = sorted_state(variables)
    logits = [
        family.holder().apply({"params": params}, batch())[0]
        for params in (variables["params"], after.params)
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    for layer in "layer1", "layer2":
        before, now = variables["params"][layer], after.params[layer]
        importance = np.abs(before["ffn_out"]["kernel"]).sum((0, 2))
        ranks = np.argsort(-importance)
        # Block b begins with ranks b, b + 12, b + 24, b + 36.
        order = ranks.reshape(4, 12).T.ravel()
        for name, axis in (("ffn_in", 2), ("ffn_out", 1)):
            expected = np.take(before[name]["kernel"], order, axis)
            np.testing.assert_array_equal(now[name]["kernel"], expected)
        expected = before["ffn_in"]["bias"][order]
        np.testing.assert_array_equal(now["ffn_in"]["bias"], expected)
        expected = after.opt["trace"][layer]["ffn_in"]["bias"]
        np.testing.assert_array_equal(now["ffn_in"]["bias"], expected)
        heads = np.abs(before["attention"]["output"]["kernel"][0]).reshape(2, -1).sum(1)
        first = slice(12 * heads.argmax(), 12 * heads.argmax() + 12)
        for name in "query", "key", "value":
            expected = before["attention"][name]["bias"][first]
            np.testing.assert_array_equal(now["attention"][name]["bias"][:12], expected)


def test_sorted_channels_stay_in_the_groups_of_a_trained_network():
    """What a network with groups computes stays the same, too, and so do its channels if it is narrower."""
    family = family_of()
    variables = filled(family.shapes(family.holder()))
    groups = dict(zip(POSITIONS, (2, 2, 2, 1, 4, 3), strict=True))
    for first in (groups, groups | dict(ffn=24)):
        after = sorted_state(variables, first=first)
        logits = []
        for params in variables["params"], after.params:
            arch = family.space.arch(first)
            options, small = family.extract(arch, {"params": params})
            logits.append(models.make(**options).apply(small, batch())[0])
        np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
        before = variables["params"]["layer1"]["ffn_in"]["bias"]
        assert np.any(after.params["layer1"]["ffn_in"]["bias"] != before)


def test_soft_labels_of_several_logits():
    """Of two spans with the probabilities 1/2: the cross-entropy log 2 of each."""
    logits = {"start": jnp.zeros((2, 2)), "end": jnp.ones((2, 2))}
    targets = sandwich.soft_labels(logits)
    found = sandwich.soft_cross_entropy(logits, targets, np.ones(2, bool))
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)
    one = jnp.zeros((2, 1))
    with pytest.raises(UserError, match=r"one output, .*distill = 0 and labels = 1"):
        sandwich.soft_cross_entropy(one, one, np.ones(2, bool))


def test_an_extracted_network_is_a_work_directory(tmp_path, capsys):
    """It answers texts and is exported, from the files of a table of texts on."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    rows = [f"film {'very ' * n}{w},{w}" for w in ("good", "bad") for n in range(20)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    choices = dict.fromkeys(POSITIONS, (12, 1))
    data = dict(name="texts", train=str(tmp_path / "texts.csv"), holdout=0.2)
    config = dict(
        data=data | dict(tokenizer=str(tmp_path / "vocab.txt"), length=8),
        model=dict(name=NAME, variant="tiny", dropout=0.0),
        gradients=dict(name="nas.once_for_all", random=0, choices=choices),
        optim=dict(name="adamw", lr=1e-2, warmup=0),
        steps=4,
        batch=16,
        eval_every=0,
        extract=dict(to=str(tmp_path / "small"), arch="smallest"),
        export=dict(formats=("stablehlo",)),
    )
    built = _experiment.build(_experiment.check(config))
    _workdir.begin(tmp_path / "large", built.whole.config())
    fit.run(built, tmp_path / "large")
    run_py.main(["--job=extract", f"--workdir={tmp_path / 'large'}"])
    printed = capsys.readouterr().out
    assert "ffn 24 24, query_groups 12 12" in printed
    # Embeddings (99 + 64 + 2) * 24 + 48, pooler 600, head 50; a layer has 24 * 12 * 4 / 12 + 2 * 24 * 24 / 12 weights,
    # 3 * 12 + 3 * 24 biases and 96 scales and biases of its norms.
    assert f"network    {4_008 + 650 + 192 + 108 + 96:,} parameters" in printed
    run_py.main(["--job=predict", f"--workdir={tmp_path / 'small'}", "film good", "film bad"])  # fmt: skip
    answers = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(answers) <= {"good", "bad"}
    run_py.main(["--job=export", f"--workdir={tmp_path / 'small'}"])
    assert "stablehlo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.make(**TINY, ffn=36), "ffn = 36 is not .* one of 24, 48"),
        (lambda: models.make(**TINY, query_groups=(1, 5)), r"query_groups\[1\] = 5 .* one of 12, 6, 4, 3, 2, 1"),
        (lambda: models.make(**TINY, heads=(1, 2, 2)), "heads has 3 values"),
        (lambda: models.make(**TINY, distinct=1, heads=(1, 2)), "heads has 2 values"),
        (lambda: models.make(**TINY, distinct=3), "distinct = 3: .* 1 to .* 2"),
        (lambda: models.make(**TINY, task="choice"), "task = 'choice'"),
        (lambda: models.make(**TINY, activation="gelo"), "unknown activation 'gelo'"),
        (lambda: models.make(NAME, variant="tinny"), "variant of elastic_squeezebert 'tinny'.*'tiny'"),
        (lambda: family_of(value_groups=4), r"value_groups\[0\] = 4 in the network .* but 1"),
        (lambda: family_of().space.arch({"ffn_out_groups": 8}), "ffn_out_groups = 8 .* 12, 6"),
        (lambda: held_by(dict(value_groups=2), (12, 3, 2), 3), "value/kernel: its channels or groups are not inside"),
    ],
)  # fmt: skip
def test_bad_values_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


def held_by(held, choices, groups):
    """Extracts a network whose values have some number of groups, from weights that a grouped network holds."""
    plain = _plugs.plain(tokens(2, LENGTH))
    family = Family(TINY | held, plain, {"value_groups": choices})
    arch = family.space.arch({"value_groups": groups})
    return family.extract(arch, filled(family.shapes(family.holder())))


def test_a_grouped_network_holds_the_weights_of_more_groups():
    """Of two groups of [12, 12] weights: 24 * 24 / 12 of 12 groups."""
    _, small = held_by(dict(value_groups=2), (12, 6, 4, 2), 12)
    assert small["params"]["layer1"]["attention"]["value"]["kernel"].size == 48
