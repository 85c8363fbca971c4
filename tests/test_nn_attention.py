"""Attention, its shuffled channels and embeddings, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import registry
from squeeze_jax.nn.attention import Groups, SelfAttention, attend, shuffle_channels
from squeeze_jax.nn.composite import keep_composites
from squeeze_jax.nn.embed import Embed, Embeddings


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


def test_derivatives_are_those_of_the_operations_also_where_they_are_one():
    table = jnp.arange(8.0).reshape(4, 2) / 8
    embed = Embed(4, 2)

    def loss(table):
        x = embed.apply({"params": {"embedding": table}}, jnp.array([[1, 3]]))
        return (registry.load("squeeze_jax.nn", "activations").gelu(x) ** 2).sum()

    expected = jax.jit(jax.grad(loss))(table)
    with keep_composites():
        text = str(jax.make_jaxpr(loss)(table))
        found = jax.jit(jax.grad(loss))(table)
    assert text.count("name=aten.gelu.default") == 1
    assert text.count("name=odml.embedding_lookup") == 1
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not found[0].any()
    assert found[3].all()


def test_a_shuffle_by_hand():
    x = jnp.arange(12).reshape(1, 1, 12)  # of two groups, for three
    expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert shuffle_channels(x, 2, 3)[0, 0].tolist() == expected


def test_a_shuffle_lets_groups_see_each_other():
    """In one layer without other mixing: a change of the first group's values reaches the others' outputs, or not."""
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype("f")
    other = x.copy()
    other[..., :8] += 1
    reached = {}
    for shuffle in (False, True):
        net = SelfAttention(4, Groups(4, 4, 4, 4), shuffle=shuffle)
        variables = jax.jit(net.init)(jax.random.key(0), x)
        run = jax.jit(net.apply)
        one, two = (run(variables, y)[0] for y in (x, other))
        moved = np.abs(one - two).max((0, 1)).reshape(4, 8).max(1)
        reached[shuffle] = (moved > 1e-6).tolist()
    assert reached == {False: [True, False, False, False], True: [True] * 4}
