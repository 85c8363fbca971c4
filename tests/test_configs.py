"""Every config is whole and trains: two steps of its own network on a few of its own kind of images."""

import importlib.util
import pathlib

import numpy as np
import pytest
from PIL import Image

import run as run_py
from squeeze_jax.jobs import _experiment, _settings, fit
from squeeze_jax.train import log

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes of noise, as a folder source of any size and channels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in ("train", 2), ("test", 1):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_trains_two_steps(path, images, tmp_path):
    config = _settings.tuples(run_py.load_config(path))
    if config["data"]["source"]["name"] != "digits":
        config["data"]["source"] = {"name": "folder", "root": str(images)}
    config |= dict(steps=2, batch=8, log_every=1, eval_every=0)
    config["optim"] |= dict(warmup=0, lr=1e-3)
    built = _experiment.build(_experiment.check(config))
    fit.run(built, tmp_path)
    records = log.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 2]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records[:2])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_says_how_to_run_it(path):
    """The docstring is the lab notebook: it has the command."""
    notes = load(path).__doc__
    assert "python run.py" in notes
    assert path.stem == "digits" or f"--config=configs/{path.name}" in notes
