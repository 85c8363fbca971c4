"""Contracts of every encoder of text, and what their options promise; test_models.py has the networks of images."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from squeeze_jax import models, registry, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.runnable import specs
from squeeze_jax.models import squeezebert
from squeeze_jax.nn.attention import Groups, SelfAttention, attend, shuffled
from squeeze_jax.nn.composite import whole
from squeeze_jax.nn.conv import apart, lowering
from squeeze_jax.nn.embed import Embed, Embeddings

MODELS = "squeeze_jax.models"
# (parameters, MACs in billions at 128 tokens), counted by PyTorch's own counter on the classes of `transformers`: the
# encoder with its pooler, without a head.
PUBLISHED = {
    ("albert", "base"): (11_683_584, 11.1868),
    ("albert", "large"): (17_683_968, 39.4778),
    ("albert", "xlarge"): (58_724_864, 156.2672),
    ("albert", "xxlarge"): (222_595_584, 310.9321),
    ("bert", "base"): (109_482_240, 11.1742),
    ("bert", "large"): (335_141_888, 39.4611),
    ("bert", "medium"): (41_373_184, 3.3557),
    ("bert", "mini"): (11_170_560, 0.4363),
    ("bert", "small"): (28_763_648, 1.6780),
    ("bert", "tiny"): (4_385_920, 0.0587),
    ("bert", "tinybert4"): (14_350_248, 0.6237),
    ("bert", "tinybert6"): (66_955_008, 5.5874),
    ("distilbert", "base"): (66_362_880, 5.5868),
    ("electra", "base"): (108_891_648, 11.1736),
    ("electra", "base_generator"): (33_511_168, 1.3338),
    ("electra", "large"): (334_092_288, 39.4600),
    ("electra", "large_generator"): (50_999_552, 2.6508),
    ("electra", "small"): (13_483_008, 1.3128),
    ("electra", "small_generator"): (4_580_928, 0.1017),
    ("gpt2", "large"): (774_030_080, 92.1069),
    ("gpt2", "medium"): (354_823_168, 39.4600),
    ("gpt2", "small"): (124_439_808, 11.1736),
    ("gpt2", "xl"): (1_557_611_200, 191.2603),
    ("mobilebert", "base"): (24_844_544, 2.6930),
    # By hand from 2004.02984, Table 1: 293 million in its last row, which leaves the pooler out.
    ("mobilebert", "teacher"): (294_467_840, 37.8748),
    ("mobilebert", "tiny"): (15_748_352, 1.5354),
    ("roberta", "base"): (124_645_632, 11.1742),
    ("roberta", "large"): (355_359_744, 39.4611),
    ("squeezebert", "base"): (51_089_664, 3.7000),
    ("squeezebert", "released"): (51_094_272, 3.7000),
}
NAMES = [
    name
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
]
ALL = [
    (name, variant)
    for name in NAMES
    for variant in registry.load(MODELS, name).VARIANTS
    if variant != "toy"
]
TASKS = {
    name: list(registry.load(MODELS, name).make.__annotations__["task"].__args__)
    for name in NAMES
}
LENGTH = 11
# Quick to compile: the numbers are the same to rounding, and here compiling takes all the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes(length):
    x = {"tokens": jnp.int32, "segments": jnp.int32, "mask": jnp.bool_}
    return {key: jax.ShapeDtypeStruct((1, length), dtype) for key, dtype in x.items()}


def batch(*shape):
    """Real tokens in two segments."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, (*shape, LENGTH)).astype(np.int32)
    segments = np.broadcast_to(np.arange(LENGTH) > 4, tokens.shape).astype(np.int32)
    return {"tokens": tokens, "segments": segments}


def toy(name, *, layers=1, task="classification", **options):
    return models.make(name, variant="toy", layers=layers, task=task, **options)


def filled(net):
    """Variables of noise: quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)
    x = batch(1, 1) if net.task == "choice" else batch(1)
    like = jax.eval_shape(net.init, jax.random.key(0), x)

    def noise(a):
        return rng.normal(0, 0.2, a.shape).astype(np.float32)

    return tree.map_named(lambda name, a: noise(a) + name.endswith("/scale"), like)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_parameters_and_macs_are_the_published_ones(name, variant):
    def counted(layers):
        net = models.make(name, variant=variant, task="features", layers=layers)
        macs = count.macs(net, shapes(128))
        assert macs.unknown == ()
        return np.array([count.parameters(net, shapes(128)), macs.total])

    layers = models.make(name, variant=variant).row.layers
    if variant == "base":
        parameters, macs = counted(layers)
    else:
        # Layers are alike, which `base` shows: two tell of all, and are quicker to trace.
        one, two = counted(1), counted(2)
        parameters, macs = one + (layers - 1) * (two - one)
    assert (parameters, round(macs / 1e9, 4)) == PUBLISHED[name, variant]


def trained():
    """(name, task, whether it is the first) of what is trained: all heads, those of pretraining at once."""
    for name, tasks in TASKS.items():
        left = {"features"}
        if "pretraining" in tasks:
            left |= {"masked_lm", "next_sentence"}
        tasks = [task for task in tasks if task not in left]
        yield from ((name, task, task == tasks[0]) for task in tasks)


@pytest.mark.parametrize(("name", "task", "whole"), list(trained()))
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name, task, whole):
    net = toy(name, task=task, num_classes=3)
    x = batch(2, 3) if task == "choice" else batch(6)
    params = filled(net)["params"]
    # The rest is the same for all heads, and takes the time.
    part = {k: v for k, v in params.items() if whole or k in ("head", "pooler")}

    @jit
    def gradient(part):
        def loss(part):
            logits, _ = net.apply({"params": params | part}, x)

            # A fixed weight for each logit, so that none cancel.
            def weigh(a):
                return (a * jnp.sin(jnp.arange(a.size)).reshape(a.shape)).sum()

            return sum(jax.tree.leaves(jax.tree.map(weigh, logits)))

        return jax.grad(loss)(part)

    for key, g in tree.flatten(gradient(part)).items():
        assert np.isfinite(g).all(), key
        # Adding the same to all keys changes no probability.
        assert np.any(g) or key.endswith("key/bias"), key


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inside_gives_float32_logits(name):
    full, half = (toy(name, dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables, x = filled(full), batch(3)
    both = jit(lambda v: [net.apply(v, x) for net in (full, half)])
    (logits, endpoints), (rounded, rounded_endpoints) = both(variables)
    assert logits.dtype == rounded.dtype == jnp.float32
    assert endpoints["layer1"].dtype == jnp.float32
    assert rounded_endpoints["layer1"].dtype == jnp.bfloat16
    # Eight bits of mantissa.
    scale = float(jnp.abs(logits).max())
    assert scale > 0.1
    np.testing.assert_allclose(rounded, logits, atol=0.05 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_toys_are_small(name):
    assert count.parameters(models.make(name, variant="toy"), shapes(8)) < 25_000


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variants_and_options_are_named(name):
    with pytest.raises(UserError, match=rf"unknown variant of {name} 'tyo'.*'toy'"):
        models.make(name, variant="tyo")
    with pytest.raises(UserError, match=r"config\.model\.num_clases.*'num_classes'"):
        models.make(name, num_clases=10)
    with pytest.raises(UserError, match=r"config\.model\.task = 'spam'.*'span'"):
        models.make(name, task="spam")
    with pytest.raises(UserError, match=r"unknown activation 'gelo'.*'gelu'"):
        models.make(name, activation="gelo")
    with pytest.raises(UserError, match=r"= \d+ .*do not divide into heads = 7"):
        models.make(name, heads=7)
    with pytest.raises(UserError, match="layers = 0: should be a positive number"):
        models.make(name, layers=0)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_do_not_fit_are_named(name):
    def run(x, **o):
        return jax.eval_shape(partial(toy(name, **o).init, jax.random.key(0)), x)

    longer = np.zeros((1, 41), np.int32)
    with pytest.raises(UserError, match="of 41 tokens are longer than the 40 pos"):
        run({"tokens": longer})
    with pytest.raises(UserError, match="called with a mapping"):
        run(longer)
    with pytest.raises(UserError, match=r"tokens should be \[b, choices, l\], .*1, 41"):
        run({"tokens": longer}, task="choice")
    with pytest.raises(UserError, match=r"mask has the shape \(1, 40\), tokens have"):
        run({"tokens": longer, "mask": longer[:, 1:]})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_is_real_and_of_the_first_segment(name):
    net = toy(name)
    variables, x = filled(net), batch(2)
    run = jit(lambda x: net.apply(variables, x)[0])
    ones = np.ones((2, LENGTH), bool)
    given = {"tokens": x["tokens"], "segments": 0 * x["segments"], "mask": ones}
    bare = run({"tokens": x["tokens"]})
    np.testing.assert_allclose(bare, run(given), atol=1e-6)
    assert (np.abs(bare - run(x)).max() > 1e-3) == (net.row.segments > 1)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    # MobileBERT reads the neighbours of a token before attention, real or not.
    options = {"trigram": False} if name == "mobilebert" else {}
    net = toy(name, task="tokens", **options)
    variables, x = filled(net), batch(2)
    x["mask"] = np.ones((2, LENGTH), bool)
    run = jit(lambda x: net.apply(variables, x)[0])
    padded = {key: np.pad(array, ((0, 0), (0, 5))) for key, array in x.items()}
    padded["tokens"][:, LENGTH:] = 7
    np.testing.assert_allclose(run(padded)[:, :LENGTH], run(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_alone(name):
    # Any of the rates by itself.
    x = batch(2)
    rates = ("dropout", "attention_dropout", "head_dropout")
    nets = [toy(name, **dict.fromkeys(rates, 0.0) | {rate: 0.5}) for rate in rates]
    variables = filled(nets[0])

    @jit
    def run(key):
        rngs = {"dropout": key}
        train = [net.apply(variables, x, train=True, rngs=rngs)[0] for net in nets]
        return train, [net.apply(variables, x)[0] for net in nets[:2]]

    train, (test, other) = run(jax.random.key(0))
    np.testing.assert_array_equal(test, other)
    for one in train:
        assert np.abs(one - test).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_encoder_has_one_operation_for_gelu_and_for_a_lookup(name):
    net = toy(name, dropout=0.0, activation="gelu")
    variables, x = filled(net), batch(1)["tokens"]

    def fn(x):
        tokens = x["tokens"]
        with lowering("native"):
            return net.apply(variables, {"tokens": tokens, "mask": tokens > 3})[0]

    from ai_edge_litert.interpreter import Interpreter

    with whole():
        content = tflite.convert(fn, specs({"tokens": x[0]}))[tflite.SUFFIX]
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    found = collections.Counter(o["op_name"] for o in interpreter._get_ops_details())
    groups = 4 if name == "squeezebert" else 1  # each by itself
    assert found["SOFTMAX"] == groups
    # Those of ELECTRA's classifier and of MobileBERT's second feed-forward network.
    assert found["GELU"] == groups + (name in ("electra", "mobilebert"))
    assert found["EMBEDDING_LOOKUP"] == 1 + (name == "roberta")  # its positions
    more = {"albert": 1, "electra": 1, "mobilebert": 6}  # between other channels
    assert found["CONV_2D"] == 1 + 5 * groups + more.get(name, 0)
    # What GELU and the lookup would be made of.
    assert not found.keys() & {"EXP", "SIGN", "DIV", "SELECT", "GATHER", "GATHER_ND"}
    (entry,), (exit_,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.set_tensor(entry["index"], x.astype(np.int32))
    interpreter.invoke()
    expected = net.apply(variables, {"tokens": x, "mask": x > 3})[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        interpreter.get_tensor(exit_["index"]), expected, atol=1e-4 * scale
    )


@pytest.mark.parametrize(
    ("groups", "shuffle"),
    [
        (4, False),
        (4, True),
        ({}, False),  # the paper's: a dense layer after attention
        ({"query": 2}, False),  # heads are no longer apart
        ({"ffn_in": 2, "output": 8}, True),
        ({"query": 1, "key": 1, "value": 1}, False),
    ],
)
def test_groups_apart_compute_the_same(groups, shuffle):
    """To the rounding of sums in another order, also what attention gives."""
    net = toy("squeezebert", groups=groups, shuffle=shuffle, dropout=0.0)
    variables, x = filled(net), batch(2) | {"mask": batch(2)["tokens"] > 9}

    def traced(x):
        with lowering("native"):
            return net.apply(variables, x)

    def convolutions(x):
        return str(jax.make_jaxpr(traced)(x)).count("conv_general_dilated[")

    expected, plain = jax.jit(traced)(x), convolutions(x)
    with apart():
        found, split = jax.jit(traced)(x), convolutions(x)
    assert split > plain
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_encoder_runs_on_any_batch_and_platform(name):
    net = toy(name, dropout=0.0)
    variables, x = filled(net), batch(2)["tokens"]

    @jax.jit
    def fn(tokens):
        with lowering("native"):
            return net.apply(variables, {"tokens": tokens, "mask": tokens > 3})[0]

    (size,) = export.symbolic_shape("b")
    tokens = jax.ShapeDtypeStruct((size, LENGTH), np.int32)
    content = export.export(fn, platforms=("cpu", "cuda", "tpu"))(tokens).serialize()
    found = export.deserialize(content).call(x)
    np.testing.assert_allclose(found, fn(x), atol=1e-5)


def test_derivatives_are_those_of_the_operations_also_where_they_are_one():
    table = jnp.arange(8.0).reshape(4, 2) / 8
    embed = Embed(4, 2)

    def loss(table):
        x = embed.apply({"params": {"embedding": table}}, jnp.array([[1, 3]]))
        return (registry.load("squeeze_jax.nn", "activations").gelu(x) ** 2).sum()

    expected = jax.grad(loss)(table)
    with whole():
        text = str(jax.make_jaxpr(loss)(table))
        found = jit(jax.grad(loss))(table)
    assert text.count("name=aten.gelu.default") == 1
    assert text.count("name=odml.embedding_lookup") == 1
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not found[0].any()
    assert found[3].all()


class TestBert:
    def test_weights_begin_as_published(self):
        # Normal with 0.02, cut at two standard deviations: section A.2's code.
        net = toy("bert", task="masked_lm")
        params = jit(net.init)(jax.random.key(0), batch(1))["params"]
        for name, leaf in tree.flatten(params).items():
            if name.endswith("bias"):
                assert not leaf.any(), name
            elif name.endswith("scale"):
                assert (leaf == 1).all(), name
            else:
                assert np.abs(leaf).max() <= 0.04, name
                # sqrt(1 - 2 * 2 * phi(2) / (Phi(2) - Phi(-2))) = 0.8796
                assert leaf.std() == pytest.approx(0.02 * 0.8796, rel=0.2), name

    @pytest.mark.parametrize("task", ["masked_lm", "tokens", "span"])
    def test_a_task_of_tokens_has_no_pooler_unless_asked_for(self, task):
        def names(**o):
            return jax.eval_shape(
                toy("bert", task=task, **o).init, jax.random.key(0), batch(1)
            )["params"].keys()

        assert "pooler" not in names()
        assert "pooler" in names(pooler=True)

    def test_a_task_of_sequences_needs_a_pooler(self):
        with pytest.raises(UserError, match="'classification' reads the pooled token"):
            toy("bert", pooler=False)


class TestSqueezeBert:
    def test_without_groups_it_is_bert(self):
        x, options = batch(2), dict(task="pretraining", dropout=0.0)
        theirs, ours = toy("bert", **options), toy("squeezebert", groups=1, **options)
        variables = filled(theirs)
        like = jax.eval_shape(ours.init, jax.random.key(0), x)
        assert tree.differences(variables, like) == []
        found, expected = (jit(net.apply)(variables, x) for net in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    def test_without_groups_it_costs_as_much_as_bert(self):
        net = models.make("squeezebert", groups=1, task="features")
        assert count.parameters(net, shapes(128)) == PUBLISHED["bert", "base"][0]
        assert round(count.macs(net, shapes(128)).total / 1e9, 4) == 11.1742

    def test_a_group_sees_its_own_channels_alone(self):
        # A block-diagonal kernel of the dense layer is the grouped one's.
        sparse, dense = toy("squeezebert", groups=4), toy("squeezebert", groups=1)
        params = tree.flatten(filled(sparse)["params"])
        wide = {}
        for name, leaf in params.items():
            if name.startswith("layer") and name.endswith("kernel"):
                _, i, o = leaf.shape
                wide[name] = np.zeros((1, 4 * i, o), np.float32)
                for g in range(4):
                    rows, columns = np.s_[g * i : (g + 1) * i], np.s_[g * o // 4 :]
                    columns = np.s_[g * (o // 4) : (g + 1) * (o // 4)]
                    wide[name][0, rows, columns] = leaf[0][:, columns]
        x = batch(2)

        def run(net, flat):
            leaves = jax.tree.unflatten(structure, list(flat.values()))
            return jit(net.apply)({"params": leaves}, x)[0]

        structure = jax.tree.structure(filled(dense)["params"])
        found, expected = run(sparse, params), run(dense, params | wide)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_groups_by_number_position_and_layer(self):
        def groups(g):
            return toy("squeezebert", layers=2, groups=g).groups

        paper = Groups(4, 4, 4, 1, 4, 4)
        assert groups(None) == (paper, paper)
        assert groups(2) == (Groups(2, 2, 2, 2, 2, 2),) * 2
        assert groups({"output": 8}) == (paper._replace(output=8),) * 2
        layers = groups([1, {"query": 2, "ffn_out": 8}])
        assert layers == (Groups(), Groups(2, 4, 4, 1, 4, 8))
        net = toy("squeezebert", layers=2, groups=[1, {"query": 2, "ffn_out": 8}])
        params = filled(net)["params"]

        def kernel(layer, *path):
            return tree.flatten(params[layer])["/".join(path)].shape

        assert kernel("layer1", "attention", "query", "kernel") == (1, 32, 32)
        assert kernel("layer2", "attention", "query", "kernel") == (1, 16, 32)
        assert kernel("layer2", "ffn_out", "kernel") == (1, 8, 32)

    def test_groups_that_do_not_fit_are_named(self):
        for groups, message in (
            (3, "layer 1: 32 features do not divide into groups of query = 3"),
            ([1, 64], "layer 2: 32 features .* query = 64"),
            ({"ffn_in": 24}, "32 and 64 features .* ffn_in = 24"),
            ({"querry": 4}, "unknown position in groups 'querry'.*'query'"),
            ([4, 4, 4], "2 layers need as many entries"),
            (0, "groups of query = 0: should be a positive number"),
        ):
            with pytest.raises(UserError, match=message):
                toy("squeezebert", layers=2, groups=groups)

    def test_a_shuffle_is_nothing_to_a_dense_layer(self):
        for groups in (None, 1, {"query": 2}):
            options = dict(groups=groups, dropout=0.0)
            one, two = (toy("squeezebert", shuffle=s, **options) for s in (False, True))
            variables, x = filled(one), batch(2)
            found, expected = (jit(net.apply)(variables, x) for net in (two, one))
            jax.tree.map(np.testing.assert_array_equal, found, expected)

    def test_a_shuffle_by_hand(self):
        x = jnp.arange(12).reshape(1, 1, 12)  # of two groups, for three
        expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
        assert shuffled(x, 2, 3)[0, 0].tolist() == expected

    def test_a_shuffle_lets_groups_see_each_other(self):
        """In one layer without other mixing: a change of the first group's values reaches the others' outputs, or not."""
        x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype("f")
        other = x.copy()
        other[..., :8] += 1
        reached = {}
        for shuffle in (False, True):
            net = SelfAttention(4, Groups(4, 4, 4, 4), shuffle=shuffle)
            variables = net.init(jax.random.key(0), x)
            one, two = (net.apply(variables, y)[0] for y in (x, other))
            moved = np.abs(one - two).max((0, 1)).reshape(4, 8).max(1)
            reached[shuffle] = (moved > 1e-6).tolist()
        assert reached == {False: [True, False, False, False], True: [True] * 4}

    def test_counts_of_a_shuffled_layer_after_attention(self):
        """Of 12 layers 768² (1 - 1/4) weights and as many MACs a token are saved."""
        saved = 12 * 768 * 768 * 3 // 4
        paper = models.make("squeezebert", task="features")
        net = models.make("squeezebert", groups=4, shuffle=True, task="features")
        x = shapes(128)
        assert count.parameters(paper, x) - count.parameters(net, x) == saved
        macs = count.macs(paper, x).total - count.macs(net, x).total
        assert macs == 128 * saved

    def test_a_shuffle_that_does_not_fit_is_named(self):
        with pytest.raises(UserError, match="32 features of 8 groups do not shuffle"):
            toy("squeezebert", groups=8, shuffle=True)
        with pytest.raises(UserError, match="does not shuffle channels"):
            squeezebert.to_huggingface(toy("squeezebert", groups=4, shuffle=True))


class TestMobileBert:
    def test_two_feed_forward_networks_cost_what_is_published(self):
        net = models.make("mobilebert", stacks=2, task="features")
        assert count.parameters(net, shapes(128)) == 18_510_080
        assert round(count.macs(net, shapes(128)).total / 1e9, 4) == 1.8877

    def test_a_token_sees_its_neighbours_before_attention(self):
        net = toy("mobilebert", layers=1)
        variables, x = filled(net), batch(1)
        other = x["tokens"].copy()
        other[0, 4] += 1
        run = jit(lambda t: net.apply(variables, {"tokens": t})[1]["embeddings"])
        changed = np.abs(run(other) - run(x["tokens"])).max(-1)[0] > 0
        assert np.flatnonzero(changed).tolist() == [3, 4, 5]

    def test_what_is_distilled_is_as_wide_as_the_teachers(self):
        def endpoints(variant):
            net = models.make("mobilebert", variant=variant, layers=2)
            run = partial(net.init_with_output, jax.random.key(0))
            return jax.eval_shape(run, shapes(8))[0][1]

        wide, narrow = endpoints("teacher"), endpoints("base")
        assert wide == narrow
        assert narrow["layer2"].shape == (1, 8, 512)
        assert narrow["attention2"].shape == narrow["scores2"].shape == (1, 4, 8, 8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"embedding_features": 64}, "embedding_features = 64: should be at most"),
            ({"stacks": 0}, "stacks = 0: should be a positive number"),
            ({"attention_input": "wid"}, r"attention_input = 'wid' .*one of 'shared'"),
        ],
    )
    def test_options_that_do_not_fit_are_named(self, options, message):
        with pytest.raises(UserError, match=message):
            toy("mobilebert", **options)


class TestGpt2:
    def test_no_position_sees_a_later_one(self):
        net = toy("gpt2", task="causal_lm", layers=2)
        variables, x = filled(net), batch(1)["tokens"]
        other = x.copy()
        other[0, 6] += 1
        run = jit(lambda tokens: net.apply(variables, {"tokens": tokens})[0])
        changed = np.abs(run(other) - run(x)).max(-1)[0] > 0
        assert np.flatnonzero(changed).tolist() == list(range(6, LENGTH))

    def test_a_sequence_is_classified_by_its_last_real_token(self):
        net = toy("gpt2", num_classes=3)
        variables, x = filled(net), batch(2)["tokens"]
        run = jit(lambda x: net.apply(variables, x))
        logits, endpoints = run({"tokens": x})
        np.testing.assert_array_equal(endpoints["pooled"].shape, (2, 32))
        padded = np.pad(x, ((0, 0), (0, 5)), constant_values=7)
        mask = np.broadcast_to(np.arange(LENGTH + 5) < LENGTH, padded.shape)
        found, _ = run({"tokens": padded, "mask": mask})
        np.testing.assert_allclose(found, logits, atol=1e-5)
        assert np.abs(run({"tokens": padded})[0] - logits).max() > 1e-3

    def test_residuals_begin_smaller_the_more_there_are(self):
        # By one over the square root of their number: section 2.3.
        net = toy("gpt2", layers=2, task="features")
        params = tree.flatten(jit(net.init)(jax.random.key(0), batch(1))["params"])
        for layer in ("attention/output", "ffn_out"):
            kernel = params[f"layer1/{layer}/kernel"]
            assert kernel.std() == pytest.approx(0.02 / 2, rel=0.1)
        assert params["layer1/ffn_in/kernel"].std() == pytest.approx(0.02, rel=0.1)


class TestAttention:
    def test_by_hand(self):
        # Two heads of one channel. Head 1: scores 0 and ln 3, so 1/4 and 3/4. Head 2: scores 0, so the mean.
        query = jnp.array([[[1.0, 0.0]]]).repeat(2, 1)
        key = jnp.array([[[0.0, 5.0], [np.log(3.0), 7.0]]])
        value = jnp.array([[[4.0, 10.0], [8.0, 20.0]]])
        found = attend(query, key, value, heads=2)
        np.testing.assert_allclose(found.context[0, 0], [7, 15], rtol=1e-6)
        np.testing.assert_allclose(
            found.probabilities[0, 0, 0], [0.25, 0.75], rtol=1e-6
        )
        np.testing.assert_allclose(found.scores[0, 0, 0], [0, np.log(3)], rtol=1e-6)

    def test_what_may_not_be_seen_has_no_part(self):
        rng = np.random.default_rng(0)
        q, k, v = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
        mask = np.arange(5) < np.array([[5], [0]])
        found = attend(q, k, v, heads=2, mask=mask, causal=True)
        expected = np.broadcast_to(np.tri(5) > 0, (2, 5, 5))
        np.testing.assert_array_equal(found.probabilities[0] > 0, expected)
        # A sequence of padding alone: all alike, and no nan.
        np.testing.assert_allclose(found.probabilities[1], 0.2, rtol=1e-6)


class TestEmbeddings:
    tokens = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    positions = 10 * np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    segments = 100 * np.array([[1, 2], [3, 4]], np.float32)

    def run(self, *args, method="__call__", **options):
        net = Embeddings(4, 2, 3, epsilon=None, **options)
        tables = {"tokens": self.tokens, "positions": self.positions}
        if net.segments:
            tables["segments"] = self.segments
        params = {name: {"embedding": table} for name, table in tables.items()}
        return net.apply({"params": params}, *args, method=method).tolist()

    def test_a_sum_of_rows(self):
        ids = jnp.array([[3, 0]])
        expected = [[[6 + 10 + 100, 7 + 20 + 200], [0 + 30 + 300, 1 + 40 + 400]]]
        assert self.run(ids, jnp.array([[0, 1]])) == expected
        assert self.run(ids, segments=0) == [[[16, 27], [30, 41]]]

    def test_positions_may_be_given(self):
        def given(net, ids, at):
            return net(ids, at=at)

        found = self.run(
            jnp.array([[3, 0]]), jnp.array([[2, 0]]), method=given, segments=0
        )
        assert found == [[[6 + 50, 7 + 60], [0 + 10, 1 + 20]]]

    def test_an_index_beyond_the_table_means_its_last_row(self):
        assert self.run(jnp.array([[9]]), segments=0) == [[[6 + 10, 7 + 20]]]

    def test_scores_are_products_with_every_row(self):
        found = self.run(jnp.array([[[1.0, 10.0]]]), method="scores")
        assert found == [[[0 + 10, 2 + 30, 4 + 50, 6 + 70]]]
