"""What `run.py --help` and `run.py --list` print: jobs, names for configs, and keys with types, defaults and meanings.

Everything comes from signatures and docstrings, so that it cannot differ from what is checked.
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
# Parameters that the program supplies, see `_experiment.check`.
GIVEN = {"optim": ("steps",), "checkpoint": ("directory", "read_only", "lowest")}
SECTIONS = ("config", *_schemas.SECTIONS)


def jobs() -> str:
    """Returns the jobs, grouped by purpose, with a line each."""
    lines = ["jobs (--job=NAME; --job=NAME --help lists its settings):"]
    for purpose, names in GROUPS.items():
        lines.append(f"  {purpose}")
        lines += [f"    {name:12} {_summary(_settings.JOBS, name)}" for name in names]
    return "\n".join(lines)


def job(name: str) -> str:
    """Returns what a job does, and its settings."""
    module = registry.load(_settings.JOBS, name, "job")
    lines = [f"run.py --job={name}", "", inspect.getdoc(module)]
    if hasattr(module, "Settings"):
        lines += ["", f"settings (--config.{name}.KEY=VALUE):"]
        lines.append(_keys(module.Settings))
    if name in ("main", "fit", "seeds"):
        lines += ["", "keys of an experiment (--config.KEY=VALUE):"]
        lines.append(_keys(_experiment.Experiment, without=("jobs",)))
        lines += ["", f"keys of a section: --list={', --list='.join(SECTIONS[1:])}"]
    return "\n".join(lines)


def names() -> str:
    """Returns all names that a config may use: configs, models with their variants, data, methods and formats."""
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


def keys(name: str) -> str:
    """Returns the keys of a section, model, kind of data, source or method, with types, defaults and meanings.

    Raises:
      UserError: no such name.
    """
    if name == "config":
        return _keys(_experiment.Experiment, without=("jobs",))
    if name in _schemas.SECTIONS:
        return _keys(_schemas.SECTIONS[name], without=GIVEN.get(name, ()))
    if name in _settings.with_settings():
        return _keys(registry.load(_settings.JOBS, name, "job").Settings)
    prefix, _, file = name.partition(".")
    packages = {p.rstrip("."): package for package, p in NAMES.values() if p}
    packages |= _plugs.PACKAGES
    if prefix not in packages or not file:
        choices = [
            *SECTIONS,
            *_settings.with_settings(),
            *(f"{p}.NAME" for p in packages),
        ]
        raise UserError(f"--list={name} is no section{nearest(name, choices)}")
    return _keys(registry.load(packages[prefix], file, prefix).make)


def _keys(function: Callable, without: tuple[str, ...] = ()) -> str:
    """Returns a line for each parameter of a function or class, and its meaning below."""
    hints = registry.annotations(function)
    # The options of encoders have a docstring of their own; a class may describe its parameters in __init__.
    places = (getattr(function, "__options__", None), function.__init__, function)
    meanings = {}
    for place in places:
        meanings |= described(inspect.getdoc(place) or "")
    lines = []
    for parameter in inspect.signature(function).parameters.values():
        positional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if positional or parameter.name in (*without, "self"):
            continue
        default = "needed"
        if parameter.default is not parameter.empty:
            default = f"default {_default(parameter.default)}"
        hint = hints.get(parameter.name, typing.Any)
        lines.append(f"  {parameter.name}: {words(hint)}; {default}")
        meaning = meanings.get(parameter.name, "")
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)  # fmt: skip
    return "\n".join(lines) or "  no keys"


def _default(value: typing.Any) -> str:
    return (
        "{}"
        if isinstance(value, dataclasses._HAS_DEFAULT_FACTORY_CLASS)
        else repr(value)
    )


def words(hint: typing.Any) -> str:
    """Returns a type with its range, such as "int, at least 1" or "float in [0, 1)"."""
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


def described(docstring: str) -> dict[str, str]:
    """Returns the meaning of each parameter or attribute that a docstring in Google's style describes.

    "mean, std: of the pixels" describes both.
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
    """Returns the first sentence of a docstring, of its first paragraph, without its full stop."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[^.][a-z0-9)\"])\.(?:\s|$)", paragraph)[0].rstrip(".")
