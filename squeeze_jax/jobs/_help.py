"""Writes the texts of `run.py --help` and `run.py --list`: jobs, names for configs, and keys with types and meanings.

All texts come from signatures and docstrings, so that they always agree with the checks of the config. A docstring may refer
to another one ("see `bert.make`") or to a table ("a row of VARIANTS"); `resolve_references` puts what they say in their place.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from squeeze_jax import models, ranges, registry
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import _experiment, _plugs, _schemas, _settings

WIDTH = 100
GROUPS = {
    "everything in turn": ("main",),
    "train": ("fit", "seeds"),
    "use the trained network": ("evaluate", "predict", "search", "extract", "submit"),
    "ship it": ("export", "benchmark", "huggingface"),
    "inspect a network before it is trained": ("cost", "latency_table"),
}
# The jobs with settings that the main job does.
PARTS_OF_MAIN = ("export", "benchmark")
# {heading of --list: (package, prefix of a name for --list=NAME)}
NAMES = {
    "models (config.model.name)": ("squeeze_jax.models", "model."),
    "data (config.data.name)": ("squeeze_jax.data.tasks", "data."),
    "image sources (config.data.source.name)": ("squeeze_jax.data.sources", "source."),
    "export formats (config.export.formats)": ("squeeze_jax.export.formats", ""),
}
SECTIONS = ("config", *_schemas.SECTIONS)
_REFERENCE = re.compile(r"^see `([\w.]+)`[.;]?\s*")
_TABLE = re.compile(r"a (?:row of|name in) `?([\w.]+\w)`?")


def list_jobs() -> str:
    """Returns one line for each job, grouped by purpose."""
    lines = ["jobs (--job=NAME; --job=NAME --help lists its settings):"]
    for purpose, names in GROUPS.items():
        lines.append(f"  {purpose}")
        lines += [f"    {name:12} {summary(_settings.JOBS, name)}" for name in names]
    return "\n".join(lines)


def describe_job(name: str) -> str:
    """Returns a job's description and its settings; raises a UserError if there is no such job.

    The main job does other jobs in turn, so their settings follow its own.
    """
    module = registry.load(_settings.JOBS, name, "job")
    lines = [f"run.py --job={name}", "", inspect.getdoc(module)]
    for job in PARTS_OF_MAIN if name == "main" else (name,):
        if job in _settings.jobs_with_settings():
            lines += ["", f"settings (--config.{job}.KEY=VALUE):", describe_keys(job)]
    if name in ("main", "fit", "seeds"):
        lines += ["", "keys of an experiment (--config.KEY=VALUE):"]
        lines.append(describe_keys("config"))
        sections = (*SECTIONS[1:], *_settings.jobs_with_settings())
        lines += ["", f"keys of a section: --list={', --list='.join(sections)}"]
    return "\n".join(lines)


def list_names() -> str:
    """Returns all names that a config may use: models with their variants, data, methods and formats; and all configs."""
    lines = ["configs (--config=FILE)"]
    lines += [f"  {name:36} {text}" for name, text in configs().items()]
    for heading, (package, _) in NAMES.items():
        lines += ["", heading]
        for name in registry.names(package):
            lines.append(f"  {name:20} {summary(package, name)}")
            if table := variants(package, name):
                text, indent = f"variants: {', '.join(table)}", " " * 23
                lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)  # fmt: skip
    lines += ["", "methods and losses (config.update, .forward, .objective, .gradients, .exchange, .phases)"]  # fmt: skip
    for prefix, package in _plugs.PACKAGES.items():
        lines += [
            f"  {f'{prefix}.{name}':28} {summary(package, name)}"
            for name in made_names(package)
        ]
    sections = (*SECTIONS, *_settings.jobs_with_settings())
    lines += ["", f"keys: --list={', --list='.join(sections)}, or --list=NAME of a name above, such as"]  # fmt: skip
    lines.append(
        "  --list=model.resnet, --list=data.texts, --list=source.folder, --list=prune.magnitude"
    )
    lines += ["", "search: --list=TEXT finds a text in all names, keys and their descriptions, such as --list=pruning"]  # fmt: skip
    return "\n".join(lines)


def configs() -> dict[str, str]:
    """Returns {path of a config file: the first sentence of its docstring}."""
    folder = Path(__file__).parents[2] / "configs"
    return {
        f"configs/{path.name}": first_sentence(_docstring(path))
        for path in sorted(folder.glob("*.py"))
    }


def made_names(package: str) -> list[str]:
    """Returns the names of a package's files that a config can name: those with a function `make`."""
    names = registry.names(package)
    return [n for n in names if hasattr(registry.load(package, n), "make")]


def variants(package: str, name: str) -> tuple[str, ...]:
    """Returns the variants of a model; () if its file has no table VARIANTS."""
    table = getattr(importlib.import_module(f"{package}.{name}"), "VARIANTS", None)
    return tuple(map(str, table)) if isinstance(table, Mapping) else ()


def summary(package: str, name: str) -> str:
    """Returns the first sentence of the docstring of a package's file."""
    return first_sentence(importlib.import_module(f"{package}.{name}").__doc__)


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      name: the key.
      type: its type in words, with its range.
      default: its default as Python writes it; "" if the config needs the key.
      meaning: what it means; "" if no docstring describes it.
    """

    name: str
    type: str
    default: str
    meaning: str


def describe_keys(name: str) -> str:
    """Returns the config keys of a name as text, with their types, defaults and meanings.

    Args:
      name: a section of the config such as "optim", "config" for the top level, a job with settings, or "PREFIX.FILE" for a
        model, a kind of data, an image source or a method, such as "model.resnet".

    Raises:
      UserError: there is no such name.
    """
    lines = []
    for key in keys_of(name):
        default = f"default {key.default}" if key.default else "needed"
        lines.append(f"  {key.name}: {key.type}; {default}")
        lines += textwrap.wrap(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)  # fmt: skip
    return "\n".join(lines) or "  no keys"


def has_keys(name: str) -> bool:
    """Returns whether `keys_of` knows a name: a section, a job with settings, or "PREFIX.FILE" with a known prefix."""
    prefix, _, file = name.partition(".")
    sections = (*SECTIONS, *_settings.jobs_with_settings())
    return name in sections or (prefix in packages() and bool(file))


def keys_of(name: str) -> list[Key]:
    """Returns the config keys of a name; see `describe_keys`."""
    if name == "config":
        keys = _keys(_experiment.Experiment, without=("jobs",))
        return keys + [
            Key(job, "dict", "{}", f"settings of --job={job}; --list={job} explains its keys.")
            for job in _settings.jobs_with_settings()
        ]  # fmt: skip
    if name in _schemas.SECTIONS:
        return _keys(
            _schemas.SECTIONS[name], without=_experiment.SUPPLIED.get(name, ())
        )
    if name in _settings.jobs_with_settings():
        return _keys(registry.load(_settings.JOBS, name, "job").Settings)
    prefix, _, file = name.partition(".")
    if not has_keys(name):
        choices = [
            *SECTIONS,
            *_settings.jobs_with_settings(),
            *(f"{p}.NAME" for p in packages()),
        ]
        raise UserError(f"--list={name} is no section{nearest(name, choices)}")
    keys = _keys(registry.load(packages()[prefix], file, prefix).make)
    if prefix == "model":  # `models.make` takes some keys for every network
        own = {key.name for key in keys}
        keys += [k for k in _keys(models.make, ("name",)) if k.name not in own]
    return keys


def packages() -> dict[str, str]:
    """Returns {prefix of --list=PREFIX.FILE: package of the file}."""
    listed = {p.rstrip("."): package for package, p in NAMES.values() if p}
    return listed | _plugs.PACKAGES


def _keys(function: Callable, without: tuple[str, ...] = ()) -> list[Key]:
    """Returns a key for each parameter of a function or class, except for those in `without`."""
    hints = registry.annotations(function)
    # The options of encoders have a docstring of their own; a class may describe its parameters in __init__.
    documented = (getattr(function, "__options__", None), function.__init__, function)
    meanings = {}
    for item in documented:
        for name, meaning in parse_meanings(inspect.getdoc(item) or "").items():
            meanings[name] = resolve_references(meaning, name, item)
    keys = []
    for parameter in inspect.signature(function).parameters.values():
        name, variadic = parameter.name, (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)  # fmt: skip
        if parameter.kind in variadic or name in (*without, "self"):
            continue
        needed = parameter.default is parameter.empty
        default = "" if needed else _default(parameter.default)
        hint = describe_type(hints.get(name, typing.Any))
        keys.append(Key(name, hint, default, meanings.get(name, "")))
    return keys


def resolve_references(meaning: str, name: str, item: Any) -> str:
    """Replaces a reference to another docstring, or to a table, by what it refers to.

    "see `bert.make`" becomes the description of the same parameter in the docstring of `bert.make`. "a row of VARIANTS" and
    "a name in `activations.ACTIVATIONS`" become "one of" and the keys of the table. Both are looked up in the file of `item`,
    then among the files beside it.

    Args:
      meaning: the description of a parameter.
      name: the parameter.
      item: the function or class whose docstring it is from.
    """

    def look_up(reference):
        first, *others = reference.split(".")
        value = getattr(sys.modules[item.__module__], first, None)
        package = item.__module__.rpartition(".")[0]
        if value is None and first in registry.names(package):
            value = importlib.import_module(f"{package}.{first}")
        for part in others:
            value = getattr(value, part, None)
        return value

    if match := _REFERENCE.match(meaning):
        other = look_up(match[1])
        described = parse_meanings(inspect.getdoc(other) or "").get(name)
        if described is not None:
            rest = meaning[match.end() :]
            meaning = resolve_references(described, name, other)
            meaning += f" {rest[0].upper()}{rest[1:]}" if rest else ""

    def keys(match):
        table = look_up(match[1])
        return f"one of {', '.join(table)}" if isinstance(table, Mapping) else match[0]

    return _TABLE.sub(keys, meaning)


def _default(value: Any) -> str:
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


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def first_sentence(docstring: str | None) -> str:
    """Returns the first sentence of a docstring, without its full stop."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[^.][a-z0-9)\"])\.(?:\s|$)", paragraph)[0].rstrip(".")
