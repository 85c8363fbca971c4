"""`run.py` as a user meets it: real processes, killed, stopped, and joined; test_run_errors.py has bad input."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import run as run_py
from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _workdir, evaluate, predict
from squeeze_jax.train import log
from tests.devices import xla_flags

pytestmark = pytest.mark.usefixtures("compiled_once", "four_devices")
ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24
TINY = (
    '--config.model={"name": "squeezenet", "variant": "tiny", "norm": True, "stem_strides": 1, "conv10_relu": False}',
    f"--config.steps={STEPS}",
    "--config.batch=16",
    "--config.data.size=8",
    "--config.data.pad=1",
    "--config.optim.warmup=2",
    "--config.log_every=1",
    "--config.save_every=5",
    "--config.eval_every=0",
    "--config.ema=0.9",
)


def start(*arguments, devices=1, more=(), **options):
    """Starts run.py on so many simulated devices; `more` is for its environment."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        **dict(more),
    }
    command = [sys.executable, "-u", ROOT / "run.py", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(
        list(map(str, command)), env=environment, cwd=ROOT, **pipes, **options
    )


def finish(process):
    """Its exit status and everything it printed."""
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, printed


def run(*arguments, **options):
    return finish(start(*arguments, **options))


def fit(workdir, *more):
    return ["--job=fit", f"--workdir={workdir}", *TINY, *more]


def read_until(process, step):
    """Reads the progress lines until that of `step` or a later one, and returns what was printed so far."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        now = re.match(r"step (\d+)/", line)
        if now and int(now[1]) >= step:
            return "".join(printed)
    raise AssertionError("ended before step " + str(step) + ":\n" + "".join(printed))


def final(workdir):
    """The state of the newest checkpoint, on the host."""
    config = _workdir.read(workdir)
    config["sharding"] = {"data": 4}  # of the devices of this process
    return jax.device_get(
        evaluate.trained_state(_experiment.build(_experiment.check(config)), workdir)
    )


def seen(workdir):
    """Which examples each step saw, as the log tells."""
    return [
        (r["step"], r["examples_crc32"])
        for r in log.read(workdir / "metrics.jsonl")
        if "examples_crc32" in r
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    status, printed = run(*fit(workdir))
    assert status == 0, printed
    (workdir / "printed").write_text(printed)
    return workdir


def test_says_what_it_will_do_and_logs_each_step(whole):
    plan = (whole / "printed").read_text()
    for line in (
        r"data +1,437 train \+ 360 test images at 8x8x1, 10 classes",
        r"model +squeezenet tiny: 1,\d{3} parameters, [\d,]+ MACs per image",
        r"mesh +1 x cpu: data 1 x fsdp 1 x tensor 1",
        r"batch +16 = 16 a device",
        rf"training +{STEPS} steps \(0.3 epochs\), sgd, lr 0.1 cosine, float32",
        r"memory +\d+ MiB a device",
    ):
        assert re.search(line, plan), line
    records = log.read(whole / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert all(
        0 <= r["input_wait"] <= 1 and r["examples_per_s"] > 0
        for r in records
        if "loss" in r
    )
    assert len({r["examples_crc32"] for r in records if "loss" in r}) == STEPS
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))


def test_killed_and_run_again_ends_the_same_to_the_bit(whole, tmp_path):
    """Killed three times: before anything was saved, and twice after."""
    for kill_at in (3, 11, 17):
        process = start(*fit(tmp_path))
        read = read_until(process, kill_at)
        assert "continuing from the checkpoint of step" in read or kill_at < 17
        process.send_signal(signal.SIGKILL)
        finish(process)
    status, printed = run(*fit(tmp_path))
    assert status == 0, printed
    assert "continuing from the checkpoint of step" in printed
    chex.assert_trees_all_equal(final(tmp_path), final(whole))
    assert seen(tmp_path) == seen(whole)


def test_asked_to_stop_it_saves_and_says_so(whole, tmp_path):
    """By either signal, one after the other."""
    begins = None
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):
        process = start(*fit(tmp_path))
        read = read_until(process, step)
        assert begins is None or begins in read
        process.send_signal(number)
        status, printed = finish(process)
        assert status == 128 + number
        (stopped,) = re.findall(
            r"stopped at step (\d+) and saved; run the same command again", printed
        )
        begins = f"continuing from the checkpoint of step {stopped}"
    status, printed = run(*fit(tmp_path))
    assert status == 0
    assert begins in printed
    chex.assert_trees_all_equal(final(tmp_path), final(whole))
    assert seen(tmp_path) == seen(whole)


def agree(workdir, other):
    ours, theirs = final(workdir), final(other)
    for part in ("params", "stats", "ema"):
        chex.assert_trees_all_close(
            getattr(ours, part), getattr(theirs, part), atol=1e-5
        )


def start_two(workdir):
    """Starts two processes that train together."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = [f"--coordinator=localhost:{port}", "--processes=2"]
    # Without optimization XLA begins several reductions at once, in another order in each process.
    as_users = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_COMPILATION_CACHE_DIR": ""}
    return [
        start(*fit(workdir, *joined, f"--process={i}"), more=as_users) for i in range(2)
    ]


def test_two_processes_stop_together_and_train_what_one_trains(whole, tmp_path):
    """Asked by a signal to either of them; then they go on to the end."""
    both = start_two(tmp_path)
    read_until(both[0], 3)
    both[1].send_signal(signal.SIGTERM)
    stops = [finish(process) for process in both]
    steps = {re.search(r"stopped at step (\d+)", printed)[1] for _, printed in stops}
    assert [status for status, _ in stops] == [128 + signal.SIGTERM] * 2
    assert len(steps) == 1
    for status, printed in map(finish, start_two(tmp_path)):
        assert status == 0, printed
    agree(tmp_path, whole)


def test_sharded_over_devices_it_trains_what_one_device_trains(whole, tmp_path):
    """Stopped on 2 x 2 devices in the middle, continued as 4, evaluated on one."""
    mesh = "--config.sharding.fsdp={}"
    process = start(*fit(tmp_path, mesh.format(2)), devices=4)
    read_until(process, 7)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    status, printed = run(*fit(tmp_path, mesh.format(4)), devices=4)
    assert status == 0, printed
    assert "data 1 x fsdp 4 x tensor 1" in printed
    assert "continuing from the checkpoint" in printed
    agree(tmp_path, whole)
    status, printed = run("--job=evaluate", f"--workdir={tmp_path}", mesh.format(1))
    assert status == 0, printed
    one = (whole / "printed").read_text()
    accuracy = r"test accuracy (0\.\d{4})"
    assert re.search(accuracy, printed)[1] == re.search(accuracy, one)[1]


def test_predict_prints_five_labels_of_each_image(whole, tmp_path):
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / name)
    status, printed = run(
        "--job=predict", f"--workdir={whole}", tmp_path / "a.png", tmp_path / "b"
    )
    assert status == 0, printed
    assert printed.index("a.png") < printed.index("c.png")
    rows = re.findall(r"^ +(\d+\.\d)%  (\d)$", printed, re.MULTILINE)
    assert len(rows) == 10
    shares = [float(share) for share, _ in rows]
    assert shares[:5] == sorted(shares[:5], reverse=True)
    assert len({label for _, label in rows[:5]}) == 5


def test_predict_prints_names_that_are_not_utf_8_and_ends_with_a_status(
    whole, tmp_path
):
    """One image has an answer and one has none, on a terminal that takes ASCII only."""
    for name, image in (b"caf\xe9.png", True), ("é.png".encode(), False):
        path = tmp_path / os.fsdecode(name)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        if not image:
            path.write_bytes(b"no image")
    strict = {"PYTHONIOENCODING": "ascii:strict"}
    arguments = ("--job=predict", f"--workdir={whole}", tmp_path)
    status, printed = run(*arguments, more=strict)
    assert status == 1
    assert rf"{tmp_path}/caf\udce9.png" in printed
    assert rf"cannot decode image {tmp_path}/\xe9.png" in printed
    assert len(re.findall(r"^ +\d+\.\d%  \d$", printed, re.MULTILINE)) == 5
    assert re.search(
        r"^error: 1 of 2 images have no answer, .*$", printed, re.MULTILINE
    )
    assert "Traceback" not in printed


def test_a_finished_run_is_not_run_again_and_cadences_and_exports_may_change(whole):
    status, printed = run(
        *fit(whole, "--config.log_every=7", "--config.export.check=32")
    )
    assert status == 0, printed
    assert "trained    already" in printed


def test_main_job_measures_every_file_it_exports(tmp_path):
    """The whole way, in small: the table, the JSON and the picture tell the same four rows."""
    small = [
        "--config.export.int8_agreement=0.5",
        "--config.benchmark.runs=5",
        "--config.steps=60",
    ]
    status, printed = run(f"--workdir={tmp_path}", *TINY, *small)
    assert status == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    names = ["live model (JAX)", "model.stablehlo", "model.tflite", "model_int8.tflite"]
    assert [r["model"] for r in report["rows"]] == names
    live, *files = report["rows"]
    for row in files:
        assert row["bytes"] == (tmp_path / "export" / row["model"]).stat().st_size
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"]
        assert row["peak_memory_mb"] > 0
        assert row["model"] in printed
    assert [r["accuracy"] for r in files[:2]] == [
        pytest.approx(live["accuracy"], abs=0.003)
    ] * 2
    assert report["provenance"]["packages"]["jax"] == jax.__version__
    assert report["config"]["steps"] == 60
    with Image.open(tmp_path / "report.png") as picture:
        assert min(picture.size) > 500


def test_a_refusal_is_all_that_is_printed(tmp_path):
    status, printed = run("--config.stpes=5", f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert re.fullmatch(
        r"error: unknown key config.stpes; did you mean 'steps'\?.*\n", printed
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "needs image files or folders"),
        (["nothing.png"], "no such file or folder: nothing.png"),
        (["{empty}"], "holds no image"),
        (["{text}"], "note.png"),
    ],
    ids=["none", "missing", "empty", "corrupt"],
)
def test_predict_names_what_is_no_image(whole, tmp_path, files, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.png").write_text("not a picture")
    places = {"empty": tmp_path / "empty", "text": tmp_path / "note.png"}
    inputs = [f.format(**places) for f in files]
    arguments = ["--job=predict", f"--workdir={whole}", "--config.sharding.data=4"]
    with pytest.raises(UserError, match=words) as caught:
        run_py.main([*arguments, *inputs])
    assert "\n" not in str(caught.value)


def test_a_work_directory_belongs_to_one_experiment(whole):
    words = f"{whole} holds another experiment: optim.lr = 0.1 there, 0.3 here"
    with pytest.raises(UserError, match=words):
        run_py.main(fit(whole, "--config.optim.lr=0.3"))


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    # Without normalisation the second forward pass overflows. With it, NaN may come from the gradients before the loss.
    large = ("--config.model.norm=False", "--config.optim.lr=1e6")
    status, printed = run(*fit(tmp_path, *large, "--config.optim.warmup=0"))
    assert status == 1
    last = printed.strip().splitlines()[-1]
    assert re.match(r"error: the loss is (nan|inf) at step \d+; ", last)
    assert "try a lower config.optim.lr" in last


def test_help_explains_itself():
    status, printed = run("--help")
    assert status == 0
    text = " ".join(printed.split())  # wherever the lines break
    for words in (
        "--config.KEY",
        "--workdir",
        "ship it",
        "--job=NAME --help lists its settings",
        "Ctrl-C",
    ):
        assert words in text


def test_predict_answers_from_the_reparametrized_weights(whole, capsys, tmp_path):
    """With every weight zero (plug point 2) all classes are equally likely."""
    config = _workdir.read(whole) | {"sharding": {"data": 4}}
    built = _experiment.build(_experiment.check(config))
    zero = functools.partial(jax.tree.map, jax.numpy.zeros_like)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    network = built.network._replace(forwards={"zero": methods.forward(zero)})
    predict.run(
        dataclasses.replace(built, network=network), whole, [tmp_path / "a.png"]
    )
    assert capsys.readouterr().out.count(" 10.0%") == 5


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_a_damaged_side_file_is_read_from_the_checkpoint(
    whole, tmp_path, name, content, capsys
):
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    run_py.main(["--job=evaluate", f"--workdir={workdir}"])
    expected = capsys.readouterr().out
    (workdir / name).unlink()
    if content is not None:
        (workdir / name).write_text(content)
    with pytest.warns(UserWarning, match=rf"{name} is .*the newest checkpoint's"):
        run_py.main(["--job=evaluate", f"--workdir={workdir}"])
    assert capsys.readouterr().out == expected
