"""Writes the texts of `run.py --help` and `run.py --list`: jobs, names for configs, and keys with types and meanings.

All texts come from signatures and docstrings, so that they always agree with the checks of the config.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from squeeze_jax import ranges, registry
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import _experiment, _plugs, _schemas, _settings

WIDTH = 100
GROUPS = {
    "everything in turn": ("main",),
    "train": ("fit", "seeds"),
    "use the trained network": ("evaluate", "predict", "submit"),
    "ship it": ("export", "benchmark", "huggingface"),
    "inspect a network before it is trained": ("cost",),
}
# {heading of --list: (package, prefix of a name for --list=NAME)}
NAMES = {
    "models (config.model.name)": ("squeeze_jax.models", "model."),
    "data (config.data.name)": ("squeeze_jax.data.tasks", "data."),
    "image sources (config.data.source.name)": ("squeeze_jax.data.sources", "source."),
    "export formats (config.export.formats)": ("squeeze_jax.export.formats", ""),
}
SECTIONS = ("config", *_schemas.SECTIONS)


def list_jobs() -> str:
    """Returns one line for each job, grouped by purpose."""
    lines = ["jobs (--job=NAME; --job=NAME --help lists its settings):"]
    for purpose, names in GROUPS.items():
        lines.append(f"  {purpose}")
        lines += [f"    {name:12} {_summary(_settings.JOBS, name)}" for name in names]
    return "\n".join(lines)


def describe_job(name: str) -> str:
    """Returns a job's description and its settings; raises a UserError if there is no such job."""
    module = registry.load(_settings.JOBS, name, "job")
    lines = [f"run.py --job={name}", "", inspect.getdoc(module)]
    if hasattr(module, "Settings"):
        lines += ["", f"settings (--config.{name}.KEY=VALUE):"]
        lines.append(_format_keys(module.Settings))
    if name in ("main", "fit", "seeds"):
        lines += ["", "keys of an experiment (--config.KEY=VALUE):"]
        lines.append(_format_keys(_experiment.Experiment, without=("jobs",)))
        lines += ["", f"keys of a section: --list={', --list='.join(SECTIONS[1:])}"]
    return "\n".join(lines)


def list_names() -> str:
    """Returns all names that a config may use: models with their variants, data, methods and formats; and all configs."""
    lines = ["configs (--config=FILE)"]
    folder = Path(__file__).parents[2] / "configs"
    lines += [
        f"  {f'configs/{path.name}':36} {_first_sentence(_docstring(path))}"
        for path in sorted(folder.glob("*.py"))
    ]
    for heading, (package, _) in NAMES.items():
        lines += ["", heading]
        for name in registry.names(package):
            lines.append(f"  {name:20} {_summary(package, name)}")
            lines += _variants(package, name)
    lines += ["", "methods and losses (config.update, .forward, .objective, .gradients, .exchange, .phases)"]  # fmt: skip
    for prefix, package in _plugs.PACKAGES.items():
        lines += [
            f"  {f'{prefix}.{name}':28} {_summary(package, name)}"
            for name in registry.names(package)
            if hasattr(importlib.import_module(f"{package}.{name}"), "make")
        ]
    lines += ["", f"keys: --list={', --list='.join(SECTIONS)}, or --list=NAME of a name above, such as"]  # fmt: skip
    lines.append(
        "  --list=model.resnet, --list=data.texts, --list=source.folder, --list=prune.magnitude"
    )
    return "\n".join(lines)


def describe_keys(name: str) -> str:
    """Returns the config keys of a name, with their types, defaults and meanings.

    Args:
      name: a section of the config such as "optim", "config" for the top level, a job with settings, or "PREFIX.FILE" for a
        model, a kind of data, an image source or a method, such as "model.resnet".

    Raises:
      UserError: there is no such name.
    """
    if name == "config":
        return _format_keys(_experiment.Experiment, without=("jobs",))
    if name in _schemas.SECTIONS:
        return _format_keys(
            _schemas.SECTIONS[name], without=_experiment.SUPPLIED.get(name, ())
        )
    if name in _settings.jobs_with_settings():
        return _format_keys(registry.load(_settings.JOBS, name, "job").Settings)
    prefix, _, file = name.partition(".")
    packages = {p.rstrip("."): package for package, p in NAMES.values() if p}
    packages |= _plugs.PACKAGES
    if prefix not in packages or not file:
        choices = [
            *SECTIONS,
            *_settings.jobs_with_settings(),
            *(f"{p}.NAME" for p in packages),
        ]
        raise UserError(f"--list={name} is no section{nearest(name, choices)}")
    return _format_keys(registry.load(packages[prefix], file, prefix).make)


def _format_keys(function: Callable, without: tuple[str, ...] = ()) -> str:
    """Returns one line for each parameter of a function or class, with its meaning below.

    Args:
      function: the function or class.
      without: parameters to leave out.
    """
    hints = registry.annotations(function)
    # The options of encoders have a docstring of their own; a class may describe its parameters in __init__.
    documented = (getattr(function, "__options__", None), function.__init__, function)
    meanings = {}
    for item in documented:
        meanings |= parse_meanings(inspect.getdoc(item) or "")
    lines = []
    for parameter in inspect.signature(function).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or parameter.name in (*without, "self"):
            continue
        default = "needed"
        if parameter.default is not parameter.empty:
            default = f"default {_default(parameter.default)}"
        hint = hints.get(parameter.name, typing.Any)
        lines.append(f"  {parameter.name}: {describe_type(hint)}; {default}")
        meaning = meanings.get(parameter.name, "")
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)  # fmt: skip
    return "\n".join(lines) or "  no keys"


def _default(value: typing.Any) -> str:
    return (
        "{}"
        if isinstance(value, dataclasses._HAS_DEFAULT_FACTORY_CLASS)
        else repr(value)
    )


def describe_type(hint: typing.Any) -> str:
    """Returns an annotation in words, with its range, such as "int, at least 1" or "float in [0, 1)"."""
    text = registry.describe(hint)
    if typing.get_origin(hint) is not typing.Annotated:
        return text
    for declared in typing.get_args(hint)[1:]:
        if isinstance(declared, ranges.Range):
            return f"{text}{_interval(declared)}"
    return text


def _interval(declared: ranges.Range) -> str:
    if declared.high < ranges.INT32:
        return f" in {declared}"
    if declared.low <= -ranges.INT32:
        return ""
    return f", {'above' if declared.open_low else 'at least'} {declared.low:g}"


def parse_meanings(docstring: str) -> dict[str, str]:
    """Returns {parameter or attribute: its description} from a docstring in Google style.

    A line such as "mean, std: of the pixels" describes both names.
    """
    meanings, current = {}, ()
    section = ""
    for line in docstring.splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        if heading:
            section, current = heading[1], ()
            continue
        if section not in ("Args", "Attributes") or not line.strip():
            continue
        entry = re.match(r"  (\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)", line)
        if entry:
            current = tuple(name.lstrip("*") for name in entry[1].split(", "))
            meanings |= dict.fromkeys(current, entry[2])
        elif current:
            for name in current:
                meanings[name] += " " + line.strip()
    return meanings


def _variants(package: str, name: str) -> list[str]:
    """Returns lines with the variants of a model; [] if its file has no table VARIANTS."""
    table = getattr(importlib.import_module(f"{package}.{name}"), "VARIANTS", None)
    if not isinstance(table, Mapping):
        return []
    text = f"variants: {', '.join(map(str, table))}"
    indent = " " * 23
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _summary(package: str, name: str) -> str:
    module = importlib.import_module(f"{package}.{name}")
    return _first_sentence(module.__doc__)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _first_sentence(docstring: str | None) -> str:
    """Returns the first sentence of a docstring, without its full stop."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[^.][a-z0-9)\"])\.(?:\s|$)", paragraph)[0].rstrip(".")
