"""What --help and --list print: every job and every name, and each key with its type, default and meaning."""

import dataclasses
import inspect
import re

import pytest

import run as run_py
from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _experiment,
    _find_names,
    _help,
    _plugs,
    _schemas,
    _settings,
)

SETTINGS = _settings.jobs_with_settings()
PACKAGES = {p.rstrip("."): package for package, p in _help.NAMES.values() if p}
NAMES = [
    f"{prefix}.{name}"
    for prefix, package in (PACKAGES | _plugs.PACKAGES).items()
    for name in registry.names(package)
    if hasattr(registry.load(package, name), "make")
]


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run_py.main([*arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_has_every_job_once(capsys):
    text = printed(capsys, "--help")
    for job in _settings.job_names():
        assert len(re.findall(rf"^    {job} ", text, re.M)) == 1
    grouped = [name for names in _help.GROUPS.values() for name in names]
    assert sorted(grouped) == _settings.job_names()


@pytest.mark.parametrize("job", _settings.job_names())
def test_help_of_a_job_lists_its_settings(capsys, job):
    text = printed(capsys, f"--job={job}", "--help")
    fields = []
    # The main job also does these two.
    for part in ("export", "benchmark") if job == "main" else (job,):
        if part in SETTINGS:
            fields += dataclasses.fields(registry.load(_settings.JOBS, part).Settings)
            assert f"--config.{part}.KEY=VALUE" in text
    if job in ("fit", "main"):
        fields += dataclasses.fields(_experiment.Experiment)
        assert (
            re.findall(r"^  (\w+): .*\n +settings of --job=\1;", text, re.M) == SETTINGS
        )
    for field in fields:
        if field.name == "jobs":  # the sections of jobs
            continue
        lines = re.findall(rf"^  {field.name}: .*$", text, re.M)
        assert lines
        if isinstance(field.default, int | float | str):
            assert any(li.endswith(f"default {field.default!r}") for li in lines)
    assert registry.load(_settings.JOBS, job).__doc__.splitlines()[0] in text


def test_list_has_every_name(capsys):
    text = printed(capsys, "--list")
    for name in NAMES:
        short = name.split(".")[1] if name.split(".")[0] in PACKAGES else name
        assert re.search(rf"^  {re.escape(short)} +\w", text, re.M), name
    assert "configs/digits.py" in text
    assert "variants: 18, 34, 50, 101, 152" in text
    assert "tflite_int8" in text


@pytest.mark.parametrize("name", ["config", *_schemas.SECTIONS, *SETTINGS, *NAMES])
def test_each_key_has_a_meaning(name):
    text = _help.describe_keys(name)
    keys = re.findall(r"^  (\w+): .*; (?:needed|default .*)$", text, re.M)
    meanings = re.findall(r"^      \S", text, re.M)
    assert keys or text == "  no keys"
    lines = text.split("\n")
    for key in keys:
        place = next(n for n, line in enumerate(lines) if line.startswith(f"  {key}: "))
        assert lines[place + 1].startswith("      "), key
    assert len(meanings) >= len(keys)
    # A reader of --list has no source at hand.
    assert not re.search(r"see `|VARIANTS|ACTIVATIONS|\.py\b|method file", text)
    if name.startswith("model."):
        assert {"widths", "absent", "norm_momentum"} <= set(keys)


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("PRUNING", r"method   prune\.magnitude  +Magnitude pruning with .*"),
        ("top5", "metric   classification  .*eval_top5.*"),
        ("span", r"loss     losses\.span  +The loss of extractive .*"),
        ("pairs", r"source   source\.pairs  +Pairs of an image .*"),
        ("sst2", r'key      config\.data\.task  \(glue\) .*"sst2".*'),
        ("ptb", r"config   configs/lstm_ptb\.py  .*"),
        ("huggingface", "job      --job=huggingface  .*"),
        ("int8", r"format   tflite_int8  +TFLite quantized to 8-bit.*"),
        ("b0", r"variant  b0  +\(efficientnet\) .*"),
        ("lr", r"key      config\.optim\.lr  +peak learning rate"),
        ("drop_", None),
        ("embedding_dropout", r"key      config\.model\.embedding_dropout  \(gpt2\) .*"),
        ("absent", r"key      config\.model\.absent  +\(all models\) .*"),
        ("every", r"key      every  +\(prune\.magnitude\) .*"),
    ],
)  # fmt: skip
def test_any_text_is_searched_in_names_and_their_lines(text, hit):
    if hit is None:
        with pytest.raises(UserError, match="no name and no description has this tex"):
            _find_names.describe(text)
        return
    lines = _find_names.describe(text).splitlines()
    assert all(text.casefold() in line.casefold() for line in lines)
    assert len(lines) == len(set(lines))
    assert any(re.fullmatch(hit, line) for line in lines), lines


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("losses", [f"losses.{n}" for n in registry.names("squeeze_jax.train.losses")]),
        ("model", [f"model.{n}" for n in registry.names("squeeze_jax.models")]),
        ("formats", registry.names("squeeze_jax.export.formats")),
        ("jobs", [f"--job={job}" for job in _settings.job_names()]),
    ],
)
def test_a_kind_lists_its_names(kind, names):
    lines = _find_names.describe(kind).splitlines()
    assert [line.split()[1] for line in lines] == names


def test_descriptions_are_those_of_the_docstring():
    def function(a, b, c=1):
        """Does it.

        Args:
          a, b: both of them,
            on two lines.
          c: other.

        Returns:
          d: no parameter.
        """

    found = _help.parse_meanings(inspect.getdoc(function))
    assert found == {"a": "both of them, on two lines.", "b": "both of them, on two lines.", "c": "other."}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--list=optin", "has this text; did you mean 'optim'"),
        ("--list=model.resnett", "unknown model 'resnett'; did you mean 'resnet'"),
        ("--job=exprot", "unknown job 'exprot'; did you mean 'export'"),
    ],
)
def test_an_unknown_name_is_one_line(argument, message):
    with pytest.raises(UserError, match=message):
        run_py.main([argument, "--help"])
