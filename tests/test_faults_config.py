"""Config files that fail, values out of range, paths with ~, work directories of own images, and runs with more steps.

Every bad input ends in one line before any work starts, and makes no work directory.
"""

import inspect
import json
import math
import os
import pathlib
import types
import typing

import chex
import jax
import numpy as np
import pytest

import run
from squeeze_jax import data, files, models, registry
from squeeze_jax.errors import Reported, UserError, shown
from squeeze_jax.export import class_names
from squeeze_jax.jobs import (
    _compilation,
    _experiment,
    _pretrained,
    _schemas,
    _settings,
    _teachers,
    _transitions,
    _workdir,
    fit,
)
from squeeze_jax.ranges import Count, Fraction
from squeeze_jax.train import optim, sharding
from squeeze_jax.train.checkpoint import Checkpoints

PACKAGES = ("models", "data.tasks", "data.sources", "train.losses", "prune", "quantize")
PACKAGES += ("distill", "comm", "nas", "jobs")
SCHEMAS = {
    "config": _experiment.Experiment,
    "config.data": data.make,
    "config.model": models.make,
    "config.optim": optim.make,
    "config.sharding": sharding.make_mesh,
    "config.checkpoint": Checkpoints,
    "config.compilation": _compilation.enable,
    "config.init": _pretrained.network_from_init,
    "config.distill": _teachers.Settings,
    "config.distill.teachers": _pretrained.find_network,
}
for package in PACKAGES:
    for name in registry.names(f"squeeze_jax.{package}"):
        module = registry.load(f"squeeze_jax.{package}", name)
        schema = getattr(module, "Settings" if package == "jobs" else "make", None)
        if schema is not None:
            SCHEMAS[f"{package}.{name}"] = schema

CONFIG = """
def get_config():
    model = dict(name="squeezenet", variant="tiny", stem_strides=1)
    return dict(
        data=dict(source=dict(name="digits"), size=8, crop="none"),
        model=model, optim=dict(lr=0.01, schedule="constant"), batch=16, steps=4,
    )
"""


def parameters(fn):
    """(name, annotation, default) of a schema's parameters."""
    hints = registry.annotations(fn)
    for p in inspect.signature(fn).parameters.values():
        if p.kind is not p.VAR_KEYWORD and p.name in hints:
            yield p.name, hints[p.name], p.default


def leaves(hint, declared=False):
    """(type, whether a range is declared for it) of all types inside an annotation; a bare container is a leaf."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from leaves(args[0], True)
    elif origin is typing.Literal:
        return
    elif args:
        for arg in args:
            if arg is not Ellipsis:
                yield from leaves(arg, False)
    else:
        yield hint, declared


def kinds(hint):
    """The types that a value itself may have, items of containers left out."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return kinds(args[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(kinds, args))
    return {origin or hint}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_number_in_a_signature_has_a_range(name):
    without = [
        key
        for key, hint, _ in parameters(SCHEMAS[name])
        for kind, declared in leaves(hint)
        if kind in (int, float, tuple, list) and not declared
    ]
    assert not without
    signature = inspect.signature(SCHEMAS[name]).parameters.values()
    named = {p.name for p in signature if p.kind is not p.VAR_KEYWORD}
    assert named <= set(registry.annotations(SCHEMAS[name]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_number_is_unbounded_and_defaults_are_in_range(name):
    for key, hint, default in parameters(SCHEMAS[name]):
        if isinstance(default, str | int | float | tuple | None):
            assert registry.fault(default, hint, key) == ""
        if kinds(hint) & {int, float}:
            for value in (math.nan, math.inf, -math.inf, 1e39, 2**31, -(2**31) - 1):
                if float in kinds(hint) and value == 2**31:
                    continue  # a large learning rate is absurd, but a number
                wrong = registry.fault(value, hint, f"config.{key}")
                unbounded = (
                    value == -(2**31) - 1 and registry.fault(-1.0, hint, "") == ""
                )
                assert wrong.startswith(f"config.{key} = ") or unbounded, (key, value)


@pytest.mark.parametrize(
    ("name", "section", "words"),
    [
        ("config.checkpoint", dict(use="oldest"), "'oldest' (str) should be one of"),
        ("config.checkpoint", dict(keep=0), "keep = 0 should be at least 1"),
        ("data.tasks.images", dict(workers=10000), "= 10000 should lie in [0, 256]"),
        ("data.tasks.images", dict(size=(8, 0)), "size[1] = 0 should lie in [1,"),
        ("data.tasks.images", dict(mean=(0.5, math.nan)), "mean[1] = nan should be"),
        ("data.tasks.images", dict(pad=10000), "pad = 10000 should lie in [0, 1024]"),
        ("jobs.export", dict(formats=("tflite", "tflite")), "names 'tflite' twice"),
        ("jobs.export", dict(formats=("tflite", 3)), "formats[1] = 3 (int) should be"),
        ("jobs.export", dict(check=10**9), "= 1000000000 should lie in [1, 100000]"),
        ("jobs.export", dict(calibration=0), "calibration = 0 should lie in [1, 100"),
        ("jobs.export", dict(int8_agreement=2), "= 2 should lie in [0, 1]"),
        ("jobs.cost", dict(weight_bits=(("a", 65),)), "weight_bits[0][1] = 65 should"),
        ("jobs.benchmark", dict(runs=-1), "runs = -1 should lie in [1, 1000000]"),
        ("config.optim", dict(momentum=1.5), "momentum = 1.5 should lie in [0, 1)"),
        ("config.optim", dict(b1=1.5), "b1 = 1.5 should lie in [0, 1)"),
        ("config.optim", dict(b2=1.0), "b2 = 1.0 should lie in [0, 1)"),
        ("config.optim", dict(lr=math.inf), "lr = inf should be a finite number"),
        ("config.optim", dict(eps=0), "eps = 0 should be positive"),
        (
            "config.optim",
            dict(eps=1e-60),
            "eps = 1e-60 should be at least 1.2e-38",
        ),
        (
            "models.bert",
            dict(epsilon=1e-60),
            "epsilon = 1e-60 should be at least 1.2e-38",
        ),
        ("config.optim", dict(decay=1e30), "decay = 1e+30 should lie in [0, 1000]"),
        (
            "config",
            dict(ema=0.99999999999),
            "ema = 0.99999999999 should be further from 1: it is 1 in float32",
        ),
        (
            "jobs.benchmark",
            dict(runs=2**31 - 1),
            "runs = 2147483647 should lie in [1, 1000000]",
        ),
        (
            "jobs.latency_table",
            dict(seconds=1e30),
            "seconds = 1e+30 should lie in [0, 3600]",
        ),
        ("jobs.export", dict(tolerance=1e30), "tolerance = 1e+30 should lie in (0, 1]"),
        ("config.optim", dict(lr=1e30), "lr = 1e+30 should lie in (0, 1000000]"),
        ("config.optim", dict(boundaries=(0.5, 1)), "boundaries[1] = 1 should lie in"),
        ("config.optim", dict(decay_rules=(("a", "b"),)), "decay_rules[0][1] = 'b'"),
        ("models.squeezenet", dict(width=0), "width = 0 should lie in (0, 100]"),
        ("models.squeezenet", dict(dropout=1), "dropout = 1 should lie in [0, 1)"),
        ("models.bert", dict(dropout=1), "dropout = 1 should lie in [0, 1)"),
        ("models.bert", dict(layers=0), "layers = 0 should lie in [1, 1000]"),
        ("models.mobilenet_v3", dict(stem_strides=(2, 0)), "stem_strides[1] = 0"),
        ("config.model", dict(widths={"a": -3}), "widths['a'] = -3 should be at least"),
        ("config", dict(steps=-5), "steps = -5 should not be negative"),
        ("config", dict(seed=2**31), "seed = 2147483648 should be at most 2147483647"),
        ("config", dict(seeds=(1, 2, 1)), "seeds = (1, 2, 1) names 1 twice"),
        ("config", dict(ema=1), "ema = 1 should lie in [0, 1)"),
        ("config", dict(forward=({}, 3)), "forward[1] = 3 (int) should be dict"),
        ("quantize.lsq", dict(activation_bits=1), "activation_bits = 1 should"),
        ("prune.narrow", dict(keep=1.0), "keep = 1.0 should lie in (0, 1)"),
        ("distill.hidden", dict(teacher=-1), "teacher = -1 should lie in [0, 63]"),
        ("config.init", dict(workdir="a" * 300), "should be a path: names up to 255"),
        ("data.sources.folder", dict(root=""), "should be a path, not empty"),
        ("data.sources.folder", dict(root="x/" * 2500), "4095 in all"),
        ("config.init", {3: 4}, "has the key 3"),
    ],
)
def test_a_value_out_of_range_is_one_line(name, section, words):
    with pytest.raises(UserError) as caught:
        registry.check(SCHEMAS[name], section, name)
    line = str(caught.value)
    assert words in line
    assert line.startswith(name)
    assert len(line) < 400


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("jobs.export", dict(int8_agreement=0)),
        ("quantize.lsq", dict(activation_bits=0)),
        ("config.optim", dict(lr=1, momentum=0, clip=0, decay_rules=[["k", 0]])),
        ("config.model", dict(name="x", widths={"a": 1})),
        ("config.init", dict(workdir="")),
        ("models.squeezebert", dict(groups=({"query": 4}, 2))),
    ],
)
def test_the_ends_of_ranges_are_valid(name, section):
    registry.check(SCHEMAS[name], section, name, given=("steps",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module", ":1: ModuleNotFoundError: No module named 'no_such"),
        ("\nraise RuntimeError('sorry\\nthere')", ":2: RuntimeError: sorry"),
        ("def get_config():\n    return 1 / 0", ":2: ZeroDivisionError: division by"),
        ("def get_config():\n  x = {}\n  return x.a", ":3: AttributeError: 'dict'"),
        ("def get_config():\n    raise SystemExit(3)", ":2: SystemExit: 3"),
        ("def get_config():\n    raise KeyboardInterrupt", ":2: KeyboardInterrupt: no"),
        ("raise BaseException('no')", ":1: BaseException: no"),
        ("def get_config():\n    return 5", "get_config() returned 5 (int), it should"),
        ("def get_config():\n    return [1]", "returned [1] (list), it should return"),
        ("def get_config():\n    pass", "returned None (NoneType), it should"),
        ("def get_config(task):\n    return {}", "needs an argument: --config="),
        (
            "def get_config(task, size):\n    return {}",
            "needs 2 arguments (task, size), and the command line gives one",
        ),
        ("def get_config(*names):\n    return 5", "returned 5 (int)"),
        ("get_config = 3", "has no function get_config()"),
        ("", "has no function get_config()"),
        ("def get_config(:", ":1: invalid syntax"),
        ('{"data": true}', ":1: NameError: name 'true' is not defined"),
        ("def f():\n    f()\nf()", "RecursionError"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "mend the file"),
        (b"\x00\x00\x00", "mend the file"),
    ],
)
def test_a_config_file_that_fails_is_one_line(text, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        run.load_config(str(path))
    line = str(caught.value)
    assert str(path) in line
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=."], ". is a folder, not a config file"),
        (["--config=" + "x" * 5000], "should be a path: names up to 255 bytes"),
        (["--config="], "--config = '' should be a path, not empty"),
        (["--config=~nobody-here/x.py"], "there is no home directory ~nobody-here"),
        (["--config.weights=({'name':5},)"], "unknown key config.weights"),
        (["--config.forward=({'name':5},)"], "with a name such as 'comm.mean'"),
        (["--config.data={1:2}"], "config.data has the key 1"),
        (["--config.data={'a':{1,2}}"], "config.data.a = {1, 2} (set) should be a n"),
        (["--config.steps={[]:1}"], "is no value of Python (unhashable type"),
        (["--config.steps=" + "[" * 5000], "config.steps = '[[["),
        (["--config.optim.lr.x=1"], "x is no part of a value, only of a section"),
        (
            ["--config.phases=({'steps': 3},)", "--config.phases.1.steps=2"],
            "1 is no place in a tuple: choose 0 to 0",
        ),
        (
            ["--config.seeds=(1, 2)", "--config.seeds.last=2"],
            "last is no place in a tuple: choose 0 to 1",
        ),
        (["--config..x=1"], "has an empty name between its dots"),
        (["--config.data=5"], "config.data = 5 (int) should be dict"),
        (["--config.steps=nan"], "config.steps = 'nan' (str) should be int"),
        (["--config.optim.momentum=1.5"], "config.optim.momentum = 1.5 should lie in"),
        (["--config.checkpoint.use=oldest"], "config.checkpoint.use = 'oldest' (str)"),
        (
            ["--config.optim.decay_rules=(('(', 1.0),)"],
            "'(' is not a regular expression",
        ),
        (["--config.model.width=0"], "config.model.width = 0 should lie in (0, 100]"),
        (["--config.export.int8_agreement=2"], "= 2 should lie in [0, 1]"),
        (["--config.objective={'name':'losses.cross_entropy','weight':-1}"], "-1"),
        (
            ["--config.batch=2000"],
            "config.batch = 2000 is more than the 1,437 training",
        ),
        (["--config.batch=1000000000"], "config.batch = 1000000000 is more than the"),
        (["--config.steps=1000000000000000000"], "should be at most 2147483647"),
        (["--config.accumulate=1000000000000000000"], "should be at most 2147483647"),
        (["--config.data.size=16384"], "training needs at least"),
        (["--config.model.width=100"], "training needs at least"),
        (["--config.phases=({'steps': 3, 'optim': 5},)"], "[0].optim = 5 should be a"),
        (["--config.objective={'name':'losses.span'}"], "the loss span does not fit"),
        (["--job=fit", "photo.jpg"], "the job fit takes no files: photo.jpg"),
        (["photo.jpg"], "photo.jpg: files are for --job=predict"),
        (["--job=predict", ""], "'' is no file, folder or text: leave it out"),
        (["--job=predict", " "], "' ' is no file, folder or text: leave it out"),
        (["--wrkdir=x"], "unknown flag --wrkdir; did you mean '--workdir'"),
        (["-x"], "unknown flag -x"),
        (["--processes=two"], "argument --processes: invalid int value: 'two'"),
        (["--processes=0"], "--processes=0 should be at least 1"),
        (["--coordinator="], "--coordinator= is empty: write HOST:PORT"),
        (["--coordinator=myhost", "--processes=2"], "= 'myhost' should be HOST:PORT"),
        (["--coordinator=here:abc"], "HOST:PORT, with a port from 1 to 65535"),
        (["--coordinator=:99999999"], "HOST:PORT, with a port from 1 to 65535"),
        (["--coordinator=" + "c" * 6000], "ccc' should be HOST:PORT"),
        (["--job="], "unknown job ''; choose from"),
        (["--workdir"], "argument --workdir: expected one argument"),
        (["--workdir="], "--workdir = '' should be a path, not empty"),
        (["--workdir=" + "w" * 256], "should be a path: names up to 255 bytes"),
        (["--job=" + "j" * 5000], "unknown job 'jjj"),
        (["--config.model.name=" + "m" * 5000], "unknown model 'mmm"),
        (["--config.optim.name=" + "o p" * 2000], "config.optim.name = 'o po p"),
        (
            ["--config.data.source.name=line\nbreak"],
            "unknown data source 'line\\nbreak'",
        ),
    ],
    ids=lambda v: v[-1][:40] if isinstance(v, list) else "",
)
def test_a_bad_command_line_is_one_line_and_makes_no_folder(
    arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    memory = (16 * 10**9, "a machine")
    monkeypatch.setattr(sharding, "device_memory", lambda: memory)
    with pytest.raises(Reported) as caught:
        run.main(arguments)
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    assert len(line) < 900
    assert caught.value.status == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "hint", "example"),
    [
        ("tflite", tuple[str, ...], "tuple of str, such as ('tflite',)"),
        (3, str | tuple[str, ...], "str or tuple of str, such as ('a', 'b')"),
        (2, tuple[Fraction, ...], "tuple of float, such as (0.25, 0.5)"),
        ("x", tuple[tuple[str, bool], ...], "(str, bool), such as (('a', True),)"),
        ("5", int | tuple[Count, Count], "(int, int), such as (1, 2)"),
        ("x", tuple[dict, ...], "tuple of dict"),
        ({"a": 1}, tuple[dict, ...], "tuple of dict, such as ({'a': 1},)"),
    ],
)
def test_an_error_about_a_tuple_has_an_example(value, hint, example):
    line = registry.fault(value, hint, "config.key")
    assert line.startswith("config.key = ")
    assert line.endswith(example)


def test_differences_of_phases_are_named_one_by_one():
    before = ({"steps": 100}, {"optim": {"lr": 0.1}, "begin": {"name": "a"}})
    now = ({"steps": 300}, {"optim": {"lr": 0.1}, "begin": {"name": "b"}})
    assert list(_workdir._differences("phases", before, now)) == [
        "phases.0.steps = 100 there, 300 here",
        "phases.1.begin.name = 'a' there, 'b' here",
    ]
    assert list(_workdir._differences("phases", now, now)) == []


def digits():
    """A config of the digits and a small network."""
    return {
        "data": {"source": {"name": "digits"}, "size": 8, "resize": "crop"},
        "model": {"name": "squeezenet", "variant": "tiny", "stem_strides": 1},
        "optim": {"lr": 0.1},
        "steps": 1,
        "batch": 16,
    }


LOSSES = sorted({*registry.names("squeeze_jax.train.losses")} - {"cross_entropy"})


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_does_not_fit_the_data_is_one_line(name):
    config = digits() | {"objective": {"name": f"losses.{name}"}}
    with pytest.raises(UserError) as caught:
        _experiment.build(_experiment.check(config))
    line = str(caught.value)
    assert line.startswith(f"config.objective: the loss {name} does not fit: ")
    assert "; it reads logits " in line
    assert line.endswith(
        "; the network returns float32 [16, 10], the data give image uint8 [16, 8, 8, 1], label int32 [16], mask bool [16]"
    )
    assert "\n" not in line


OWN_LOSS = """
def make():
    def loss(logits, endpoints, batch):
        return WHAT, {}
    return loss
"""
OWN_NETWORK = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x), {}

def make():
    return Net()
"""


def test_own_losses_and_networks_that_do_not_fit_are_one_line(tmp_path):
    for name, text in (
        ("index.py", OWN_LOSS.replace("WHAT", "endpoints['none'].mean()")),
        ("rows.py", OWN_LOSS.replace("WHAT", "logits[:, 0]")),
        ("mean.py", OWN_LOSS.replace("WHAT", "logits.mean()")),
        ("net.py", OWN_NETWORK),
    ):
        (tmp_path / name).write_text(text)

    def line(loss, **changes):
        own = {"objective": {"name": str(tmp_path / loss)}, **changes}
        with pytest.raises(UserError) as caught:
            _experiment.build(_experiment.check(digits() | own))
        return str(caught.value)

    place = f"{tmp_path / 'index.py'}:4: KeyError: 'none'"
    assert f"the loss index does not fit: {place}; the network" in line("index.py")
    assert "the loss rows returns float32 [16]: return one float" in line("rows.py")
    network = {"name": str(tmp_path / "net.py")}
    wrong = line("mean.py", model=network)
    assert wrong.startswith("the metric classification of config.data does not fit")
    assert wrong.endswith("; the network returns float32 [16, 8, 8, 10]")


@pytest.mark.usefixtures("four_devices")
def test_training_that_no_memory_holds_is_one_line(monkeypatch):
    """A device gets 4 of 16 images: 64 bytes as stored, 256 as float32, 5 of label and mask."""
    built = _experiment.build(_experiment.check(digits()))
    monkeypatch.setattr(sharding, "device_memory", lambda: (1000, "a watch"))
    with pytest.raises(UserError, match=r"1.3 kB for a batch of inputs, and a watch h"):
        fit.ready(built)
    monkeypatch.undo()
    assert sharding.device_memory()[0] > 10**7
    fit.ready(built)


def test_errors_show_long_values_in_short():
    assert shown("short") == "'short'"
    assert len(shown("x" * 5000)) < 110
    assert shown(10**5000) == "<int>"
    line = str(UserError(f"no file {'y' * 5000}: look elsewhere\nplease"))
    assert len(line) < 200
    assert line.startswith("no file yyy")
    assert line.endswith("yyy: look elsewhere\\nplease")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory and, beside it, an empty current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_the_home_directory_is_expanded_wherever_paths_enter(home):
    (home / "mine.py").write_text(CONFIG)
    run.main(["--job=cost", "--config=~/mine.py", "--workdir=~/runs/a"])
    assert list((home / "runs" / "a").iterdir())
    assert not list(pathlib.Path.cwd().iterdir())
    assert run.input_of("~/a.jpg") == f"{home}/a.jpg"
    assert run.input_of("~ 5 degrees") == "~ 5 degrees"
    config = dict(
        init=dict(workdir="~/runs/a"),
        distill=dict(teachers=[dict(folder="~/t")], cache="~/cache"),
        data=dict(files=("~", pathlib.Path("~/b"), "$HOME/c", "a~b")),
        forward=[dict(name="~/noise.py", scale=np.float32(0.5), bits=np.int64(4))],
    )
    assert _settings.canonical(config) == dict(
        init=dict(workdir=f"{home}/runs/a"),
        distill=dict(teachers=(dict(folder=f"{home}/t"),), cache=f"{home}/cache"),
        data=dict(files=(f"{home}", f"{home}/b", "$HOME/c", "a~b")),
        forward=(dict(name=f"{home}/noise.py", scale=0.5, bits=4),),
    )
    with pytest.raises(UserError, match=r"config.a\[0\] = '~nobody-here/x': there is"):
        _settings.canonical(dict(a=("~nobody-here/x",)))
    classes = dict(data=dict(source=dict(classes=("~", "~5", "road"))))
    assert _settings.canonical(classes) == classes  # names, not paths
    assert _settings.canonical(dict(classes="~/names")) == {"classes": f"{home}/names"}


def test_a_work_directory_with_a_tilde_in_its_config_is_the_same_experiment(home):
    """Earlier versions kept ~ as it was written."""
    source = dict(name="folder", root="~/photos")
    kept = dict(data=dict(source=source, resize="crop"))
    (home / "config.json").write_text(json.dumps(kept))
    now = _settings.canonical(kept)
    assert _workdir.read(home) == now
    _workdir.check_same_experiment(home, now)


def test_folders_in_the_environment_are_expanded(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "~")
    monkeypatch.setenv("TFDS_DATA_DIR", "/~/data")
    files.expand_environment()
    names = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "TFDS_DATA_DIR")
    assert [os.environ[n] for n in names] == [f"{home}/jax", str(home), "/~/data"]


def test_a_refused_run_leaves_no_work_directory(tmp_path, monkeypatch):
    """Whatever refuses it: the line comes from within the job."""

    def refuse(built, workdir, inputs):
        (workdir / "checkpoints").mkdir()
        raise UserError("these classes are others")

    monkeypatch.setattr(fit, "run", refuse)
    with pytest.raises(UserError, match="these classes are others"):
        run.main(["--job=fit", f"--workdir={tmp_path / 'runs' / 'a'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", ["metrics.jsonl", "checkpoints/5", "mine.txt"])
def test_a_refused_run_keeps_what_it_has_done(tmp_path, kept):
    _workdir.begin(tmp_path / "run", dict(steps=3))
    (tmp_path / "run" / kept).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / kept).touch()
    _workdir.abandon(tmp_path / "run")
    assert (tmp_path / "run" / kept).exists()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_refused_run_keeps_the_users_folder(tmp_path):
    _workdir.begin(tmp_path, dict(steps=3))
    _workdir.abandon(tmp_path)
    assert tmp_path.exists()


def test_the_librarys_functions_expand_the_home_directory(home):
    (home / "a.tflite").touch()
    assert class_names.read("~/a.tflite") == ()
    assert files.path("~/a") == home / "a"
    assert files.path(pathlib.Path("~/a")) == home / "a"
    with pytest.raises(UserError, match=f"{home}/none"):
        models.load("~/none")
    with pytest.raises(UserError, match="no-such-model"):
        models.options("~/no-such-model")


def resolved(*arguments):
    """The config's source of images and the work directory of a command line."""
    config, workdir = run.config_and_workdir(*run.parse(list(arguments)))
    return config["data"]["source"], str(workdir)


def test_own_images_have_a_work_directory_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = dict(name="folder", root="x/flowers/")
    override = f"--config.data.source={own}"
    assert resolved(override) == (own, "runs/flowers")
    assert resolved() == (dict(name="digits"), "runs/digits")
    tfds = dict(name="tfds", dataset="cifar10")
    assert resolved(f"--config.data.source={tfds}") == (tfds, "runs/cifar10")
    (tmp_path / "mine.py").write_text(CONFIG)
    assert resolved("--config=mine.py", override) == (own, "runs/mine")
    here = dict(name="folder", root=".")
    assert resolved(f"--config.data.source={here}") == (here, f"runs/{tmp_path.name}")


def test_a_job_names_the_work_directory_that_nobody_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for named in "--workdir=runs/a", "":
        with pytest.raises(UserError):
            run.main(["--job=evaluate", *named.split()])
    assert capsys.readouterr().err == "work dir   runs/digits\n"


def test_a_bare_command_does_not_go_on_with_own_images(tmp_path, monkeypatch):
    """Earlier versions put own images into runs/digits."""
    monkeypatch.chdir(tmp_path)
    config, _ = run.config_and_workdir(*run.parse([]))
    begun = json.loads(json.dumps(config))
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    path = tmp_path / "runs" / "digits" / "config.json"
    path.write_text(json.dumps(begun | {"steps": 7}))
    assert run.config_and_workdir(*run.parse([]))[0]["steps"] == 7
    begun["data"]["source"] = dict(name="folder", root="flowers")
    path.write_text(json.dumps(begun))
    with pytest.raises(
        UserError,
        match=r"holds a network of the dataset .*flowers, not of digits: choose",
    ):
        run.main([])
    source, workdir = resolved("--workdir=runs/digits")
    assert source["root"] == "flowers"
    assert workdir == "runs/digits"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["images", "texts", "tfds", "glue"])
def test_other_data_of_the_same_name_need_a_named_work_directory(
    tmp_path, monkeypatch, capsys, kind, named
):
    monkeypatch.chdir(tmp_path)
    arguments = []
    if kind == "texts":
        arguments = [
            "--config=" + str(pathlib.Path(run.__file__).parent / "configs/texts.py")
        ]
        key, paths = "data.train", ("a/reviews.csv", "b/reviews.csv")
    elif kind == "tfds":
        arguments = ["--config.data.source={'name': 'tfds', 'dataset': 'cifar10'}"]
        key, paths = "data.source.data_dir", ("a/tfds", "b/tfds")
    elif kind == "glue":
        (tmp_path / "mine.py").write_text(
            "def get_config():\n"
            "    return dict(data=dict(name='glue', task='sst2', tokenizer='t'), optim={'lr': 1}, batch=8, steps=3)\n"
        )
        arguments, key = ["--config=mine.py"], "data.folder"
        paths = ("a/glue", "b/glue")
    else:
        arguments = ["--config.data.source={'name': 'folder', 'root': 'a/pets'}"]
        key, paths = "data.source.root", ("a/pets", "b/pets")
    first, second = ([*arguments, f"--config.{key}={path}"] for path in paths)
    config, workdir = run.config_and_workdir(*run.parse(first))
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    assert run.config_and_workdir(*run.parse(first))[1] == workdir
    if not named:
        with pytest.raises(
            UserError,
            match=rf"dataset .*{paths[0]}, not of .*{paths[1]}: choose another",
        ):
            run.config_and_workdir(*run.parse(second))
        return
    changed, _ = run.config_and_workdir(*run.parse([*second, f"--workdir={workdir}"]))
    _workdir.check_same_experiment(workdir, changed)
    _workdir._report_changes(workdir, changed)
    assert capsys.readouterr().out == f"data       {paths[1]} in place of {paths[0]}\n"


def newest(workdir):
    """The newest checkpoint of a run: its step and all arrays of its state."""
    built = _experiment.build(_experiment.check(_workdir.read(workdir)))
    opened = Checkpoints(workdir / "checkpoints", best="eval_accuracy", read_only=True)
    restored = opened.restore(lambda note: built.abstract())
    opened.close()
    return jax.device_get(restored.state)


def contents(folder):
    """{path: bytes} of all files of a folder, without the lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p: p.read_bytes() for p in paths}


def test_more_steps_continue_the_run_to_the_bit(tmp_path, monkeypatch, capsys):
    """With a constant learning rate, 3 steps and then 5 are 5 steps at once; the last phase may grow too."""
    (tmp_path / "mine.py").write_text(CONFIG)

    def fit(folder, steps):
        common = [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / folder}"]
        run.main(["--job=fit", *common, f"--config.steps={steps}"])
        while _workdir._locks:
            _workdir._locks.popitem()[1].close()
        return capsys.readouterr().out

    fit("whole", 5)
    fit("parts", 3)
    printed = fit("parts", 5)
    assert "steps      5 in place of 3: after step 3 the learning rate" in printed
    assert "continuing from the checkpoint of step 3" in printed
    state = newest(tmp_path / "parts")
    assert int(state.step) == 5
    chex.assert_trees_all_equal(state, newest(tmp_path / "whole"))
    with pytest.raises(
        UserError, match=r"= 4, but .*parts is trained for 5 steps alre"
    ):
        fit("parts", 4)
    assert _workdir.read(tmp_path / "parts")["steps"] == 5

    # A run that is refused later leaves every file as it was.
    def refuse(*_):
        raise UserError("the checkpoint does not fit")

    before = contents(tmp_path / "parts")
    monkeypatch.setattr(_transitions, "resume", refuse)
    with pytest.raises(UserError, match="the checkpoint does not fit"):
        fit("parts", 7)
    assert contents(tmp_path / "parts") == before


def test_the_last_phase_may_become_longer_and_others_not(tmp_path):
    config = digits() | dict(phases=(dict(steps=2), dict(steps=3)))
    del config["steps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    _workdir.check_same_experiment(tmp_path, config)
    _workdir.check_same_experiment(
        tmp_path, config | dict(phases=(dict(steps=2), dict(steps=9)))
    )
    different = r"holds another experiment: phases\.0\.steps = 2 there, 4 here"
    with pytest.raises(UserError, match=different):
        _workdir.check_same_experiment(
            tmp_path, config | dict(phases=(dict(steps=4), dict(steps=3)))
        )
    with pytest.raises(
        UserError, match=r"config.steps = 4, but .* for 5 steps already"
    ):
        _workdir.check_same_experiment(
            tmp_path, config | dict(phases=(dict(steps=2), dict(steps=2)))
        )


def test_overrides_reach_into_tuples():
    config = dict(
        steps=8,
        update=("optim", dict(name="prune.magnitude", begin=1, end=450)),
        phases=(dict(steps=400), dict(steps=200)),
    )
    for argument in "update.1.end=60", "phases.0.steps=40", "phases.1.steps=20":
        run.override(config, f"--config.{argument}")
    run.override(config, "--config.steps=None")
    assert config == dict(
        update=("optim", dict(name="prune.magnitude", begin=1, end=60)),
        phases=(dict(steps=40), dict(steps=20)),
    )
    run.override(config, "--config.exchange=None")
    assert config["exchange"] is None


def overridden(config, *arguments):
    return run.overridden(config, [f"--config.{a}" for a in arguments])


def test_none_removes_a_key_that_cannot_be_none(capsys):
    config = dict(
        data=dict(name="glue", task="mrpc", train="train"),
        model=dict(name="squeezenet", variant="1.1", pools=()),
        optim=dict(lr=0.1, clip=1.0),
        steps=600,
        objective={"name": "losses.span"},
        export=dict(check=8),
    )
    changed = overridden(
        config,
        "phases=({'steps':40},)",
        "steps=None",
        "optim.clip=None",
        "model.variant=None",
        "model.pools=None",
        "data.train=None",
        "objective=None",
        "export.check=None",
    )
    assert changed == dict(
        data=dict(name="glue", task="mrpc", train=None),
        model=dict(name="squeezenet", pools=None),
        optim=dict(lr=0.1),
        phases=(dict(steps=40),),
        objective=None,
        export={},
    )
    assert capsys.readouterr().out.splitlines() == [
        "without    config.steps, which falls back to the sum over config.phases",
        "without    config.optim.clip, which falls back to its default, 0.0",
        "without    config.model.variant, which falls back to its default, '1.1'",
        "without    config.export.check, which falls back to its default, 128",
    ]


@pytest.mark.parametrize(
    ("argument", "old", "value"),
    [
        ("data.text=('question','answer')", "text", ("question", "answer")),
        ("data.label=['a','b']", "label", ("a", "b")),
        ("data.label=1", "label", "1"),
        ("data.text=(half", "text", "(half"),
        ("data.train=('a','b')", "x.tsv", "('a','b')"),  # which is no union
        ("phases.0.data.text=('q','a')", "text", ("q", "a")),
        ("objective.0.layers=((1,2),)", "uniform", ((1, 2),)),
        ("extract.arch={'d': 1}", "largest", {"d": 1}),
    ],
)
def test_text_that_replaces_a_string_may_be_another_value_of_the_key(argument, old, value):  # fmt: skip
    names = argument.partition("=")[0].split(".")
    config = dict(data=dict(name="texts"), objective=(dict(name="distill.hidden"),), phases=(dict(data={}),), extract={})  # fmt: skip
    run.placed(config, names, "--config", repr(old), None)
    run.override(config, f"--config.{argument}")
    assert _schemas._entry(_settings.canonical(config), names) == value


def test_paths_of_texts_may_be_replaced_by_a_tuple():
    changed = overridden(dict(data=dict(name="pretraining", files="/a.txt", eval="/b")), "data.files=('/x.txt',)", "data.eval=0.1")  # fmt: skip
    assert changed["data"] == dict(name="pretraining", files=("/x.txt",), eval=0.1)
    source = dict(name="pairs", root="/r", classes="/classes.txt")
    changed = overridden(dict(data=dict(source=source)), "data.source.classes=('a','b')")  # fmt: skip
    assert changed["data"]["source"]["classes"] == ("a", "b")


def test_a_config_that_contains_itself_is_one_line():
    config = dict(steps=1)
    config["optim"] = dict(lr=0.1, more=config)
    with pytest.raises(UserError, match="config contains itself"):
        _settings.canonical(config)
