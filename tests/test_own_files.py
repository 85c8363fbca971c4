"""Python files of the user's own, outside of the repository, wherever a config names one of the library's."""

import pathlib
import re
import textwrap

import jax
import numpy as np
import pytest

import run as run_py
from squeeze_jax import data, machine, models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.export import build, process, runnable
from squeeze_jax.jobs import _experiment, _plugs, _workdir, evaluate
from squeeze_jax.jobs import fit as training
from squeeze_jax.train import log

MODEL = """
import flax.linen as nn
from squeeze_jax.nn.conv import Conv
CLASSIFIER = ("scores",)

class Net(nn.Module):
    num_classes: int
    features: int

    @nn.compact
    def __call__(self, x, *, train=False):
        y = nn.relu(Conv(self.features, (3, 3), name="conv")(x))
        return Conv(self.num_classes, (1, 1), name="scores")(y.mean((1, 2), keepdims=True))[:, 0, 0], {"conv": y}

def make(num_classes: int = 10, features: int = 4):
    return Net(num_classes, features)
"""
SOURCE = """
import dataclasses
import numpy as np
from squeeze_jax.data.source import Example, Source

@dataclasses.dataclass(frozen=True)
class Split:
    count: int

    def __len__(self):
        return self.count

    def read(self, indices):
        return [Example(np.full((8, 8, 1), 25 * (i % 10), np.uint8), i % 10, f"own[{i}]") for i in indices]

def make(count: int = 40):
    return Source(tuple("abcdefghij"), 1, Split(count), Split(20))
"""
HALF = """
import jax
import jax.numpy as jnp
from squeeze_jax.methods import Forward

def make(layer: str = "conv"):
    def reparametrize(params, own):
        scale = jnp.exp(own.params["log_scale"])
        return params | {layer: jax.tree.map(lambda w: 0.5 * scale * w, params[layer])}

    def intercept(tap, x, own):
        return x, {"calls": own.state["calls"] + own.train}

    return Forward(
        reparametrize,
        intercept,
        taps=lambda name: name == f"{layer}/inputs",
        init=lambda key, params, taps: {"log_scale": jnp.zeros(())},
        state=lambda params, taps: {"calls": jnp.int32(0)},
    )
"""
FORMAT = """
import numpy as np
import jax
from squeeze_jax.export.formats import stablehlo

INTEGER, NEEDS = False, ()

def convert(fn, inputs, calibration):
    (content, *_) = stablehlo.convert(fn, inputs, calibration).values()
    return {".mine": content}

def load(path, threads):
    return stablehlo.load(path, threads)
"""

TASK = """
import jax
import numpy as np
from squeeze_jax.data import pipeline

class Reader:
    draws = 0

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def still(self, indices):
        label = (indices % 3).astype(np.int32)
        image = np.broadcast_to(label[:, None, None, None], (len(label), 4, 4, 1)).astype(np.float32)
        return dict(image=image, label=label, mask=label >= 0, index=indices.astype(np.int64))

    def random(self, indices, draws):
        return self.still(indices)

    def empty(self, rows):
        batch = self.still(np.zeros(rows, int))
        return batch | dict(mask=np.zeros(rows, bool), index=np.full(rows, -1))

class Levels:
    reads, noun, describe, label_names = "images", "image", "gray levels", ("a", "b", "c")
    model, fixed, metrics = {"num_classes": 3}, True, "./off.py"
    objective = {"name": "losses.cross_entropy"}
    exported = {"image": jax.ShapeDtypeStruct((4, 4, 1), "float32")}

    def __init__(self, count, workers):
        self.num_train, self.num_eval, self.workers = count, 6, workers

    def train(self, batch, seed, start=0, process=(0, 1)):
        reader = Reader(self.num_train)
        return pipeline.training(reader, batch, seed, start, process, workers=self.workers, threads=1)

    def eval(self, batch, process=(0, 1)):
        return pipeline.evaluation(Reader(self.num_eval), batch, process)

    def specs(self, rows):
        shape = jax.ShapeDtypeStruct
        return [dict(image=shape((rows, 4, 4, 1), "float32"), label=shape((rows,), "int32"), mask=shape((rows,), "bool"))]

    def augment(self, key, batch):
        return batch

    def inputs(self, batch):
        return batch["image"]

    def example(self):
        return jax.ShapeDtypeStruct((1, 4, 4, 1), "float32")

def make(count: int = 24, workers: int = 0):
    return Levels(count, workers)
"""
METRIC = """
import jax.numpy as jnp
import numpy as np
from squeeze_jax.train.metrics import Metric

def make(data):
    def measure(logits, batch):
        off = jnp.abs(jnp.argmax(logits, -1) - batch["label"]) * batch["mask"]
        return {"off": off.sum(dtype=jnp.float32), "examples": batch["mask"].sum(dtype=jnp.float32)}, {}

    def score(sums, rows):
        return {"eval_loss": 0.0, "eval_off": sums["off"] / sums["examples"]}

    def agreement(live, found):
        return np.ones(len(live["logits"]))

    return Metric(measure, score, "eval_off", lower=("eval_off",), agreement=agreement)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files, in the current directory."""
    contents = dict(my_model=MODEL, my_source=SOURCE, half=HALF, mine=FORMAT)
    contents |= dict(my_task=TASK, off=METRIC)
    for name, text in contents.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQUEEZE_JAX_OWN_FILES", "")
    return tmp_path


CONFIG = """
def get_config():
    return dict(
        steps={steps}, batch=8, save_every=2, log_every=1,
        data=dict(source=dict(name="./my_source.py"), size=8),
        model=dict(name="./my_model.py", features=6),
        optim=dict(lr=0.1),
        forward=(dict(name="./half.py"),),
        export=dict(formats=("./mine.py",), check=8, calibration=8),
    )
"""


def fit(folder, workdir, steps):
    (folder / "config.py").write_text(CONFIG.format(steps=steps))
    run_py.main(["--job=fit", "--config=config.py", f"--workdir={workdir}"])
    config = _workdir.read(folder / workdir)
    built = _experiment.build_trained(folder / workdir, config)
    return evaluate.trained_state(built, folder / workdir)


def test_a_run_of_own_files_trains_resumes_and_exports(folder, capsys):
    """Model, source, method with parameters and state, and export format; what the method halves is halved everywhere."""
    whole = fit(folder, "whole", 6)
    assert whole.extra["half"]["calls"] == 6
    assert whole.params["methods"]["half"]["log_scale"] != 0
    # Stopped after four steps: the two that are missing come from the checkpoint.
    (folder / "part").mkdir()
    fit(folder, "part", 6)
    for step in 6, 5:
        gone = folder / "part" / "checkpoints" / str(step)
        if gone.exists():
            gone.rename(folder / f"gone{step}")
    again = fit(folder, "part", 6)
    assert "continuing from the checkpoint of step 4" in capsys.readouterr().out
    for name, array in tree.flatten(jax.device_get(whole)).items():
        np.testing.assert_array_equal(
            array, tree.flatten(jax.device_get(again))[name], err_msg=name
        )
    run_py.main(["--job=export", "--workdir=whole"])
    assert (folder / "whole" / "export" / "model.mine").stat().st_size > 0
    assert all(
        np.isfinite(r["loss"]) for r in log.read(folder / "whole" / "metrics.jsonl")[:6]
    )
    # As a network to begin with, the run hands over the weights that it ran with.
    (folder / "config.py").write_text(
        CONFIG.format(steps=1)
        .replace('forward=(dict(name="./half.py"),),', 'init=dict(workdir="whole"),')
        .replace('model=dict(name="./my_model.py", features=6),', "model=dict(),")
    )
    config = run_py.load_config("config.py")
    begun = _experiment.build(_experiment.check(config)).initial_variables()["params"]
    scale = 0.5 * np.exp(whole.params["methods"]["half"]["log_scale"])
    np.testing.assert_allclose(
        begun["conv"]["kernel"], scale * whole.params["conv"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(
        begun["scores"]["kernel"], whole.params["scores"]["kernel"]
    )
    assert "methods" not in begun


def test_worker_processes_read_an_own_source(folder):
    source = data.make(source=dict(name="./my_source.py"), size=8, workers=1, threads=1)
    batches = source.train(8, 0)
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 25 * batch["label"])


def test_the_example_of_the_documentation_runs_resumes_and_exports(folder):
    """Written from docs/methods.md alone: its code, under its own name."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (folder / "noise.py").write_text(code)
    config = CONFIG.replace('dict(name="./half.py")', 'dict(name="./noise.py", layer="conv")')  # fmt: skip

    def run(workdir):
        (folder / "config.py").write_text(config.format(steps=6))
        run_py.main(["--job=fit", "--config=config.py", f"--workdir={workdir}"])
        opened = _experiment.build_trained(
            folder / workdir, _workdir.read(folder / workdir)
        )
        return jax.device_get(evaluate.trained_state(opened, folder / workdir))

    whole = run("whole")
    assert whole.params["methods"]["noise"]["log_scale"] != np.float32(np.log(0.01))
    (folder / "part").mkdir()
    run("part")
    for step in (folder / "part" / "checkpoints").glob("[56]"):
        step.rename(folder / f"gone{step.name}")
    again = run("part")
    for name, array in tree.flatten(whole).items():
        np.testing.assert_array_equal(array, tree.flatten(again)[name], err_msg=name)
    run_py.main(["--job=export", "--workdir=whole"])
    assert (folder / "whole" / "export" / "model.mine").exists()


def test_worker_processes_read_a_task_of_an_own_file(folder):
    """The workers unpickle the reader, a class of the user's file."""
    batches = data.make("./my_task.py", workers=1).train(8, 0)
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


TASK_CONFIG = """
def get_config():
    return dict(
        steps=3, batch=8, eval_every=1,
        data=dict(name="./my_task.py"), model=dict(name="./my_model.py"), optim=dict(lr=0.1),
        checkpoint=dict(keep=1, use="best"),
    )
"""


def test_an_own_metric_chooses_the_best_checkpoint(folder):
    """The score "eval_off" is the best where it is the lowest, as the metric's file says."""
    (folder / "config.py").write_text(TASK_CONFIG)
    run_py.main(["--job=fit", "--config=config.py", "--workdir=levels"])
    workdir = folder / "levels"
    records = log.read(workdir / "metrics.jsonl")
    off = {r["step"]: r["eval_off"] for r in records if "eval_off" in r}
    assert sorted(off) == [1, 2, 3]
    built = _experiment.build_trained(workdir, _workdir.read(workdir))
    assert built.checkpoints["lowest"]
    assert off[int(evaluate.trained_state(built, workdir).step)] == min(off.values())


RETURNED = """
import pathlib
import jax
import jax.numpy as jnp
import numpy as np
from squeeze_jax.train.metrics import Metric

def make(data):
    def measure(logits, batch):
        return {"examples": batch["mask"].sum(dtype=jnp.float32)}, {}

    def score(sums, rows):
        return eval(pathlib.Path("returned.txt").read_text())

    return Metric(measure, score, "eval_off")
"""
SCORES = '{"eval_loss": 0.5, "eval_off": 2.0}'


def test_scores_of_an_own_metric_may_be_scalars_of_numpy_and_jax(folder):
    (folder / "off.py").write_text(RETURNED)
    (folder / "config.py").write_text(TASK_CONFIG)
    scores = """{
        "eval_loss": np.float32(0.5), "eval_off": jnp.bfloat16(2), "eval_a": np.array(3.0), "eval_b": jnp.int32(4),
        "eval_c": 5, "eval_d": np.bool_(True), "eval_e": np.float64("inf"),
    }"""
    (folder / "returned.txt").write_text(scores)
    run_py.main(["--job=fit", "--config=config.py", "--workdir=scalars"])
    (*_, record) = log.read(folder / "scalars" / "metrics.jsonl")
    expected = dict(eval_loss=0.5, eval_off=2.0, eval_a=3.0, eval_b=4.0, eval_c=5.0)
    assert record == expected | dict(step=3, eval_d=1.0, eval_e=float("inf"))
    assert {type(v) for k, v in record.items() if k != "step"} == {float}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "returns None (NoneType) from its function score: return a dict"),
        ("3.0", "returns 3.0 (float) from its function score: return a dict"),
        ("[('eval_loss', 1.0)]", "(list) from its function score: return a dict"),
        (
            "{3: 1.0}",
            "a score named 3: its name should be a string, such as 'eval_off'",
        ),
        ("{'step': 1.0}", "a score named 'step': its name should be another name"),
        ("{'eval_off': 'low'}", "the score 'eval_off' = 'low' (str): return one real"),
        ("{'eval_off': None}", "the score 'eval_off' = None (NoneType): return one"),
        ("{'eval_off': 1j}", "the score 'eval_off' = 1j (complex): return one real"),
        ("{'eval_off': [[1], 2]}", "the score 'eval_off' = [[1], 2] (list): return"),
        ("{'eval_off': np.ones(2)}", "'eval_off' = array([1., 1.]) (ndarray): return"),
        ("{'eval_off': jnp.ones((2, 1))}", "the score 'eval_off' = Array([[1.]"),
        (
            "{}",
            "no score 'eval_loss': its function score should return a number for it",
        ),
        ("{'eval_off': 1.0}", "returns no score 'eval_loss': its function score"),
        (
            "{'eval_loss': 1.0}",
            "returns no score 'eval_off', its headline: its function",
        ),
    ],
)
def test_scores_that_are_no_numbers_are_named_in_one_line(folder, returned, words):
    (folder / "off.py").write_text(RETURNED)
    (folder / "returned.txt").write_text(returned)
    metric = _experiment._make_metric(data.make("./my_task.py"))
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        metric.score({"examples": 6.0}, {})
    assert str(caught.value).startswith("the metric './off.py' of config.data returns ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("returned", ["{'eval_loss': 'low'}", "{'eval_loss': 1.0}"])
def test_scores_that_are_no_numbers_lose_no_training(folder, returned):
    (folder / "off.py").write_text(RETURNED)
    (folder / "returned.txt").write_text(returned)
    (folder / "config.py").write_text(TASK_CONFIG)
    config = _experiment.check(run_py.load_config("config.py"))
    built, workdir = _experiment.build(config), folder / "run"
    with pytest.raises(UserError, match=r"^the metric '\./off\.py' of config\.data"):
        training.run(built, workdir)
    # The run goes on at the step of the first evaluation, which it repeats.
    (folder / "returned.txt").write_text(SCORES)
    training.run(built, workdir)
    records = log.read(workdir / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "eval_off" in r] == [1, 2, 3]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(data=dict(name="./three.py")), r"config\.data\.name = .* without reads"),
        (dict(data=dict(source=dict(name="./three.py"), size=8)), "a int: return a"),
        (dict(model=dict(name="./three.py")), r"a int: return a flax\.linen\.Module"),
        (dict(export=dict(formats=("./three.py",))), "does not define convert"),
        (dict(), r"the metric '\./off\.py' makes a int"),
    ],
    ids=["task", "source", "model", "format", "metric"],
)
def test_an_own_file_that_makes_something_else_is_one_line(folder, section, words):
    (folder / "three.py").write_text("def make(**options):\n    return 3\n")
    if not section:
        (folder / "off.py").write_text("def make(data):\n    return 3\n")
    config = dict(
        data=dict(name="./my_task.py"),
        model=dict(name="./my_model.py"),
        optim=dict(lr=0.1),
        steps=1,
        batch=8,
    )
    with pytest.raises(UserError, match=words) as caught:
        _experiment.build(_experiment.check(config | section))
    assert "\n" not in str(caught.value)


def test_the_runtime_of_the_library_comes_before_a_file_of_its_name(folder):
    (folder / "stablehlo.py").write_text("def make():\n    return None\n")
    registry.load("squeeze_jax.comm", "./stablehlo.py", "method")
    (folder / "model.stablehlo").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be run as stablehlo"):
        runnable.open_file(folder / "model.stablehlo")


def test_an_own_model_is_made_with_its_options(folder):
    net = models.make(name="./my_model.py", num_classes=3)
    assert (net.num_classes, net.features) == (3, 4)
    with pytest.raises(UserError, match=r"unknown key config\.model\.width"):
        models.make(name="./my_model.py", width=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no method at ./bad.py: looked for /"),
        ("def make(:\n", r"bad\.py:1: invalid syntax"),
        ("\nimport nothing_there\n", r"bad\.py:2: ModuleNotFoundError: No module"),
        ("x = 1\n", r"\./bad\.py does not define make"),
        ("def make():\n    return 3\n", r"config\.update\[1\].*makes no gradient"),
        ("def make(a):\n    return 3\n", r"missing key config\.update\[1\]\.a"),
    ],
    ids=["missing", "syntax", "import", "no make", "value", "arguments"],
)
def test_a_bad_own_file_is_one_line(folder, text, words):
    if text is not None:
        (folder / "bad.py").write_text(text)
    config = dict(
        data=dict(source=dict(name="digits"), size=8),
        model=dict(name="squeezenet", variant="tiny"),
        optim=dict(lr=0.1),
        steps=1,
        batch=8,
        update=("optim", dict(name="./bad.py")),
    )
    with pytest.raises(UserError, match=words) as caught:
        _plugs.make_plugs(_experiment.check(config))
    assert "\n" not in str(caught.value)


def test_names_of_the_library_stay_what_they_are():
    with pytest.raises(
        UserError, match=r"did you mean 'squeezenet'.* path of a Python"
    ):
        registry.load("squeeze_jax.models", "squeznet", "model")


def test_a_loss_may_not_take_the_list_s_own_key(folder):
    (folder / "bad.py").write_text("def make(weight: float = 0.5):\n    return print\n")
    section = dict(name="./bad.py", weight=0.1)
    with pytest.raises(UserError, match=r"has a parameter 'weight'.*rename"):
        _plugs.make_method(section, "config.objective[1]", ("weight",))


def test_an_exception_in_the_make_of_an_own_file_names_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("my_update.py").write_text(
        "def make(layer: str):\n    layers = {'conv': 1}\n    return layers[layer]\n"
    )
    section = {"name": "./my_update.py", "layer": "cnv"}
    with pytest.raises(UserError, match=r"my_update\.py:3: KeyError: 'cnv'; mend"):
        _plugs.make_method(section, "config.update[0]")


RAISING = {
    "model": (
        "--config.model={'name': './bad.py'}",
        "def make(num_classes: int = 10):\n    raise KeyError('gone')\n",
        2,
    ),
    "network": (
        "--config.model={'name': './bad.py'}",
        "import flax.linen as nn\nclass Net(nn.Module):\n    @nn.compact\n    def __call__(self, x, *, train=False):\n"
        "        return x.reshape(7, -1), {}\ndef make(num_classes: int = 10):\n    return Net()\n",
        5,
    ),
    "source": (
        "--config.data.source={'name': './bad.py'}",
        "def make():\n    raise KeyError('gone')\n",
        2,
    ),
}


@pytest.mark.parametrize("kind", RAISING)
def test_an_exception_of_an_own_file_in_a_job_is_one_line(folder, kind):
    argument, text, line = RAISING[kind]
    (folder / "bad.py").write_text(text)
    arguments = ["--job=fit", "--workdir=run", "--config.steps=2", argument]
    with pytest.raises(Exception) as caught:
        run_py.main(arguments)
    said = str(machine.explain(caught.value))
    assert said.startswith(f"{folder / 'bad.py'}:{line}: ")
    assert said.endswith("; mend the file")
    assert "\n" not in said


def test_an_exception_of_the_library_keeps_its_traceback(folder):
    """Also if a file of the user's own has called it."""
    (folder / "bad.py").write_text(
        "def make(tree):\n    return tree.name(5)\n\ndef other(tree):\n    return tree.flatten(3, 4)\n"
    )
    module = registry.load("squeeze_jax.models", "./bad.py")
    with pytest.raises(TypeError) as caught:
        module.make(tree)
    assert machine.explain(caught.value) is None
    with pytest.raises(TypeError) as caught:
        module.other(tree)
    assert "bad.py:5: TypeError" in str(machine.explain(caught.value))


def test_an_own_format_that_raises_is_no_file_of_the_others(folder):
    text = "INTEGER, NEEDS = False, ()\ndef convert(fn, inputs, calibration):\n    raise KeyError('gone')\n"
    (folder / "bad.py").write_text(text)
    module = registry.load("squeeze_jax.export.formats", "./bad.py")
    with pytest.raises(process.Crash, match=r"bad\.py:3: KeyError: 'gone'"):
        build._convert_and_run(
            module,
            None,
            "model",
            folder=folder,
            inputs={},
            calibration=None,
            check=None,
            classes=(),
            timeout=1,
        )
