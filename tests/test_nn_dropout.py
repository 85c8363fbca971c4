"""Dropout: shares, independence, derivatives, and nothing kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.nn.dropout import Dropout, _hash
from squeeze_jax.train import sharding

pytestmark = pytest.mark.usefixtures("optimized")  # as users run it


def drop(x, rate=0.1, seed=0, **options):
    key = jax.random.key(seed)
    return Dropout(rate, **options).apply({}, x, train=True, rngs={"dropout": key})


def kept(shape=(1000, 1000), rate=0.1, seed=0):
    return np.asarray(drop(jnp.ones(shape), rate, seed)) != 0


def test_the_hash_is_murmur3s_finalizer():
    """Values of fmix32 by the reference implementation's arithmetic, in Python's integers."""

    def fmix32(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    numbers = [0, 1, 2, 0xDEADBEEF, 2**32 - 1]
    found = _hash(np.array(numbers, np.uint32))
    assert found.tolist() == [fmix32(n) for n in numbers]
    assert fmix32(1) == 0x514E28B7  # published test value


def test_what_is_kept_is_divided():
    x = jax.random.normal(jax.random.key(1), (50, 40))
    y = np.asarray(drop(x, 0.2))
    np.testing.assert_allclose(y[y != 0], np.asarray(x)[y != 0] / 0.8, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_shares_are_even_everywhere(rate):
    """Of n numbers the share kept has the deviation sqrt(p (1 - p) / n): five of them bound it."""
    for seed in range(3):
        mask = kept(rate=rate, seed=seed)
        deviation = np.sqrt(rate * (1 - rate))
        assert abs(mask.mean() - (1 - rate)) < 5 * deviation / 1000
        for axis in 0, 1:
            rows = mask.mean(axis)
            assert abs(rows - (1 - rate)).max() < 5 * deviation / np.sqrt(1000)
            # Rows differ among themselves as much as chance says: chi-squared of 1000 is 1000 +- 5 sqrt(2000).
            chi = ((rows - mask.mean()) ** 2).sum() * 1000 / deviation**2
            assert abs(chi - 1000) < 5 * np.sqrt(2000)


def test_neighbours_and_seeds_do_not_correlate():
    """The correlation of n pairs has the deviation 1 / sqrt(n)."""
    mask = kept(rate=0.5) * 2.0 - 1
    flat = mask.reshape(-1)
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 128, 768, 1000, 1024, 3072):
        assert abs(np.mean(flat[:-lag] * flat[lag:])) < 5 / np.sqrt(flat.size - lag)
    for seed in range(1, 6):
        other = kept(rate=0.5, seed=seed) * 2.0 - 1
        assert abs(np.mean(mask * other)) < 5 / 1000
    # Nor do three at a time, which linear generators fail at.
    for a, b in (1, 2), (1, 3), (8, 64), (768, 1536):
        triple = flat[:-b] * flat[a : flat.size - b + a] * flat[b:]
        assert abs(triple.mean()) < 5 / np.sqrt(triple.size)


def test_derivatives_use_the_same_mask():
    x = jax.random.normal(jax.random.key(1), (30, 20))
    y, pullback = jax.vjp(drop, x)
    scale = np.where(np.asarray(y) != 0, 1 / 0.9, 0).astype(np.float32)
    (gradient,) = pullback(jnp.ones_like(x))
    np.testing.assert_allclose(gradient, scale, rtol=1e-6)
    _, tangent = jax.jvp(drop, (x,), (x,))
    np.testing.assert_allclose(tangent, y, rtol=1e-6)

    def loss(x):
        return (drop(x) ** 3).sum()

    direction = jnp.ones_like(x)
    second = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction))(x)
    np.testing.assert_allclose(second, 6 * np.asarray(x) * scale**3, rtol=1e-5)


def test_vmap_and_bfloat16():
    x = jnp.ones((3, 8, 16), jnp.bfloat16)
    y = jax.vmap(drop)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0], drop(x[0]))
    np.testing.assert_array_equal(y[1], y[0])


@pytest.mark.usefixtures("four_devices")
def test_devices_share_one_mask():
    x = jnp.ones((16, 32))
    placed = jax.device_put(x, sharding.over_batch(sharding.make_mesh(data=4)))
    np.testing.assert_array_equal(jax.jit(drop)(placed), drop(x))


def test_whole_images_share_their_fate():
    y = np.asarray(drop(jnp.ones((400, 4, 4, 3)), 0.3, broadcast_dims=(1, 2, 3)))
    fates = y.reshape(400, -1)
    assert (fates == fates[:, :1]).all()
    assert abs((fates[:, 0] != 0).mean() - 0.7) < 5 * np.sqrt(0.21 / 400)


def test_the_mask_is_not_kept():
    """All that the backward pass gets is the seed."""
    x = jnp.ones((64, 64))
    _, pullback = jax.vjp(drop, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= 4


@pytest.mark.parametrize(("rate", "train"), [(0.0, True), (0.5, False), (1.0, True)])
def test_nothing_and_everything(rate, train):
    x = jnp.ones((4, 4))
    y = Dropout(rate).apply({}, x, train=train, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, 0 * x if rate == 1 else x)


def test_a_bad_rate_is_named():
    with pytest.raises(UserError, match=r"dropout = 1.5 should lie in \[0, 1\]"):
        drop(jnp.ones(3), 1.5)
