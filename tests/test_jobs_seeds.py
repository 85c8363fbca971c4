"""The comparison of seeds."""

import math

import pytest

from squeeze_jax.jobs import seeds


@pytest.mark.parametrize(
    ("values", "best", "seed"),
    [
        ((5.0, 3.0, 4.0), min, 1),
        ((5.0, 3.0, 4.0), max, 0),
        ((math.nan, 3.0, 4.0), max, 2),
        ((math.nan, 3.0, 4.0), min, 1),
        ((math.nan, math.nan, math.inf), min, 0),
    ],
)
def test_the_best_seed_is_the_one_of_the_best_finite_headline(values, best, seed):
    found = {n: {"score": value} for n, value in enumerate(values)}
    assert seeds.summary(found, "score", best)["best"] == seed


def test_a_seed_that_diverged_leaves_the_other_scores_their_statistics():
    """1, 3 and 8 have the median 3, the mean 4 and the deviation sqrt((9 + 1 + 16) / 2)."""
    found = {
        n: {"score": score, "loss": loss}
        for n, (score, loss) in enumerate([(1.0, math.nan), (3.0, 0.5), (8.0, 0.25)])
    }
    whole = seeds.summary(found, "score")
    assert (whole["median"]["score"], whole["mean"]["score"]) == (3.0, 4.0)
    assert whole["deviation"]["score"] == pytest.approx(math.sqrt(13))
    assert all(math.isnan(whole[k]["loss"]) for k in ("median", "mean", "deviation"))
    assert "nan" in seeds.report(found, "score")
