"""What the options of each encoder of text promise; test_encoders.py has the contracts of all."""

import inspect
from functools import partial

import jax
import numpy as np
import pytest

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.models import squeezebert
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.conv import lowering, separate_groups

LENGTH = 11


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


class TestBert:
    def test_weights_begin_as_published(self):
        # Normal with 0.02, cut at two standard deviations: section A.2's code.
        net = toy("bert", task="masked_lm")
        params = jax.jit(net.init)(jax.random.key(0), batch(1))["params"]
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
        found, expected = (jax.jit(net.apply)(variables, x) for net in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, found, expected)

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
            return jax.jit(net.apply)({"params": leaves}, x)[0]

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
            (0, r"config\.model\.groups = 0 should be at least 1"),
        ):
            with pytest.raises(UserError, match=message):
                toy("squeezebert", layers=2, groups=groups)

    def test_a_shuffle_is_nothing_to_a_dense_layer(self):
        """The same program, so the same to the bit."""
        for groups in (None, 1, {"query": 2}):
            options = dict(groups=groups, dropout=0.0)
            one, two = (toy("squeezebert", shuffle=s, **options) for s in (False, True))
            variables, x = filled(one), batch(2)
            found, expected = (
                jax.make_jaxpr(net.apply)(variables, x) for net in (two, one)
            )
            assert str(found) == str(expected)

    def test_transformers_does_not_shuffle(self):
        with pytest.raises(UserError, match="does not shuffle channels"):
            squeezebert.to_huggingface(toy("squeezebert", groups=4, shuffle=True))


class TestMobileBert:
    def test_a_token_sees_its_neighbours_before_attention(self):
        net = toy("mobilebert", layers=1)
        variables, x = filled(net), batch(1)
        other = x["tokens"].copy()
        other[0, 4] += 1
        run = jax.jit(lambda t: net.apply(variables, {"tokens": t})[1]["embeddings"])
        changed = np.abs(run(other) - run(x["tokens"])).max(-1)[0] > 0
        assert np.flatnonzero(changed).tolist() == [3, 4, 5]

    def test_what_is_distilled_is_as_wide_as_the_teachers(self):
        def endpoints(variant):
            net = models.make("mobilebert", variant=variant, layers=2)
            run = partial(net.init_with_output, jax.random.key(0))
            return jax.eval_shape(run, {"tokens": np.zeros((1, 8), np.int32)})[0][1]

        wide, narrow = endpoints("teacher"), endpoints("base")
        assert wide == narrow
        assert narrow["layer2"].shape == (1, 8, 512)
        assert narrow["attention2"].shape == narrow["scores2"].shape == (1, 4, 8, 8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"embedding_features": 64}, "embedding_features = 64: should be at most"),
            ({"stacks": 0}, r"stacks = 0 should lie in \[1, 64\]"),
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
        run = jax.jit(lambda tokens: net.apply(variables, {"tokens": tokens})[0])
        changed = np.abs(run(other) - run(x)).max(-1)[0] > 0
        assert np.flatnonzero(changed).tolist() == list(range(6, LENGTH))

    def test_a_sequence_is_classified_by_its_last_real_token(self):
        net = toy("gpt2", num_classes=3)
        variables, x = filled(net), batch(2)["tokens"]
        run = jax.jit(lambda x: net.apply(variables, x))
        logits, endpoints = run({"tokens": x})
        np.testing.assert_array_equal(endpoints["pooled"].shape, (2, 32))
        padded = np.pad(x, ((0, 0), (0, 5)), constant_values=7)
        mask = np.broadcast_to(np.arange(LENGTH + 5) < LENGTH, padded.shape)
        found, _ = run({"tokens": padded, "attended": mask})
        np.testing.assert_allclose(found, logits, atol=1e-5)
        assert np.abs(run({"tokens": padded})[0] - logits).max() > 1e-3

    def test_residuals_begin_smaller_the_more_there_are(self):
        # By one over the square root of their number: section 2.3.
        net = toy("gpt2", layers=2, task="features")
        params = tree.flatten(jax.jit(net.init)(jax.random.key(0), batch(1))["params"])
        for layer in ("attention/output", "ffn_out"):
            kernel = params[f"layer1/{layer}/kernel"]
            assert kernel.std() == pytest.approx(0.02 / 2, rel=0.1)
        assert params["layer1/ffn_in/kernel"].std() == pytest.approx(0.02, rel=0.1)


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
    variables, x = filled(net), batch(2) | {"attended": batch(2)["tokens"] > 9}

    def traced(x):
        with lowering("native"):
            return net.apply(variables, x)

    def run(x):
        program = jax.jit(traced).trace(x)
        convolutions = str(program.jaxpr).count("conv_general_dilated[")
        return program.lower().compile()(x), convolutions

    expected, plain = run(x)
    with separate_groups():
        found, split = run(x)
    assert split > plain
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


class TestSharedOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dropuot": 0.1}, r"unknown key config\.model\.dropuot.*'dropout'"),
            ({"heads": 2.5}, r"config\.model\.heads = 2\.5 .* should be int or None"),
            (
                {"dtype": "float16"},
                r"config\.model\.dtype .* one of 'float32', 'bfloat16'",
            ),
            ({"options": {}}, r"unknown key config\.model\.options"),
        ],
    )
    def test_mistakes_are_named(self, options, message):
        with pytest.raises(UserError, match=message):
            models.make("bert", variant="toy", **options)
        with pytest.raises(UserError, match=message):
            models.check({"name": "bert", "variant": "toy", **options})

    def test_a_network_without_classes_of_its_own_takes_no_number(self):
        with pytest.raises(UserError, match=r"unknown key config\.model\.num_classes"):
            models.make("electra_pretraining", variant="toy", num_classes=2)

    def test_the_defaults_are_those_of_each_paper(self):
        def defaults(name):
            parameters = inspect.signature(
                registry.load("squeeze_jax.models", name).make
            ).parameters
            names = ("activation", "epsilon", "dropout", "head_dropout")
            return tuple(parameters[n].default for n in names)

        # ALBERT's second release drops nothing inside; RoBERTa's and GPT-2's code have an epsilon of 1e-5; DistilBERT's class
        # in transformers has a rate of 0.2 before a classifier.
        assert defaults("bert") == ("gelu", 1e-12, 0.1, None)
        assert defaults("roberta") == ("gelu", 1e-5, 0.1, None)
        assert defaults("albert") == ("gelu_tanh", 1e-12, 0.0, 0.1)
        assert defaults("gpt2") == ("gelu_tanh", 1e-5, 0.1, None)
        assert defaults("distilbert") == ("gelu", 1e-12, 0.1, 0.2)
        assert defaults("mobilebert") == (None, 1e-12, 0.0, None)

    def test_nets_of_the_same_sizes_are_equal_however_these_are_told(self):
        told = dict(layers=2, features=32, heads=4, ffn_features=64, vocabulary=99)
        one = models.make("bert", variant="toy", head_dropout=0.1)
        assert one == models.make("bert", variant="mini", **told, positions=40)
