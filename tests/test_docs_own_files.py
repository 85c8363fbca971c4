"""The examples of docs/own_files.md run as they stand there, all in one run of two phases that is exported."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest

import run as run_py
from squeeze_jax.jobs import _experiment, _workdir, evaluate, fit
from squeeze_jax.train import log, step

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "own_files.md"
CONFIG = """
def get_config():
    return dict(
        batch=8, save_every=2, log_every=1, checkpoint=dict(keep=3),
        data=dict(source=dict(name="./my_source.py"), size=8, crop="none"),
        model=dict(name="./my_model.py", features=6),
        optim=dict(lr=0.1),
        update=(dict(name="./my_clip.py"), "optim"),
        objective=(
            dict(name="losses.cross_entropy"),
            dict(name="./my_balance.py", weight=0.1),
        ),
        gradients=dict(name="./my_sam.py"),
        phases=(dict(steps=4), dict(steps=2, begin=dict(name="./my_rest.py"))),
        export=dict(formats=("./mine.py",), check=8, calibration=8),
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page in the current directory."""
    blocks = re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert len(blocks) == PAGE.read_text().count("```python") == 9
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQUEEZE_JAX_OWN_FILES", "")
    return tmp_path


def test_the_examples_run_resume_and_export(folder):
    command = ["--config=config.py", "--workdir=run"]
    run_py.main(["--job=fit", *command])
    workdir = folder / "run"
    built = _experiment.opened(workdir, _workdir.read(workdir))
    state = jax.device_get(evaluate.trained(built, workdir))
    assert state.step == 6
    assert state.params["methods"]["my_balance"]["log_scale"] != 0
    assert 0.05 < state.extra["my_balance"]["average"] < 1
    records = [r for r in log.read(workdir / "metrics.jsonl") if "loss" in r]
    assert all(r["sharpest"] > 0 for r in records)
    # Zeros in the layer of logits: the second phase begins at the loss of ten equal classes.
    assert records[4]["cross_entropy"] == pytest.approx(np.log(10), abs=0.05)
    for late in "5", "6":
        for path in (workdir / "checkpoints").glob(late):
            path.rename(folder / f"gone{late}")
    run_py.main(["--job=fit", *command])
    again = jax.device_get(evaluate.trained(built, workdir))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    run_py.main(["--job=export", "--workdir=run"])
    assert (workdir / "export" / "model.mine").exists()


def test_the_example_of_an_exchange_gives_the_mean(folder):
    config = dict(
        steps=1,
        batch=8,
        data=dict(source=dict(name="./my_source.py"), size=8, crop="none"),
        model=dict(name="./my_model.py"),
        optim=dict(lr=0.1, momentum=0.0),
    )
    ends = []
    for more in {}, {"exchange": dict(name="./my_exchange.py")}:
        built = _experiment.build(_experiment.check(config | more))
        lessons = types.SimpleNamespace(teach=None, frozen=(), spec=lambda spec: None)
        pieces, _ = fit.traceable(built, built.data.specs(8)[-1], lessons)
        batch = fit.put(next(built.data.train(8, 0)), built)
        key = jax.random.key(0)
        after, _ = jax.jit(step.whole(pieces))(built.create(), batch, key)
        ends.append(jax.device_get(after.params))
    # bfloat16 keeps 8 bits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3), *ends
    )


def test_the_example_of_a_metric_counts(folder):
    from squeeze_jax import registry

    metric = registry.load("squeeze_jax.train.metrics", "./my_metric.py", "metric").make(None)  # fmt: skip
    logits = np.eye(3, dtype=np.float32)
    batch = {"label": np.array([0, 0, 2]), "mask": np.array([True, True, False])}
    sums, rows = metric.measure(logits, batch)
    assert metric.score(jax.device_get(sums), rows)["eval_wrong"] == 0.5
    assert metric.better("eval_wrong") is min
