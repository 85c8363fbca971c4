"""`run.py` and bad input: one line, before any work; work directories that are another's."""

import json
import os
import pathlib

import pytest

import run as run_py
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.export import Exported
from squeeze_jax.jobs import _workdir, export

ROOT = pathlib.Path(__file__).parents[1]


def refusal(*arguments):
    """The one line that a call ends with, from a process of its own only where asked for."""
    with pytest.raises(Reported) as caught:
        run_py.main(list(map(str, arguments)))
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.status == 1
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.stpes=5"], "unknown key config.stpes; did you mean 'steps'"),
        (["--config.steps=many"], "config.steps = 'many' (str) should be int"),
        (
            ["--config.model.name=squeznet"],
            "unknown model 'squeznet'; did you mean 'squeezenet'",
        ),
        (
            ['--config.model={"name": "bert", "variant": "tiny"}'],
            "config.model.name = 'bert' reads tokens, but config.data gives images",
        ),
        (
            ["--config.model.variant=1.2"],
            "unknown variant of squeezenet '1.2'; did you mean '1.1'",
        ),
        (
            ["--config.model.num_classes=9"],
            "config.model.num_classes = 9, but the data's labels go up to 9",
        ),
        (["--config.data.source.name=digit"], "unknown"),
        (
            ["--config.data.flop=True"],
            "unknown key config.data.flop; did you mean 'flip'",
        ),
        (
            [
                '--config.data.source={"name": "tfds", "dataset": "cifar10", "data_dir": "/nowhere"}'
            ],
            "/nowhere",
        ),
        (["--job=fitt"], "unknown job 'fitt'; did you mean 'fit'"),
        (
            ["--config=configs/digit.py"],
            "no config file configs/digit.py; did you mean 'configs/digits.py'",
        ),
        (
            ["--workdir=/proc/nothing"],
            "cannot write to the work directory /proc/nothing",
        ),
        (["--config.batch=0"], "config.batch = 0 should be at least 1"),
        (["--config.sharding.data=3"], "does not make the 4 devices there are"),
        (["--config.accumulate=7"], "config.batch = 64 is not divisible by 28"),
        (
            ["--config.checkpoint.keep=0"],
            "config.checkpoint.keep = 0 should be at least 1",
        ),
        (["--config.data.size=1"], "is smaller than a window"),
        (
            ["--config.sharding.rules=(('fire99', 'fsdp'),)"],
            "config.sharding.rules: the rule 'fire99' matches no",
        ),
        (["--config.optim.name=sdg"], "should be one of 'sgd'"),
        (
            ["--config.export.formats=('tflight',)"],
            "unknown export format 'tflight'; did you mean 'tflite'",
        ),
        (
            ['--config.exchange={"name": "comm.meen"}'],
            "unknown method of comm 'meen'; did you mean 'mean'",
        ),
        (["--config.steps"], "--config.steps needs a value"),
        (
            ["--job=evaluate", "--workdir=/tmp/no-such-run"],
            "/tmp/no-such-run holds no experiment",
        ),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_that_names_the_culprit(
    arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    if not any(a.startswith("--workdir") for a in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    assert words in refusal(*arguments)
    assert not (tmp_path / "run").exists()


def test_without_a_checkpoint_another_config_does_no_harm(tmp_path):
    """A run that failed before its first checkpoint can be tried again with its mistake mended."""
    first, mended = {"optim": {"lr": 1e30}}, {"optim": {"lr": 0.1}}
    _workdir.begin(tmp_path / "run", first)
    _workdir._locks.popitem()[1].close()
    _workdir.begin(tmp_path / "run", mended)
    _workdir._locks.popitem()[1].close()
    assert _workdir.read(tmp_path / "run") == mended


def test_a_work_directory_has_one_writer(tmp_path):
    _workdir.begin(tmp_path / "run", {})
    _, held = _workdir._locks.popitem()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        _workdir.begin(tmp_path / "run", {})
    held.close()


def test_a_notebook_may_begin_its_work_directory_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for steps, name in enumerate(("run", "run", tmp_path / "run")):
        _workdir.begin(pathlib.Path(name), {"steps": steps})
        assert _workdir.read(tmp_path / "run") == {"steps": steps}
    _workdir._locks.popitem()[1].close()
    assert not _workdir._locks


def test_files_of_an_earlier_step_are_not_measured(tmp_path):
    (tmp_path / "export").mkdir()
    made = Exported("tflite", tmp_path / "export" / "model.tflite", 1, 0.0, 1.0)
    made.path.touch()
    export.note(tmp_path, made, step=3)
    assert export.find(tmp_path, ["tflite"], 3) == [made.path]
    with pytest.raises(
        UserError, match=r"model.tflite is of step 3, the trained network of step 4"
    ):
        export.find(tmp_path, ["tflite"], 4)
    with pytest.raises(UserError, match=r"no exported file of format stablehlo"):
        export.find(tmp_path, ["stablehlo"], 3)


def test_a_config_of_an_earlier_version_reads_by_todays_names(tmp_path):
    """Losses in train, the losses' parameters under objective, and two keys that have other names now."""
    old = dict(
        objective=[dict(name="train.cross_entropy"), dict(name="distill.hidden")],
        optim=dict(lr=0.1, freeze=["^objective/hidden/", "conv1"]),
        transforms=[],
        weights=[dict(name="quantize.lsq")],
    )
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert _workdir.read(tmp_path) == dict(
        objective=(dict(name="losses.cross_entropy"), dict(name="distill.hidden")),
        optim=dict(lr=0.1, freeze=("^methods/hidden/", "conv1")),
        forward=(dict(name="quantize.lsq"),),
    )
