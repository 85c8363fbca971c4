"""Runs of several phases: killed in each of them, continued to the same bits, with the right shapes."""

import json

import chex
import jax
import numpy as np
import pytest

import run as run_py
from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _workdir, evaluate
from squeeze_jax.train import log
from squeeze_jax.train.checkpoint import Checkpoints
from tests import test_run_methods
from tests.test_run_methods import config_of

pytestmark = pytest.mark.usefixtures("compiled_once", "four_devices")
PHASES = (
    dict(steps=12),
    dict(
        steps=10,
        begin=dict(name="prune.narrow", layers=("fire2/squeeze1x1",)),
        optim=dict(lr=0.05),
        batch=8,
    ),
)
TINY = (
    '--config.model={"name": "squeezenet", "variant": "tiny", "norm": True, "stem_strides": 1, "conv10_relu": False}',
    f"--config.phases={PHASES!r}",
    "--config.batch=16",
    "--config.data.size=8",
    "--config.data.pad=1",
    "--config.optim.warmup=2",
    "--config.log_every=1",
    "--config.save_every=4",
    "--config.eval_every=0",
    "--config.ema=0.9",
    "--config.checkpoint.keep=9",
    config_of("digits_shrunk"),
)


def fit(workdir, **options):
    return test_run_methods.fit(workdir, TINY, 1, **options)


def states(workdir):
    """The state that the run has ended with, on the host."""
    config = _workdir.read(workdir) | {"sharding": {"data": 4}}
    built = _experiment.build_trained(workdir, config)
    return jax.device_get(evaluate.trained_state(built, workdir))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    fit(workdir)
    return workdir


@pytest.mark.parametrize(("cut", "kills"), [(4, (12, 17)), (17, ())])
def test_killed_in_any_phase_it_ends_the_same_to_the_bit(whole, tmp_path, cut, kills):
    """From a checkpoint of the first phase, killed at its end and in the second; and from one of the second phase alone."""
    workdir = tmp_path / "run"
    test_run_methods.cut_off(whole, workdir, cut)
    for step in kills:
        fit(workdir, kill_at=step)
    fit(workdir)
    chex.assert_trees_all_equal(states(workdir), states(whole))
    read = [log.read(w / "metrics.jsonl") for w in (workdir, whole)]
    seen = [[(r["step"], r["phase"], r.get("examples_crc32")) for r in rs] for rs in read]  # fmt: skip
    assert seen[0] == seen[1]
    assert [p for _, p, _ in seen[0]] == ["phase 1/2"] * 13 + ["phase 2/2"] * 11


def test_the_second_phase_has_the_narrow_network_and_its_own_settings(whole):
    """4 filters become 2; momentum and average are sliced with them; 8 examples a step and another learning rate."""
    state = states(whole)
    names = tree.flatten(state)
    kernels = {n: a.shape for n, a in names.items() if n.endswith("squeeze1x1/kernel")}
    assert {s[-1] for n, s in kernels.items() if "fire2/" in n} == {2}
    assert {s[-1] for n, s in kernels.items() if "fire3/" in n} == {4}
    assert len([n for n in kernels if "fire2/" in n]) == 3  # params, momentum, average
    records = [r for r in log.read(whole / "metrics.jsonl") if "loss" in r]
    rates = [r["learning_rate"] for r in records]
    assert max(rates[:12]) == pytest.approx(0.1, rel=1e-3)
    assert max(rates[12:]) == pytest.approx(0.05, rel=1e-3)
    assert rates[12] == 0  # its warmup begins anew
    saved = Checkpoints(whole / "checkpoints", read_only=True)
    note = saved.note()
    saved.close()
    assert (note["phase"], note["first"], note["position"]) == (1, 12, 10 * 8)
    assert note["options"]["widths"] == {"fire2/squeeze1x1": 2}


def test_other_jobs_go_on_from_the_narrow_network(whole, tmp_path, capsys):
    run_py.main(["--job=evaluate", f"--workdir={whole}"])
    assert "step 22 · test accuracy" in capsys.readouterr().out
    formats = '--config.export.formats=("stablehlo",)'
    run_py.main(["--job=export", f"--workdir={whole}", formats])
    files = json.loads((whole / "export" / "files.json").read_text())
    assert files["stablehlo"]["step"] == 22
    # As a network to begin with.
    config = _workdir.read(whole) | dict(init=dict(workdir=str(whole)), model={})
    config |= dict(phases=(), steps=9, sharding=dict(data=4))
    built = _experiment.build(_experiment.check(config))
    assert built.options["widths"] == {"fire2/squeeze1x1": 2}
    begun = built.initial_variables()["params"]["fire2"]["squeeze1x1"]["kernel"]
    ours = states(whole).ema["params"]["fire2"]["squeeze1x1"]["kernel"]
    np.testing.assert_array_equal(begun, ours)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ((dict(steps=0),), r"config\.phases\[0\]\.steps = 0 should be an integer"),
        ((dict(steps=2, stps=1),), r"unknown key config\.phases\[0\]\.stps"),
        ((3,), r"config\.phases\[0\] = 3 \(int\) should be dict"),
        (
            (dict(steps=2, begin=dict(name="prune.narrow", layers=("a",))),),
            "a transition stands between two phases",
        ),
        ((dict(steps=2), dict(steps=2, batch=0)), "config.batch = 0 should be"),
        ((dict(steps=2), dict(steps=2, ema="x")), "config.ema = 'x'"),
    ],
)
def test_bad_phases_are_one_line(tmp_path, phases, words):
    with pytest.raises(UserError, match=words) as caught:
        run_py.main(
            [
                "--job=fit",
                f"--workdir={tmp_path / 'run'}",
                *TINY,
                f"--config.phases={phases!r}",
            ]
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (dict(name="prune.narow"), "unknown method of prune 'narow'"),
        (dict(name="prune.narrow"), r"missing key config\.phases\[1\]\.begin\.layers"),
        (
            dict(name="prune.narrow", layers=("fire7/squeeze1x1",)),
            "has no layer 'fire7/squeeze1x1'; did you mean",
        ),
        (dict(name="comm.mean"), "makes no transition between phases"),
    ],
    ids=["name", "key", "layer", "plug point"],
)
def test_a_bad_transition_is_found_before_the_first_phase(tmp_path, begin, words):
    phases = (dict(steps=4), dict(steps=4, begin=begin))
    arguments = ["--job=fit", f"--workdir={tmp_path}", *TINY]
    with pytest.raises(UserError, match=words):
        run_py.main([*arguments, f"--config.phases={phases!r}"])
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_steps_of_the_config_may_not_contradict_the_phases(tmp_path):
    with pytest.raises(UserError, match=r"steps of config\.phases add up to 22"):
        run_py.main(["--job=fit", f"--workdir={tmp_path}", *TINY, "--config.steps=7"])


SUPERNET = (
    config_of("ofa_digits"),
    '--config.phases=({"steps": 5}, {"steps": 6, "begin": {"name": "nas.sort_channels"}, "gradients": {"name": "nas.once_for_all", "random": 1, "choices": {"expand": (3,)}}, "optim": {"lr": 0.05}})',
    "--config.batch=8",
    "--config.data.size=8",
    "--config.data.pad=1",
    "--config.optim.warmup=0",
    "--config.log_every=1",
    "--config.save_every=2",
    "--config.checkpoint.keep=9",
)


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("supernet")
    test_run_methods.fit(workdir, SUPERNET, 1)
    return workdir


def test_a_supernet_killed_in_any_phase_ends_the_same_to_the_bit(supernet, tmp_path):
    """From a checkpoint of the first phase, killed in the second, which has drawn random networks."""
    workdir = tmp_path / "run"
    test_run_methods.cut_off(supernet, workdir, 2)
    test_run_methods.fit(workdir, SUPERNET, 1, kill_at=9)
    test_run_methods.fit(workdir, SUPERNET, 1)
    assert "once_for_all" in states(workdir).params["methods"]
    chex.assert_trees_all_equal(states(workdir), states(supernet))


def test_a_supernet_on_four_devices_is_that_on_one(supernet, tmp_path):
    """The second phase, with batches split over all devices and parameters over two. Only sums are rounded in another order."""
    workdir = tmp_path / "run"
    test_run_methods.cut_off(supernet, workdir, 5)
    sharding = ("--config.sharding.data=2", "--config.sharding.fsdp=2")
    test_run_methods.fit(workdir, (*SUPERNET, *sharding), 4)
    one, four = (tree.flatten(states(w).params) for w in (supernet, workdir))
    for name, array in one.items():
        np.testing.assert_allclose(four[name], array, atol=1e-3, err_msg=name)
