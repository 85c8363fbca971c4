"""What --help and --list print: every job and every name, and each key with its type, default and meaning."""

import dataclasses
import inspect
import re

import pytest

import run as run_py
from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _help, _plugs, _schemas, _settings

SETTINGS = _settings.with_settings()
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
    for job in _settings.jobs():
        assert len(re.findall(rf"^    {job} ", text, re.M)) == 1
    grouped = [name for names in _help.GROUPS.values() for name in names]
    assert sorted(grouped) == _settings.jobs()


@pytest.mark.parametrize("job", _settings.jobs())
def test_help_of_a_job_lists_its_settings(capsys, job):
    text = printed(capsys, f"--job={job}", "--help")
    fields = []
    if job in SETTINGS:
        fields += dataclasses.fields(registry.load(_settings.JOBS, job).Settings)
    if job == "fit":
        fields += dataclasses.fields(_experiment.Experiment)
    for field in fields:
        if field.name == "jobs":  # the sections of jobs
            continue
        line = re.search(rf"^  {field.name}: .*$", text, re.M)[0]
        if isinstance(field.default, int | float | str):
            assert line.endswith(f"default {field.default!r}")
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
    text = _help.keys(name)
    keys = re.findall(r"^  (\w+): .*; (?:needed|default .*)$", text, re.M)
    meanings = re.findall(r"^      \S", text, re.M)
    assert keys or text == "  no keys"
    lines = text.split("\n")
    for key in keys:
        place = next(n for n, line in enumerate(lines) if line.startswith(f"  {key}: "))
        assert lines[place + 1].startswith("      "), key
    assert len(meanings) >= len(keys)


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

    found = _help.described(inspect.getdoc(function))
    assert found == {"a": "both of them, on two lines.", "b": "both of them, on two lines.", "c": "other."}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--list=optin", "no section; did you mean 'optim'"),
        ("--list=model.resnett", "unknown model 'resnett'; did you mean 'resnet'"),
        ("--job=exprot", "unknown job 'exprot'; did you mean 'export'"),
    ],
)
def test_an_unknown_name_is_one_line(argument, message):
    with pytest.raises(UserError, match=message):
        run_py.main([argument, "--help"])
