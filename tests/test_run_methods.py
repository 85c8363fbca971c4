"""Configs with methods of the plug points, end to end: continued from a checkpoint to the same bits, and exported."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run as run_py
from squeeze_jax import models
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _transitions, _workdir
from squeeze_jax.prune import group_lasso, magnitude
from squeeze_jax.train import log
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.weights import pretrained
from tests import test_run, test_run_errors
from tests.devices import xla_flags

pytestmark = pytest.mark.usefixtures("compiled_once", "four_devices")
ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 4  # of this process, see conftest.py
STEPS, CUT_AT = 20, 12
TINY = tuple(
    f"--config.steps={STEPS}" if flag.startswith("--config.steps=") else flag
    for flag in test_run.TINY
)


def fit(workdir, arguments, devices, kill_at=None):
    """Trains in a process of its own on simulated devices, and kills it at the progress line of a step if one is named.

    Returns:
      What the process printed.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, "-u", str(ROOT / "run.py"), "--job=fit"]
    command += [f"--workdir={workdir}", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = []
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as running:
        try:
            for line in running.stdout:
                printed.append(line)
                if kill_at and f"step {kill_at}/" in line:
                    running.send_signal(signal.SIGKILL)
                    break
        finally:
            if kill_at:
                running.kill()
    text = "".join(printed)
    assert running.returncode == (-signal.SIGKILL if kill_at else 0), text
    return text


def final(workdir):
    """The whole state of the newest checkpoint, on the host."""
    config = _workdir.read(workdir) | {"sharding": {"data": DEVICES}}
    built = _experiment.build(_experiment.check(config), has_checkpoint=True)
    with contextlib.closing(
        Checkpoints(workdir / "checkpoints", read_only=True)
    ) as checkpoints:
        return jax.device_get(checkpoints.restore(built.abstract()).state)


def check_continues(folder, arguments, devices=1, file=None):
    """Checks that a run continues from a checkpoint to the bits of the undisturbed run; returns the final state.

    Args:
      folder: for the work directories "whole" and "cut".
      arguments: of run.py, without --job and --workdir; the run takes more than `CUT_AT` steps and saves every few.
      devices: simulated ones; as many as this process has where a method has a state for each of them.
      file: of the weights that the run begins with; it is deleted before the run continues.
    """
    whole, cut = folder / "whole", folder / "cut"
    arguments = (*arguments, "--config.checkpoint.keep=9")
    fit(whole, arguments, devices)
    cut_off(whole, cut, CUT_AT)
    if file:
        file.unlink()
    printed = fit(cut, arguments, devices)
    assert "continuing from the checkpoint of step 10" in printed
    states = [final(workdir) for workdir in (whole, cut)]
    chex.assert_trees_all_equal(*states)
    return states[0]


def cut_off(whole, cut, step):
    """Copies a work directory without the checkpoints after a step, as a run leaves it that ends there."""
    shutil.copytree(whole, cut)
    later = [p for p in (cut / "checkpoints").glob("[0-9]*") if int(p.name) > step]
    assert later
    for path in later:
        shutil.rmtree(path)


def check_exports(workdir):
    """Exports the trained network; the job raises an error if the file and the live network disagree."""
    small = ("--config.export.check=32", '--config.export.formats=("stablehlo",)')
    run_py.main(["--job=export", f"--workdir={workdir}", *small])
    files = json.loads((workdir / "export" / "files.json").read_text())
    assert files["stablehlo"]["step"] == STEPS


def config_of(name):
    return f"--config={ROOT / 'configs' / name}.py"


def losses(workdir):
    return [r for r in log.read(workdir / "metrics.jsonl") if "loss" in r]


def test_pruned_weights_are_zero_in_the_average_and_the_file_too(tmp_path):
    """The run begins with a file of weights, which is gone when the killed one continues."""
    options = dict(variant="tiny", norm=True, stem_strides=1, conv10_relu=False)
    net = models.make("squeezenet", num_classes=10, **options)
    init = jax.jit(lambda key: net.init(key, np.zeros((1, 8, 8, 1), np.float32)))
    file = tmp_path / "begin.safetensors"
    pretrained.save(file, init(jax.random.key(7)))
    begin = f'--config.init={{"file": "{file}"}}'
    sections = run_py.load_config(ROOT / "configs" / "digits_pruned.py")["update"]
    pruning = dict(sections[1]) | dict(sparsity=0.75, begin=4, end=16, every=4)
    update = f"--config.update={('optim', pruning)!r}"
    arguments = (config_of("digits_pruned"), *TINY, update, begin)
    state = check_continues(tmp_path, arguments, file=file)
    for params in state.params, state.ema["params"]:
        kernels = {
            name: (np.sum(np.asarray(layer["kernel"]) == 0), layer["kernel"].size)
            for name, layer in fires(params).items()
        }
        zeros, sizes = np.sum(list(kernels.values()), 0)
        assert zeros == round(0.75 * sizes)
    shares = magnitude.sparsity(state.params)
    assert shares["conv1/kernel"] == shares["conv10/kernel"] == 0
    check_exports(tmp_path / "whole")


def fires(params):
    """The convolutions of the fire modules, which the config prunes, by name."""
    return {
        f"{fire}/{name}": layer
        for fire, layers in params.items()
        if fire.startswith("fire")
        for name, layer in layers.items()
        if "kernel" in layer
    }


def test_group_lasso_shrinks_the_filters(tmp_path):
    config = config_of("digits_group_lasso")
    sections = run_py.load_config(ROOT / "configs" / "digits_group_lasso.py")
    task, lasso = map(dict, sections["objective"])
    objective = f"--config.objective={(task, lasso | dict(weight=1e-2))!r}"
    state = check_continues(tmp_path, (config, *TINY, objective))
    whole = losses(tmp_path / "whole")
    first, last = whole[0], whole[-1]
    assert last["group_lasso"] < 0.9 * first["group_lasso"]
    expected = first["cross_entropy"] + 1e-2 * first["group_lasso"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    norms = [
        group_lasso.group_norms(x["kernel"], "filters")
        for x in fires(state.params).values()
    ]
    assert np.concatenate(norms).min() > 0  # close to zero, and not at it
    check_exports(tmp_path / "whole")


def test_the_exchange_keeps_each_devices_residual(tmp_path):
    exchange = '--config.exchange={"name": "comm.int8", "block": 16, "smallest": 32}'
    arguments = (config_of("digits_int8_exchange"), *TINY, exchange)
    state = check_continues(tmp_path, arguments, devices=DEVICES)
    residuals = state.extra["int8"]
    assert residuals
    for name, residual in residuals.items():
        assert residual.shape[0] == DEVICES, name
        assert len({row.tobytes() for row in residual}) == DEVICES, name
    check_exports(tmp_path / "whole")


RESIDUALS = """
import jax
import jax.numpy as jnp
from squeeze_jax import methods

def make():
    def exchange(grads, axis_names, own):
        return jax.lax.pmean(grads, axis_names), own.state
    return methods.Exchange(exchange, lambda params: {"kept": jnp.zeros(3)})
"""


@pytest.mark.parametrize("rule", ["mean", "none"])
def test_a_run_continues_on_another_number_of_devices(tmp_path, rule):
    """The states of 2 devices go to 4: the mean residual stays, or equal states are copied."""
    (tmp_path / "mine.py").write_text(RESIDUALS)
    int8 = {"name": "comm.int8", "block": 16, "smallest": 32}
    name = "int8" if rule == "mean" else "mine"
    config = test_run_errors.GOOD | {
        "model": {"name": "squeezenet", "variant": "tiny", "stem_strides": 1},
        "exchange": int8 if rule == "mean" else {"name": str(tmp_path / "mine.py")},
    }
    built = _experiment.build(_experiment.check(config))
    state, said = built.create(), []
    random = np.random.default_rng(0)
    states = {
        name: random.normal(size=(2, *residual.shape[1:])).astype(np.float32)
        for name, residual in state.extra[name].items()
    }
    for step, saved in enumerate((states, jax.tree.map(np.ones_like, states))):
        with contextlib.closing(Checkpoints(tmp_path / str(step))) as checkpoints:
            own = {name: jax.tree.map(jnp.asarray, saved)}
            checkpoints.save(state._replace(extra={**state.extra, **own}), 0)
            checkpoints.wait()
            if rule == "none" and step == 0:
                with pytest.raises(UserError, match="no rule to continue on 4: use 2"):
                    _transitions.resume(built, checkpoints, said.append)
                continue
            _, restored = _transitions.resume(built, checkpoints, said.append)
        jax.tree.map(
            lambda x, shape: chex.assert_equal((x.shape, x.sharding), (shape.shape, shape.sharding)),
            restored.state,
            built.abstract(),
        )  # fmt: skip
        for key, residual in restored.state.extra[name].items():
            np.testing.assert_allclose(residual.mean(0), saved[key].mean(0), atol=1e-6)
    line = f"exchange   {name}: the states of 2 devices are carried over to 4"
    assert said == [line] * (2 if rule == "mean" else 1)


def test_learned_step_sizes_continue_and_export(tmp_path):
    forward = "--config.forward=({'name': 'quantize.lsq', 'start': 8, 'observe': 4, 'rate': 0.01},)"
    arguments = (config_of("digits_qat"), *TINY, forward)
    state = check_continues(tmp_path, arguments)
    ranges = state.extra["lsq"]
    assert all(np.isfinite(r["high"]) and r["high"] > r["low"] for r in ranges.values())
    steps = state.params["methods"]["lsq"]
    assert set(ranges) == {n.removesuffix("_step") for n in steps if "inputs" in n}
    assert any(np.any(step != 0) for step in steps.values())
    check_exports(tmp_path / "whole")


def test_gradients_compiled_in_pieces_continue(tmp_path):
    """The drawn widths are a function of the run's key and the step."""
    model = (
        '{"name": "slimmable", "variant": "tiny", "switches": (0.25, 0.5, 0.75, 1.0)}'
    )
    arguments = (config_of("digits_slimmable"), *TINY, f"--config.model={model}")
    check_continues(tmp_path, arguments)
    records = losses(tmp_path / "whole")
    assert all({"smallest", "random"} <= r.keys() for r in records)
    check_exports(tmp_path / "whole")
