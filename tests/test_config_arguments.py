"""A config may take an argument: `--config=configs/glue_minilm.py:mrpc`."""

import pathlib

import pytest

import run
from squeeze_jax import models
from squeeze_jax.data import glue
from squeeze_jax.errors import UserError

CONFIGS = pathlib.Path(run.__file__).parent / "configs"
BEGINS = """
def get_config(kind="digits"):
    if kind == "bad":
        raise ValueError("no kind 'bad'")
    model = dict(name="squeezenet", variant="1.1", stem_strides=1)
    optim = dict(name="sgd", lr=0.1)
    return dict(data=dict(source=dict(name=kind), size=16), model=model, optim=optim, batch=8, steps=1)
"""


@pytest.mark.parametrize("name", ["glue_minilm.py", "glue_squeezebert.py"])
@pytest.mark.parametrize("task", glue.TASKS)
def test_every_task_of_glue_has_its_config(name, task):
    config = run.load_config(f"{CONFIGS / name}:{task}")
    assert config["data"]["task"] == task
    two = len(glue.TASKS[task].columns) == 2
    assert config["data"]["length"] == (128 if two else 64)
    losses = [each["name"] for each in config.get("objective", ())]
    regression = not glue.TASKS[task].names
    assert ("losses.squared_error" in losses) == (regression and bool(losses))


def test_a_student_learns_from_the_teacher_of_its_task():
    config = run.load_config(f"{CONFIGS / 'glue_squeezebert.py'}:rte")
    assert config["distill"]["teachers"] == ({"workdir": "runs/glue_minilm_rte"},)
    assert config["init"] == {"workdir": "runs/glue_squeezebert"}
    config = run.load_config(CONFIGS / "glue_squeezebert.py")
    assert config["distill"]["teachers"] == ({"workdir": "runs/glue_minilm"},)
    assert "init" not in config


def test_each_argument_has_a_work_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.py").write_text(BEGINS)
    run.main(["--job=cost", "--config=mine.py:digits"])
    run.main(["--job=cost", "--config=mine.py"])
    assert sorted(p.name for p in pathlib.Path("runs").iterdir()) == [
        "mine",
        "mine_digits",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("mine.py:bad", "mine.py: no kind 'bad'"),
        ("other.py:1", "no config file other.py"),
        (f"{CONFIGS / 'digits.py'}:1", "digits.py takes no argument: leave out :1"),
        (
            f"{CONFIGS / 'glue_minilm.py'}:mrcp",
            "no task 'mrcp': there are cola, sst2, mrpc",
        ),
    ],
)
def test_wrong_arguments_are_named(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.py").write_text(BEGINS)
    with pytest.raises(UserError, match=message):
        run.load_config(config)


def test_a_colon_may_be_part_of_a_files_name(tmp_path):
    path = tmp_path / "a:b.py"
    path.write_text(BEGINS)
    assert run.load_config(path)["data"]["source"]["name"] == "digits"


def test_a_key_called_options_is_unknown_as_any_other():
    with pytest.raises(UserError, match=r"unknown key config\.model\.options"):
        models.check({"name": "squeezenet", "options": 1})


def test_an_error_in_a_config_names_its_path_once(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def get_config():\n    raise ValueError('too small')\n")
    with pytest.raises(UserError) as error:
        run.load_config(path)
    assert str(error.value).count("own.py") == 1
    assert "own.py:2: ValueError: too small" in str(error.value)


@pytest.mark.parametrize("raised", ["E()", "ValueError()", "ValueError('\\n')"])
def test_an_error_without_a_message_has_its_type(tmp_path, raised):
    path = tmp_path / "mine.py"
    path.write_text(
        "class E(ValueError):\n    def __str__(self): return 1 / 0\n"
        f"def get_config(size=1):\n    raise {raised}\n"
    )
    name = raised.partition("(")[0]
    with pytest.raises(UserError, match=f": {name}$"):
        run.load_config(f"{path}:1")
    with pytest.raises(UserError, match=f":4: {name}: no message; mend the file"):
        run.load_config(str(path))
