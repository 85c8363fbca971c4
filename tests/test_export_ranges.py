"""Ranges of activations: hand examples, and the error of really rounding, by trying every range."""

import numpy as np
import pytest

from squeeze_jax.export import ranges


def rounded(values, low, high, steps=255):
    """Values as an integer format with that range represents them."""
    step = (high - low) / steps
    return low + step * np.rint((values.clip(low, high) - low) / step)


def error(values, low, high):
    return np.mean((rounded(values, low, high) - values) ** 2)


def test_values_spread_evenly_keep_their_range():
    counts = np.full(ranges.BINS, 100)
    assert ranges.least_error(counts, -3.0, 5.0) == (-3.0, 5.0)


def test_one_outlier_among_many_is_cut_off():
    """A million values in [0, 1] and one at 2.

    Keeping 2 costs 10^6 · (2/255)² / 12 = 5.1; cutting at 1 costs 10^6 · (1/255)² / 12 + 1 = 2.3.
    """
    counts = np.zeros(ranges.BINS, np.int64)
    counts[: ranges.BINS // 2] = 1_000_000 // (ranges.BINS // 2)
    counts[-1] = 1
    low, high = ranges.least_error(counts, 0.0, 2.0)
    assert low == 0
    assert high == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "negative"])
def test_range_is_the_best_of_those_tried(kind):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=40_000),
        "laplace": rng.laplace(size=40_000) ** 3,
        "relu": np.maximum(rng.normal(-1, 1, 40_000), 0),
        "negative": -(np.abs(rng.laplace(size=40_000)) ** 2),
    }[kind].astype(np.float32)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    counts = ranges.histogram(values, low, high)
    assert counts.sum() == np.count_nonzero(values)
    found = ranges.least_error(counts, low, high)
    assert low <= found[0] <= 0 <= found[1] <= high
    best = min(
        error(values, low * a, high * b)
        for a in (ranges.SHRINK if low < 0 else [1])
        for b in (ranges.SHRINK if high > 0 else [1])
    )
    assert error(values, *found) <= 1.1 * best
    if kind == "laplace":
        assert error(values, *found) < 0.5 * error(values, low, high)


def test_collect_sees_all_images():
    images = [np.array([1.0, 4.0]), np.array([-2.0, 3.0]), np.array([0.0, 2.0])]

    def run(image):
        return {"same": image, "square": image**2, "dead": 0 * image}

    found = ranges.collect(run, images)
    assert list(found) == ["same", "square", "dead"]
    assert found["dead"] == (0.0, 0.0)
    for name, (low, high) in {"same": (-2, 4), "square": (0, 16)}.items():
        assert low <= found[name][0] <= 0
        assert 0.3 * high <= found[name][1] <= high


def test_large_arrays_are_sampled():
    values = np.linspace(1e-6, 1, 10 * ranges.SAMPLED, dtype=np.float32)
    counts = ranges.histogram(values, 0.0, 1.0)
    assert counts.sum() == ranges.SAMPLED
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_may_not_be_seen_keep_a_place(masked):
    """Scores 0 to 2 go on to 10 below the highest, e^-10 of its share, also where every example was seen whole."""
    lowest = np.finfo(np.float32).min
    hide = np.array([0.0, lowest if masked else 0.0, 0.0], np.float32)
    scores = np.array([2.0, 1.0, 0.5], np.float32)

    def run(_):
        pool = np.array([lowest, 2.0, 1.0], np.float32)
        return {"mask": hide, "sum": scores + hide, "plain": scores, "pool": pool}

    found = ranges.collect(run, [0], {"sum": ["plain", "mask"], "plain": []})
    assert found["mask"] == (-1000, 0)
    low, high = found["sum"]
    assert 1.5 <= high <= 2
    assert low == pytest.approx(high - 10)
    assert found["plain"] == found["pool"] == (0, pytest.approx(high, abs=0.1))
