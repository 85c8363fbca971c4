"""A recurrent network through the jobs: trained on contiguous text, resumed, evaluated, asked and exported."""

import shutil

import jax
import numpy as np
import pytest

from squeeze_jax.jobs import _experiment, _workdir, evaluate, export, fit, predict
from squeeze_jax.train import log
from squeeze_jax.train.checkpoint import Checkpoints

ALPHABET = "abcdefghijklm"
STEPS = 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(work directory, what was built): a network that knows an alphabet of 13 letters, by windows of 5."""
    root = tmp_path_factory.mktemp("recurrent")
    (root / "text.txt").write_text(ALPHABET * 40)
    config = dict(
        data=dict(
            name="contiguous",
            train=str(root / "text.txt"),
            eval=str(root / "text.txt"),
            length=5,
            level="characters",
        ),
        model=dict(name="lstm", variant="tiny", features=16, layers=1),
        optim=dict(name="adamw", lr=0.05, schedule="constant"),
        batch=4,
        steps=STEPS,
        log_every=20,
        save_every=20,
        checkpoint=dict(keep=3),
        export=dict(formats=("stablehlo", "tflite"), check=8, calibration=8),
    )
    built = _experiment.build(_experiment.check(_workdir.canonical(config)))
    fit.run(built, root / "run")
    return root / "run", built


def newest(workdir, built):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(lambda note: built.abstract())
    checkpoints.close()
    return jax.device_get(restored.state)


def test_it_learns_the_alphabet(trained):
    workdir, _ = trained
    scores = log.read(workdir / "metrics.jsonl")[-1]
    # Of 13 letters that are equally frequent, a network that knows nothing finds one in 13.
    assert scores["eval_accuracy"] > 0.95
    assert scores["eval_perplexity"] == pytest.approx(np.exp(scores["eval_loss"]))
    assert scores["eval_perplexity"] < 1.5


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    workdir, built = trained
    end = newest(workdir, built)
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    begun = newest(tmp_path / "run", built)
    assert (int(begun.step), int(end.step)) == (STEPS - 20, STEPS)
    # The alphabet and the windows are out of step: the state does not repeat.
    assert any(np.any(a) for a in jax.tree.leaves(begun.carry))
    fit.run(built, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, newest(tmp_path / "run", built), end)


def test_it_is_evaluated_and_asked(trained, capsys):
    workdir, built = trained
    scores = log.read(workdir / "metrics.jsonl")[-1]
    evaluate.run(built, workdir)
    printed = capsys.readouterr().out
    assert f"perplexity {scores['eval_perplexity']:.4f}" in printed
    assert f"{built.data.num_eval} windows" in printed
    predict.run(built, workdir, ["efgh", "klma"])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == ["efgh", "klma"]
    assert [lines[n].split()[1] for n in (2, 5)] == ["'i'", "'b'"]


def test_its_files_compute_the_window(trained, capsys):
    workdir, built = trained
    export.run(built, workdir)  # raises a Disagreement where a file differs
    printed = capsys.readouterr().out
    assert printed.count("agreement 100.0%") == 2
