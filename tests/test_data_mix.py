"""mixup and CutMix: literal cases worked by hand, and what must hold whatever the random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import data
from squeeze_jax.data import mix

N = 64


def batch():
    """64 examples of 64 classes, all different."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (N, 6, 6, 3), np.uint8),
        "label": np.arange(N, dtype=np.int32),
        "mask": np.ones(N, bool),
        "index": np.arange(N),
    }


@functools.cache
def compiled(mixup, cutmix, classes):
    return jax.jit(
        functools.partial(mix.augment, num_classes=classes, mixup=mixup, cutmix=cutmix)
    )


def augment(key, batch, mixup, cutmix, classes=N):
    return jax.device_get(compiled(mixup, cutmix, classes)(jax.random.key(key), batch))


def test_mixup_by_hand():
    images = jnp.array([0, 100, 200], jnp.uint8).reshape(3, 1, 1, 1)
    lam = jnp.array([0.75, 0.5, 1.0])
    mixed, labels = mix.blend(images, jnp.eye(3), lam)
    # 0.75 * 0 + 0.25 * 100 = 25; 0.5 * 100 + 0.5 * 200 = 150; 200 as it is. The last one's neighbour is the first.
    np.testing.assert_allclose(mixed.ravel(), [25, 150, 200])
    np.testing.assert_allclose(labels, [[0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]])
    mixed, labels = mix.blend(images, jnp.eye(3), jnp.array([1.0, 1.0, 0.25]))
    np.testing.assert_allclose(mixed.ravel(), [0, 100, 50])
    np.testing.assert_allclose(labels[2], [0.75, 0, 0.25])


def test_cutmix_by_hand():
    images = jnp.stack([jnp.full((4, 4, 1), v, jnp.uint8) for v in (1, 2)])
    boxes = jnp.array([[1, 3, 0, 2], [0, 0, 2, 4]])  # rows 1-2, columns 0-1; empty
    mixed, labels = mix.paste(images, jnp.eye(2), boxes)
    expected = [[1, 1, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(mixed[0, ..., 0], expected)
    np.testing.assert_array_equal(mixed[1], images[1])
    np.testing.assert_allclose(labels, [[0.75, 0.25], [0, 1]])
    assert mixed.dtype == jnp.uint8


def test_boxes_have_the_papers_sides():
    # λ = 0.75: sides are half of the image's, sqrt(1 - λ) = 0.5; near the border they are clipped.
    lam = jnp.full(2000, 0.75)
    top, bottom, left, right = np.array(mix.boxes(jax.random.key(0), lam, 16, 32)).T
    assert (bottom - top).max() == 8
    assert (right - left).max() == 16
    assert top.min() == left.min() == 0
    assert bottom.max() == 16
    assert right.max() == 32
    inside = (top > 0) & (bottom < 16)
    assert set((bottom - top)[inside]) == {8}
    assert (bottom - top).min() == 4  # the centre on the first row
    # Centres are uniform: each of 9 unclipped places is hit with probability 1/16.
    places = np.bincount(top[inside])
    assert abs(inside.mean() - 7 / 16) < 5 * (7 / 16 * 9 / 16 / 2000) ** 0.5
    assert (places[1:8] > 0).all()
    none = np.array(mix.boxes(jax.random.key(0), jnp.ones(50), 16, 32))
    assert (none[:, 0] == none[:, 1]).all()
    assert (none[:, 2] == none[:, 3]).all()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_labels_stay_distributions_and_weigh_what_was_mixed(mixup, cutmix):
    old = batch()
    # Constant pictures, of which each names its example: what is mixed can be read off.
    old["image"][:] = np.arange(N)[:, None, None, None]
    new = augment(1, old, mixup, cutmix)
    np.testing.assert_allclose(new["label"].sum(1), 1, atol=1e-6)
    assert new["label"].dtype == np.float32
    np.testing.assert_allclose(
        new["image"].mean((1, 2, 3)), new["label"] @ np.arange(64.0), atol=1e-4
    )
    own = new["label"][np.arange(64), np.arange(64)]
    neighbour = new["label"][np.arange(64), (np.arange(64) + 1) % 64]
    np.testing.assert_allclose(own + neighbour, 1, atol=1e-6)
    assert ((own > 0.001) & (own < 0.999)).sum() > 20
    np.testing.assert_array_equal(new["mask"], old["mask"])
    np.testing.assert_array_equal(new["index"], old["index"])
    pixels = new["image"][..., 0].reshape(64, -1)
    blended = (pixels != np.round(pixels)).any(1)
    if not mixup:
        assert new["image"].dtype == np.uint8
    elif cutmix:
        assert 16 <= blended.sum() <= 48  # half of 64, four standard deviations
    else:
        assert blended.sum() > 50


def test_lambda_is_beta_distributed():
    # The mean of Beta(α, α) is 1/2, its variance 1 / (4 (2 α + 1)).
    alpha, keys = 0.4, 40
    old = batch()
    new = [augment(key, old, alpha, 0.0) for key in range(keys)]
    lam = np.concatenate([np.diagonal(b["label"]) for b in new])
    n = lam.size
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * (variance / n) ** 0.5
    assert abs(lam.var() - variance) < 0.01


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_masked_examples_neither_mix_nor_are_mixed_in(mixup, cutmix):
    old = batch()
    old["mask"][[3, 4, 10, 63]] = False
    new = augment(5, old, mixup, cutmix)
    alone = [2, 3, 4, 9, 10, 62, 63]  # the masked, and those whose next one is
    np.testing.assert_array_equal(new["label"][alone], np.eye(N)[alone])
    np.testing.assert_array_equal(new["image"][alone], old["image"][alone])
    rest = [i for i in range(N) if i not in alone]
    changed = (new["image"][rest] != old["image"][rest]).any((1, 2, 3))
    assert changed.sum() > 30


def test_off_is_the_identity():
    opened = data.make(source={"name": "digits"}, size=8)
    old = batch()
    assert opened.augment(jax.random.key(0), old) is old


def test_keys_decide_and_data_passes_its_settings_on():
    opened = data.make(source={"name": "digits"}, size=8, mixup=0.4)
    old = batch()
    old["label"] %= 10
    fn = jax.jit(opened.augment)
    runs = [jax.device_get(fn(jax.random.key(k), old)) for k in (0, 0, 1)]
    assert runs[0]["label"].shape == (N, 10)
    np.testing.assert_array_equal(runs[0]["image"], runs[1]["image"])
    assert (runs[0]["image"] != runs[2]["image"]).any()
    expected = augment(0, batch(), 0.4, 0.0)["image"]
    np.testing.assert_allclose(runs[0]["image"], expected, atol=1e-3)
