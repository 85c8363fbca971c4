"""`run.py` and bad input: one line, before any work; work directories that are another's."""

import errno
import json
import os
import pathlib
import shutil

import pytest

import run as run_py
from squeeze_jax import machine, registry
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.export import build, listing, parity, runnable
from squeeze_jax.jobs import _experiment, _model_json, _places, _workdir, export, fit

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("four_devices")


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


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space", "a/b"), 1, "no space left on the disk in a"),
        (OSError(errno.EFBIG, "File too large"), 1, "no space left on the disk"),
        (
            ValueError("OUT_OF_RANGE: Error writing x [OS error 27: File too large]"),
            *(1, "no space left on the disk"),
        ),
        (
            RuntimeError("Error writing '/runs/a/5/x' [No space left on device]"),
            *(1, "no space left on the disk in /runs/a/5/x"),
        ),
        (
            OSError("Not enough disk space. Needed: Unknown size"),
            *(1, "no space left on the disk"),
        ),
        (OSError(errno.EMFILE, "Too many open files", "c"), 1, "c: Too many open fil"),
        (PermissionError(errno.EACCES, "Permission denied", "d"), 1, "d: Permission"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, "the reader of the output"),
        (MemoryError(), 1, "out of memory: choose a smaller config.batch"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n x"),
            *(1, "out of memory (Out of memory allocating 9 bytes.): choose a smaller"),
        ),
    ],
    ids=str,
)
def test_what_the_machine_causes_is_one_line(error, status, words):
    explained = machine.explain(error)
    assert words in str(explained)
    assert explained.status == status
    assert machine.explain(ValueError("of the code")) is None


def test_without_a_checkpoint_another_config_does_no_harm(tmp_path):
    """A run that failed before its first checkpoint can be tried again with its mistake mended."""
    first, mended = {"optim": {"lr": 1e30}}, {"optim": {"lr": 0.1}}
    _workdir.begin(tmp_path / "run", first)
    _workdir._locks.popitem()[1].close()
    _workdir.begin(tmp_path / "run", mended)
    _workdir._locks.popitem()[1].close()
    assert _workdir.read(tmp_path / "run") == first  # it may still be refused
    _workdir.write_config(tmp_path / "run")
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
        _workdir.write_config(tmp_path / "run")
        assert _workdir.read(tmp_path / "run") == {"steps": steps}
    _workdir._locks.popitem()[1].close()
    assert not _workdir._locks


def listed(workdir, key, name, step):
    """An exported file and its entry in the listing."""
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(bytes(range(256)))
    listing.record(folder, key, {"path": name, "step": step}, path)
    return path


def test_files_of_an_earlier_step_are_not_measured(tmp_path):
    path = listed(tmp_path, "tflite", "model.tflite", 3)
    assert export.find_files(tmp_path, ["tflite"], 3) == ([path], {})
    with pytest.raises(
        UserError, match=r"model.tflite is of step 3, the trained network of step 4"
    ):
        export.find_files(tmp_path, ["tflite"], 4)
    with pytest.raises(UserError, match=r"no exported file of format stablehlo"):
        export.find_files(tmp_path, ["stablehlo"], 3)


@pytest.mark.parametrize("suffix", ["tflite", "stablehlo"])
def test_a_flipped_bit_of_an_exported_file_is_noticed(tmp_path, suffix):
    path = listed(tmp_path, suffix, f"model.{suffix}", 3)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: its checksum is not that of"):
        export.find_files(tmp_path, [suffix], 3)
    with pytest.raises(UserError, match=r"is damaged: its checksum is not that of"):
        runnable.open_file(path)


GOOD = {
    "data": {"source": {"name": "digits"}, "size": 8, "resize": "crop"},
    "model": {"name": "squeezenet"},
    "optim": {"lr": 0.1},
    "batch": 4,
    "steps": 3,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "many"}, "config.steps = 'many' (str) should be int"),
        ({"stpes": 3}, "unknown key config.stpes"),
        ({"optim": [1]}, "is no config ("),
        ({"optim": {"lr": "x"}}, "config.optim.lr = 'x' (str) should be float"),
        ({"optim": {"lr": 0.1, "momentun": 0}}, "unknown key config.optim.momentun"),
        ({"phases": 5}, "config.phases = 5 (int) should be tuple of dict"),
        ({"transforms": 5}, "is no config ("),
        ({"data": {"source": {"name": "folder", "root": 5}, "size": 8}}, "root = 5"),
        ({"data": {"source": 5, "size": 8}}, "config.data.source = 5"),
        ({"model": {"name": "squeezenet", "width": -1}}, "config.model.width = -1"),
        ({"sharding": {"dat": 2}}, "unknown key config.sharding.dat"),
        ({"distill": {"cache": 5}}, "config.distill.cache = 5"),
        ({"export": {"formats": 5}}, "config.export.formats = 5"),
        ({"update": ["optim", {"name": "prune.no"}]}, "unknown method of prune 'no'"),
        (b"[1, 2]", "is no config"),
        (b"[" * 100_000, "is not valid JSON (it is nested too deep)"),
    ],
    ids=str,
)
def test_a_config_that_no_config_is_comes_back_from_the_checkpoint(
    change, words, tmp_path, monkeypatch
):
    text = change if isinstance(change, bytes) else json.dumps(GOOD | change).encode()
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    note = {}
    monkeypatch.setattr(_model_json, "checkpoint_note", lambda workdir: note)
    with pytest.raises(UserError, match="; restore it or remove the work dir"):
        _workdir.read(tmp_path)
    note["config"] = GOOD
    with pytest.warns(UserWarning, match="the newest checkpoint's is taken") as caught:
        assert _workdir.read(tmp_path) == GOOD
    (line,) = {str(w.message) for w in caught}
    assert line.startswith(str(tmp_path / "config.json"))
    assert words in line
    assert line.endswith("; the newest checkpoint's is taken")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"name": 5}, "checkpoint": {}},
        {"model": {}, "checkpoint": {}},
        {"model": {"name": "squeezenet"}, "checkpoint": {"keep": "x"}},
        {"model": {"name": "squeezenet"}, "checkpoint": {"kep": 1}},
        {"model": {"name": "squeezenet"}, "checkpoint": 5},
        {"model": {"name": "squeezenet"}, "checkpoint": {}, "classes": [1]},
    ],
    ids=str,
)
def test_a_model_file_of_wrong_values_comes_back_from_the_checkpoint(
    content, tmp_path, monkeypatch
):
    good = {"model": {"name": "squeezenet"}, "checkpoint": {"best": "eval_loss"}}
    (tmp_path / "model.json").write_text(json.dumps(good))
    assert _model_json.read(tmp_path) == good
    (tmp_path / "model.json").write_text(json.dumps(content))
    monkeypatch.setattr(_model_json, "checkpoint_note", lambda workdir: {})
    with pytest.raises(UserError, match="or damaged: run the job fit there again"):
        _model_json.read(tmp_path)
    monkeypatch.setattr(_model_json, "checkpoint_note", lambda _: {"noted": good})
    with pytest.warns(UserWarning, match="the newest checkpoint's is taken"):
        assert _model_json.read(tmp_path) == good


@pytest.mark.parametrize(
    "name", [*_places.FILES, *_places.FOLDERS, "checkpoints/7", "."]
)
def test_what_is_in_the_place_of_a_file_or_folder_is_named(name, tmp_path):
    workdir = tmp_path / "run"
    path = workdir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    wants_file = name in _places.FILES
    wanted = "a file" if wants_file else "a folder"
    for kind in ("other", "pipe", "link", "right"):
        if kind == "other":
            path.mkdir() if wants_file else path.write_bytes(b"")
            words = "a folder" if wants_file else "a file"
        elif kind == "pipe":
            os.mkfifo(path)
            words = "a pipe, a socket or a device"
        elif kind == "link":
            path.symlink_to("nowhere")
            words = "a link that leads nowhere"
        else:
            path.write_bytes(b"") if wants_file else path.mkdir()
            _places.check(workdir)
            break
        with pytest.raises(UserError) as caught:
            _places.check(workdir)
        assert str(caught.value) == (
            f"{path} is {words}, not {wanted}: move it away, or choose another work directory"
        )
        path.rmdir() if kind == "other" and wants_file else path.unlink()


@pytest.mark.parametrize(
    "name",
    ["export/model.tflite", "export/model_my.bin", "latency/tflite_1.json", "latency/times_xla.jsonl"],
)  # fmt: skip
def test_a_folder_in_the_place_of_a_result_is_named(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(
        UserError, match=f"{name} is a folder, not a file: move it away"
    ):
        _places.check(tmp_path)


@pytest.mark.parametrize("job", registry.names("squeeze_jax.jobs"))
def test_every_job_looks_at_the_places_first(job, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    line = refusal(f"--job={job}", f"--workdir={tmp_path}")
    assert line.startswith(f"{tmp_path / 'metrics.jsonl'} is a folder, not a file")
    with pytest.raises(UserError, match="is a folder, not a file"):
        _model_json.read(tmp_path)  # as for config.init and teachers


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"tflite": 1}',
        b'{"tflite": {"step": "3", "path": "model.tflite"}}',
        b'{"tflite": {"step": 3, "path": 5}}',
        b'{"tflite": {"step": 3, "path": "model.tflite", "sha256": "abc"}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_damaged_listing_is_written_anew(tmp_path, content):
    path = listed(tmp_path, "tflite", "model.tflite", 3)
    (tmp_path / "export" / "files.json").write_bytes(content)
    with pytest.raises(UserError, match=r"files.json is damaged; run --job=export"):
        export.find_files(tmp_path, ["tflite"], 3)
    with pytest.warns(UserWarning, match=r"files.json is damaged and written anew"):
        listed(tmp_path, "tflite", "model.tflite", 3)
    assert export.find_files(tmp_path, ["tflite"], 3) == ([path], {})


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_before_it_trains(
    tmp_path, monkeypatch
):
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(fit, "train_phase", lambda *_: pytest.fail("it trains"))
    model = dict(name="squeezenet", variant="tiny", stem_strides=1)
    content = f"def get_config():\n    return {GOOD | dict(model=model)!r}\n"
    (tmp_path / "good.py").write_text(content)
    workdir = tmp_path / "run"
    config = f"--config={tmp_path / 'good.py'}"
    line = refusal("--job=fit", config, f"--workdir={workdir}")
    assert line.startswith("cannot save a step, ")
    assert "no space left in" in line
    assert not workdir.exists()


def test_a_listed_file_without_a_checksum_is_said(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"x")
    content = {"tflite": {"step": 3, "path": "model.tflite"}}
    (tmp_path / "files.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"model.tflite is not verified: .*export it"):
        listing.verify(path)


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


def images(**keys):
    return {"source": {"name": "digits"}, "size": 8, **keys}


@pytest.mark.parametrize(
    ("kept", "resize"),
    [
        (images(), "squash"),
        (images(eval_resize=0), "squash"),
        (images(eval_resize=9), "crop"),
        (images(resize="crop"), "crop"),
        (images(name="segmentation"), None),  # maps are resized as before
        ({"name": "glue", "task": "sst2"}, None),
    ],
)
def test_a_run_of_an_earlier_version_resizes_images_as_it_did(tmp_path, kept, resize):
    (tmp_path / "config.json").write_text(json.dumps({"data": kept}))
    config = _workdir.read(tmp_path)
    assert config["data"].get("resize") == resize
    assert config["data"] | kept == config["data"]


def test_phases_of_an_earlier_version_resize_images_as_they_did(tmp_path):
    phases = [dict(steps=1), dict(steps=1, data=dict(eval_resize=9)), dict(steps=1)]
    old = {"data": images(), "phases": phases}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = _workdir.read(tmp_path)
    assert config["data"]["resize"] == "squash"
    assert [p.get("data", {}).get("resize") for p in config["phases"]] == [
        None,
        "crop",
        None,
    ]


def test_a_run_keeps_how_its_images_are_resized(tmp_path):
    """Its config file and its checkpoints say so, whatever the default of a later version is."""
    config = {"data": images(), "optim": {"lr": 0.1}, "batch": 1, "steps": 1}
    assert _experiment.check(config).config()["data"]["resize"] == "crop"
    _workdir.begin(tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"] == images(resize="crop")
    _workdir.check_same_experiment(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config))  # an earlier version's
    with pytest.raises(UserError, match=r"add --config\.data\.resize=squash to go on"):
        _workdir.check_same_experiment(tmp_path, config)
    _workdir.check_same_experiment(tmp_path, config | {"data": images(resize="squash")})


def test_a_rejected_file_does_not_end_the_main_job(tmp_path, capsys, monkeypatch):
    """No file agrees by 200%: the integer one is rejected, the other is exported and measured."""

    def compare(*args, int8_agreement, **more):
        return parity.compare(*args, int8_agreement=2.0, **more)

    monkeypatch.setattr(build, "compare", compare)
    arguments = [
        f"--workdir={tmp_path}",
        '--config.model={"name": "squeezenet", "variant": "tiny"}',
        "--config.steps=4",
        "--config.batch=16",
        "--config.export.formats=('tflite_int8', 'tflite')",
        "--config.benchmark.runs=3",
    ]
    with pytest.raises(export.Rejected, match="tflite_int8 rejected") as ended:
        run_py.main(arguments)
    assert ended.value.status == 4
    printed = capsys.readouterr().out
    assert "rejected   model_int8.tflite disagrees with the live model" in printed
    assert "tflite_int8, rejected" in printed
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows[1:]] == [
        "model.tflite",
        "tflite_int8, rejected",
    ]
    assert rows[1]["latency_ms"]["p50"] > 0
    assert "at least 200.0% wanted" in rows[2]["why"]
    run_py.main([*arguments, "--job=benchmark"])
    assert "tflite_int8, rejected" in capsys.readouterr().out


def test_a_method_that_fails_in_evaluation_alone_leaves_no_work_directory(tmp_path):
    """Training would go on to the first evaluation."""
    own = tmp_path / "trains_only.py"
    own.write_text(
        "from squeeze_jax.methods import Forward\n"
        "def make():\n"
        "    def change(params, own):\n"
        "        if not own.train: raise RuntimeError('no evaluation')\n"
        "        return params\n"
        "    return Forward(reparametrize=change)\n"
    )
    forward = f'--config.forward=({{"name": "{own}"}},)'
    with pytest.raises(RuntimeError, match="no evaluation"):
        run_py.main(["--job=fit", f"--workdir={tmp_path / 'run'}", forward])
    assert not (tmp_path / "run").exists()
