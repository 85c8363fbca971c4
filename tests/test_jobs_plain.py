"""A plain network as a work directory: every job goes on from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run as run_py
from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _plain, _workdir, evaluate
from squeeze_jax.methods import Plain
from squeeze_jax.prune import narrow
from squeeze_jax.train.state import State

CONFIG = dict(
    data=dict(source=dict(name="digits"), size=8),
    optim=dict(lr=0.1, warmup=0),
    steps=2,
    batch=8,
    export=dict(formats=("stablehlo",), check=8),
)
OPTIONS = dict(name="squeezenet", variant="tiny", num_classes=10, stem_strides=1)


@pytest.fixture(scope="module")
def narrowed():
    """(options, variables) of a network that a transition has made narrower."""
    net = models.make(**OPTIONS)
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(example.shape))["params"]
    state = State(np.int32(0), jax.device_get(params), {}, ())
    transition = narrow.make(("fire2/squeeze1x1", "fire3/expand3x3"))
    plain = Plain(lambda options: models.make(**options), example)
    options, state = transition.apply(dict(OPTIONS), state, plain)
    return options, {"params": state.params}


def trained(workdir):
    config = _workdir.read(workdir)
    return jax.device_get(
        evaluate.trained_state(_experiment.build_trained(workdir, config), workdir)
    )


def test_every_job_goes_on_from_it(narrowed, tmp_path, capsys):
    options, variables = narrowed
    _plain.write(tmp_path, CONFIG, options, variables)
    state = trained(tmp_path)
    assert state.step == 0
    for name, array in tree.flatten(variables["params"]).items():
        np.testing.assert_array_equal(tree.flatten(state.params)[name], array)
    for job in "evaluate", "export", "cost":
        run_py.main([f"--job={job}", f"--workdir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "step 0 · test accuracy" in printed
    assert "agreement 100.0%" in printed
    size = tree.size(variables["params"])
    assert f"{size:,}" in printed or f"{size / 1000:.3g} k" in printed
    run_py.main(["--job=fit", f"--workdir={tmp_path}"])
    after = trained(tmp_path)
    assert after.step == 2
    kernel = after.params["fire2"]["squeeze1x1"]["kernel"]
    assert kernel.shape == variables["params"]["fire2"]["squeeze1x1"]["kernel"].shape
    assert np.any(kernel != variables["params"]["fire2"]["squeeze1x1"]["kernel"])


def test_what_does_not_fit_is_named_and_nothing_is_written(narrowed, tmp_path):
    _, variables = narrowed
    with pytest.raises(
        UserError,
        match=r"the variables: weights do not fit: .*fire2.*list=model.squeezenet",
    ):
        _plain.write(tmp_path / "run", CONFIG, OPTIONS, variables)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(narrowed, tmp_path):
    _plain.write(tmp_path, CONFIG, *narrowed)
    with pytest.raises(UserError, match="holds a run already"):
        _plain.write(tmp_path, CONFIG, *narrowed)
