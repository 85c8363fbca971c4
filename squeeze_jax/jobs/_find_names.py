"""Finds a text in everything that a config or a command may name: `run.py --list=TEXT`.

The names are those of configs, jobs, models and their variants, data, image sources, export formats, methods, losses, metrics
and config keys.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _help, _plugs, _schemas, _settings

METRICS = "squeeze_jax.train.metrics"


class Entry(NamedTuple):
    """A name that can be found.

    Attributes:
      kind: what it names, such as "model"; `CATEGORIES` has all kinds.
      name: the name as a config or a command has it, such as "prune.magnitude" or "config.optim.lr".
      text: what it means, in one line.
      owners: for a variant or a key, the files that have it, such as ("bert", "albert"); () for all others. A search ignores
        them.
    """

    kind: str
    name: str
    text: str
    owners: tuple[str, ...] = ()


# {kind: the word that lists the whole kind}
CATEGORIES = {
    "config": "configs",
    "job": "jobs",
    "model": "models",
    "variant": "variants",
    "data": "data",
    "source": "sources",
    "format": "formats",
    "method": "methods",
    "loss": "losses",
    "metric": "metrics",
    "key": "keys",
}


def describe(text: str) -> str:
    """Returns the keys of a name if `text` is one, see `_help.describe_keys`; otherwise one line for each hit of a search.

    A kind such as "model" or "losses" lists all names of the kind. Any other text is searched in names, and then in the lines
    of text beside them, in upper or lower case.

    Raises:
      UserError: `text` is "PREFIX.FILE" without such a file, or nothing has the text.
    """
    if _help.has_keys(text):
        return _help.describe_keys(text)
    entries, wanted = list(_entries()), text.casefold()
    kinds = [k for k, plural in CATEGORIES.items() if wanted in (k, plural)]
    hits = [entry for entry in entries if entry.kind in kinds]
    if not kinds:
        in_names = [e for e in entries if wanted in e.name.casefold()]
        in_texts = [e for e in entries if wanted in e.text.casefold()]
        hits = in_names + [e for e in in_texts if e not in in_names]
    if not hits:
        names = {name for e in entries for name in (e.name, e.name.split(".")[-1])}
        close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"--list={text}: no name and no description has this text; {advice}--list prints all names"
        )
    width = min(max(len(e.name) for e in hits), 44)
    return "\n".join(f"{e.kind:8} {e.name:{width}}  {_line(e)}" for e in hits)


def _line(entry: Entry) -> str:
    """Returns an entry's text, after its owners."""
    if not entry.owners:
        return entry.text
    is_all = set(entry.owners) == set(registry.names("squeeze_jax.models"))
    return f"({'all models' if is_all else ', '.join(entry.owners)}) {entry.text}"


def _entries() -> Iterator[Entry]:
    """Yields all names, kind by kind."""
    for path, text in _help.configs().items():
        yield Entry("config", path, text)
    for job in _settings.job_names():
        yield Entry("job", f"--job={job}", _help.summary(_settings.JOBS, job))
    kinds = {"model.": "model", "data.": "data", "source.": "source", "": "format"}
    for package, prefix in _help.NAMES.values():
        for name in registry.names(package):
            yield Entry(kinds[prefix], f"{prefix}{name}", _help.summary(package, name))
    package = "squeeze_jax.models"
    yield from _merged(
        (Entry("variant", variant, "a size of the network"), name)
        for name in registry.names(package)
        for variant in _help.variants(package, name)
    )
    for prefix, package in _plugs.PACKAGES.items():
        kind = "loss" if prefix == "losses" else "method"
        for name in _help.made_names(package):
            yield Entry(kind, f"{prefix}.{name}", _help.summary(package, name))
    for name in registry.names(METRICS):
        scores = ", ".join(_score_names(name))
        yield Entry("metric", name, f"{_help.summary(METRICS, name)}; {scores}")
    yield from _keys()


def _score_names(metric: str) -> list[str]:
    """Returns the names of a metric's scores, from its constant NAMES and its docstrings."""
    module = registry.load(METRICS, metric, "metric")
    names = getattr(module, "NAMES", ())
    names = list(names) if isinstance(names, tuple) else []
    texts = f"{module.__doc__} {module.make.__doc__}"
    return list(dict.fromkeys(names + re.findall(r'"(eval_\w+)"', texts)))


def _keys() -> Iterator[Entry]:
    """Yields all config keys; a key that several files describe by the same words is one entry."""
    for section in ("config", *_schemas.SECTIONS, *_settings.jobs_with_settings()):
        where = "config" if section == "config" else f"config.{section}"
        for key in _help.keys_of(section):
            yield Entry("key", f"{where}.{key.name}", _meaning(key))
    places = {"data": "config.data.", "model": "config.model."}
    places["source"] = "config.data.source."
    yield from _merged(
        (
            Entry("key", f"{places.get(prefix, '')}{key.name}", _meaning(key)),
            name if prefix in places else f"{prefix}.{name}",
        )
        for prefix, package in _help.packages().items()
        for name in _help.made_names(package)
        for key in _help.keys_of(f"{prefix}.{name}")
    )


def _merged(entries: Iterable[tuple[Entry, str]]) -> Iterator[Entry]:
    """Yields each of several equal entries once, with all of its owners; takes pairs (entry, owner)."""
    owners = {}
    for entry, owner in entries:
        owners.setdefault(entry, []).append(owner)
    for entry, names in owners.items():
        yield entry._replace(owners=tuple(names))


def _meaning(key: _help.Key) -> str:
    """Returns the first sentence of a key's meaning, after the values that it may have if these are listed."""
    values = f"{key.type}; " if key.type.startswith("one of ") else ""
    return values + _help.first_sentence(key.meaning)
