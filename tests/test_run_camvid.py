"""The segmentation of configs/camvid_fcn.py end to end: killed, resumed, evaluated and exported."""

import os
import pathlib
import signal
import subprocess
import sys
import zipfile

import chex
import jax
import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from squeeze_jax.jobs import _experiment, _workdir, evaluate, export
from squeeze_jax.train import log
from tests.devices import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    "--config=configs/camvid_fcn.py",
    '--config.model={"name": "fcn", "variant": "tiny", "dilated": 2}',
    "--config.data.size=(24, 32)",
    "--config.steps=32",
    "--config.batch=4",
    "--config.optim.warmup=2",
    "--config.log_every=1",
    "--config.save_every=5",
    "--config.eval_every=0",
    "--config.ema=0.9",
)


@pytest.fixture(scope="module")
def archive(shared, tmp_path_factory):
    """The first 16 training and 6 test images of CamVid with their targets."""
    path = tmp_path_factory.mktemp("camvid") / "camvid.zip"
    source = shared / "data" / "camvid" / "camvid_480x360_webp90.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w") as part:
        names = sorted(whole.namelist())
        for folder, count in ("train", 16), ("test", 6):
            for kind in f"{folder}/", f"{folder}annot/":
                for name in [n for n in names if n.startswith(kind)][:count]:
                    part.writestr(name, whole.read(name))
    return path


def start(workdir, archive, cache):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    source = f"--config.data.source.path={archive}"
    command = [sys.executable, "-u", ROOT / "run.py", "--job=fit", *TINY]
    return subprocess.Popen(
        [*map(str, command), source, f"--workdir={workdir}"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trained(workdir):
    config = _workdir.read(workdir)
    built = _experiment.build(_experiment.check(config))
    return built, jax.device_get(evaluate.trained_state(built, workdir))


def test_killed_and_resumed_ends_the_same_scores_and_exports(archive, tmp_path):
    states, cache = [], tmp_path / "cache"
    for kill in False, True:
        workdir = tmp_path / f"killed_{kill}"
        process = start(workdir, archive, cache)
        if kill:
            for line in process.stdout:
                if line.startswith("step 11/"):
                    break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = start(workdir, archive, cache)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        assert ("continuing from the checkpoint of step" in printed) == kill
        built, state = trained(workdir)
        states.append(state)
    chex.assert_trees_all_equal(*states)

    # Evaluation is scikit-learn's of the live network's predictions.
    live = jax.jit(export.inference_function(built, state))
    labels, predicted, batches = [], [], list(built.data.eval(6))
    for batch in batches:
        counts = batch["target"] != 255
        found = np.asarray(live({"image": batch["image"]})).argmax(-1)
        labels.append(batch["target"][counts])
        predicted.append(found[counts])
    expected = jaccard_score(
        np.concatenate(labels), np.concatenate(predicted), average="macro"
    )
    (recorded,) = [
        r for r in log.read(workdir / "metrics.jsonl") if "eval_mean_iou" in r
    ]
    assert abs(recorded["eval_mean_iou"] - expected) < 1e-3

    export.run(built, workdir)
    assert list((workdir / "export").glob("*.tflite"))
