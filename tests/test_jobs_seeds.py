"""The comparison of seeds."""

import contextlib
import fcntl
import json
import math
import types

import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _workdir, fit, seeds


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


def _put_file(folder, config):
    folder.write_text("")
    return "seed-2 is a file, not a folder"


def _put_other_run(folder, config):
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"batch": 8, "seed": 2}))
    return "seed-2 holds another experiment: batch = 8 there, 16 here"


def _put_longer_run(folder, config):
    (folder / "checkpoints" / "9").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"steps": 9, "seed": 2}))
    return "config.steps = 4, but .*seed-2 is trained for 9 steps already"


def _put_lock(folder, config):
    folder.mkdir()
    (folder / ".lock").write_text("17")
    return "seed-2 is in use by process 17"


@pytest.mark.parametrize("put", [_put_file, _put_other_run, _put_longer_run, _put_lock])
def test_the_folders_of_all_seeds_are_checked_before_the_first_trains(
    put, tmp_path, monkeypatch
):
    config = dict(
        data=dict(name="images", source=dict(name="digits"), size=32),
        model=dict(name="squeezenet", variant="1_1"),
        optim=dict(name="adamw", lr=1e-3),
        batch=16,
        steps=4,
        seeds=(0, 1, 2),
    )
    whole = _experiment.check(_workdir.canonical(config))
    message = put(tmp_path / "seed-2", whole.config())
    monkeypatch.setattr(fit, "ready", lambda *_: pytest.fail("the work has begun"))
    before = sorted(tmp_path.rglob("*"))
    built = types.SimpleNamespace(experiment=whole, whole=whole)
    with contextlib.ExitStack() as stack:
        if put is _put_lock:
            lock = stack.enter_context(open(tmp_path / "seed-2" / ".lock"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=message):
            seeds.run(built, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
