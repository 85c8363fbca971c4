"""The examples of docs/own_files.md run as they stand there, most of them in one run of two phases that is exported."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run as run_py
from squeeze_jax import methods, registry, tree
from squeeze_jax.jobs import _experiment, _workdir, evaluate, fit
from squeeze_jax.train import log, step

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "own_files.md"
CONFIG = """
def get_config():
    return dict(
        batch=8, save_every=2, log_every=1, checkpoint=dict(keep=3), ema=0.5,
        data=dict(source=dict(name="./my_source.py"), size=8, crop="none"),
        model=dict(name="./my_model.py", features=6),
        optim=dict(lr=0.1),
        update=(
            dict(name="./my_clip.py", most=1.0),
            "optim",
            dict(name="./my_thaw.py", layer="conv", until=3),
        ),
        forward=(dict(name="./my_limit.py", times=20.0),),
        objective=(
            dict(name="losses.cross_entropy"),
            dict(name="./my_brier.py", weight=0.1),
        ),
        gradients=dict(name="./my_sam.py"),
        phases=(dict(steps=4), dict(steps=2, begin=dict(name="./my_reset.py"))),
        export=dict(formats=("./mine.py",), check=8, calibration=8),
    )
"""
TASK = """
def get_config():
    return dict(
        steps=2, batch=8, log_every=1, eval_every=1, data=dict(name="./my_task.py"),
        model=dict(name="./my_model.py"), optim=dict(lr=0.1),
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page in the current directory."""
    blocks = re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert len(blocks) == PAGE.read_text().count("```python") == 13
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQUEEZE_JAX_OWN_FILES", "")
    return tmp_path


def make(name, *arguments, **options):
    return registry.load("squeeze_jax.comm", f"./{name}.py").make(*arguments, **options)


def test_the_examples_run_resume_and_export(folder, capsys):
    command = ["--config=config.py", "--workdir=run"]
    run_py.main(["--job=fit", *command])
    # The second phase ends after 2 steps, before the layer thaws; the first one reaches step 3.
    assert capsys.readouterr().out.count("config.update at step 3") == 1
    workdir = folder / "run"
    built = _experiment.build_trained(workdir, _workdir.read(workdir))
    state = jax.device_get(evaluate.trained_state(built, workdir))
    assert state.step == 6
    assert state.params["methods"]["my_brier"]["s"] != 0
    assert 0 < state.extra["my_brier"]["average"] < 1
    assert state.extra["my_limit"]["size"] > 0
    records = [r for r in log.read(workdir / "metrics.jsonl") if "loss" in r]
    norms = [r["kernel_norm"] for r in records]
    assert norms[0] == norms[1] == norms[2] != norms[3]
    assert norms[3] == norms[4] == norms[5]
    # Zeros in the layer of logits: the second phase begins at the loss of ten equal classes.
    assert records[4]["cross_entropy"] == pytest.approx(np.log(10), abs=0.05)
    for late in "5", "6":
        for path in (workdir / "checkpoints").glob(late):
            path.rename(folder / f"gone{late}")
    run_py.main(["--job=fit", *command])
    again = jax.device_get(evaluate.trained_state(built, workdir))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    run_py.main(["--job=export", "--workdir=run"])
    assert (workdir / "export" / "model.mine").exists()


SPACE = """
def get_config():
    return dict(
        steps=1, batch=8, data=dict(source=dict(name="./my_source.py"), size=8),
        model=dict(name="./my_space.py"), optim=dict(lr=0.1, warmup=0),
        gradients=dict(name="nas.once_for_all", random=1),
        latency_table=dict(formats=("xla",), networks=4, rounds=1, runs=1, seconds=0.0),
        search=dict(
            limits=({"cost": "latency", "table": "xla", "share": 1.0},), samples=10,
            generations=1, calibration=8, examples=8, steps=1,
        ),
        export=dict(formats=("stablehlo",), check=8, calibration=8),
        benchmark=dict(runs=1, warmup=0),
    )
"""


def test_the_example_of_a_space_is_measured_and_searched(folder, capsys):
    """Four blocks differ in kernel and gate. The first and the second have different inputs: 3 and 4 channels, or 1 and 4."""
    (folder / "space.py").write_text(SPACE)
    run_py.main(["--config=space.py", "--workdir=space"])
    printed = capsys.readouterr().out
    assert "kernel x 2, gated x 2: 10 different pieces, 4 whole networks" in printed
    assert (folder / "space" / "found" / "report.json").exists()
    found = _workdir.read(folder / "space" / "found")["model"]
    assert set(found["kernel"]) <= {1, 3}
    assert set(found["gated"]) <= {False, True}


def test_the_example_of_a_task_is_scored_by_that_of_a_metric(folder):
    run_py.main(["--job=fit", "--config=task.py", "--workdir=task"])
    records = log.read(folder / "task" / "metrics.jsonl")
    # Six examples, two of each class.
    wrong = [6 * r["eval_wrong"] for r in records if "eval_wrong" in r]
    assert len(wrong) == 2
    assert all(count in range(7) for count in np.round(wrong, 5))


def test_the_example_of_a_metric_counts(folder):
    metric = make("my_metric", None)
    batch = {"label": np.array([0, 0, 2]), "mask": np.array([True, True, False])}
    # Equal logits: the cross-entropy of three classes is log 3, and the first class counts as the answer.
    sums, rows = metric.measure(np.zeros((3, 3), np.float32), batch)
    scores = metric.score(jax.device_get(sums), rows)
    assert scores["eval_loss"] == pytest.approx(np.log(3))
    sums, rows = metric.measure(np.eye(3, dtype=np.float32), batch)
    assert metric.score(jax.device_get(sums), rows)["eval_wrong"] == 0.5
    assert metric.better("eval_wrong") is min


def test_the_example_of_an_update_clips_each_array(folder):
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    tx = make("my_clip", most=1.0)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)  # norm 5
    np.testing.assert_allclose(updates["b"], [0.5], rtol=1e-6)


def test_the_example_of_an_objective_is_the_weighted_brier_score(folder):
    objective = make("my_brier", decay=0.9)
    batch = {"label": np.array([0, 0]), "mask": np.array([True, False])}
    own = methods.Own({"s": np.log(2.0)}, {"average": 1.0}, None, 0, True)
    value, _, state = objective.loss(jnp.zeros((2, 2)), {}, batch, {}, own)
    # B = (0.5 - 1)^2 + 0.5^2 = 0.5, exp(-s) = 0.5
    assert value == pytest.approx(0.5 * 0.5 + np.log(2.0))
    assert state["average"] == pytest.approx(0.9 + 0.1 * 0.5)


def test_the_example_of_a_forward_method_limits_by_its_state(folder):
    method = make("my_limit", layer="scores", times=2.0, decay=0.75)
    assert method.taps("scores/inputs")
    assert not method.taps("scores/outputs")
    x, own = jnp.array([[1.0, -3.0, 0.0, 8.0]]), methods.Own({}, {"size": jnp.float32(4)}, None, 1, True)  # fmt: skip
    # The mean size is 3, so the average is 0.75 * 4 + 0.25 * 3 = 3.75, and the limit is 7.5.
    limited, changes = method.intercept(None, x, own)
    np.testing.assert_allclose(limited, [[1.0, -3.0, 0.0, 7.5]])
    assert changes["size"] == 3.75
    _, changes = method.intercept(None, x, own._replace(step=0))
    assert changes["size"] == 3
    limited, changes = method.intercept(None, x, own._replace(train=False))
    np.testing.assert_allclose(limited, [[1.0, -3.0, 0.0, 8.0]])
    assert changes == {}


def test_the_example_of_gradients_moves_the_network_alone(folder):
    keys = []

    def loss(params, stats, batch, key):
        keys.append(key)
        value = params["layer"] ** 2 + params["methods"]["m"] ** 2
        return value, ({"passes": stats["passes"] + 1}, {"loss": value})

    passes = methods.Passes(None, None, loss)
    params = {"layer": jnp.float32(3.0), "methods": {"m": jnp.float32(7.0)}}
    own = methods.Own({}, None, "key", 0, True)
    compute = make("my_sam", radius=0.05).compute
    grads, stats, metrics = compute(passes, params, {"passes": 0}, {}, own)
    # The gradient of w^2 at 3 + 0.05, and of m^2 at 7.
    assert grads["layer"] == pytest.approx(6.1)
    assert grads["methods"]["m"] == 14
    assert metrics["loss"] == 58
    assert stats == {"passes": 1}
    assert keys == ["key", "key"]


def test_the_example_of_a_transition_resets_weights_averages_and_momentum(folder):
    config = dict(
        steps=1,
        batch=8,
        ema=0.9,
        data=dict(source=dict(name="./my_source.py"), size=8),
        model=dict(name="./my_model.py"),
        optim=dict(name="adamw", lr=0.1),
    )
    built = _experiment.build(_experiment.check(config))
    ones = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), built.abstract())
    options, state = make("my_reset").apply({"features": 4}, ones, None)
    assert options == {"features": 4}
    arrays = tree.flatten(state)
    changed = {name for name, array in arrays.items() if not array.any()}
    # The weights, their averages, and Adam's two moments.
    assert len(changed) == 8
    assert changed == {name for name in arrays if "/scores/" in name}


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
        teacher_outputs = types.SimpleNamespace(
            teach=None, step_arguments=(), cached_shapes=lambda spec: None
        )
        pieces, _ = fit.traceable_step(built, built.data.specs(8)[-1], teacher_outputs)
        batch = fit.put_batch(next(built.data.train(8, 0)), built)
        key = jax.random.key(0)
        after, _ = jax.jit(step.compose(pieces))(built.create(), batch, key)
        ends.append(jax.device_get(after.params))
    # bfloat16 keeps 8 bits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3), *ends
    )
