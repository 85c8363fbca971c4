"""Files are the registry, signatures are the schema.

`load("squeeze_jax.models", "squeezenet")` imports the file of that name; `check` compares a config section with the
signature of the function it will be splatted into, so that a misspelt key or a wrong type is an error before any work.
Wherever a config names a file of the library, the path of a Python file of the user's own does too: "./my_model.py".
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import sys
import traceback
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from squeeze_jax.errors import UserError, message_of, nearest, shown

# The user's own files that this program has imported; worker processes inherit it and import from the same paths.
_OWN_FILES = "SQUEEZE_JAX_OWN_FILES"
_OWN = "squeeze_jax.own"
# What a file needs to define where it is not `make`.
_DEFINES = {
    "squeeze_jax.jobs": ("run",),
    "squeeze_jax.export.formats": ("convert", "INTEGER", "NEEDS"),
}


def names(package: str) -> list[str]:
    """Returns the names of the files in a package: its valid registry keys."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(info.name for info in found if not info.name.startswith("_"))


def load(package: str, name: str, what: str = "") -> types.ModuleType:
    """Imports `package.name`, or a Python file of the user's own.

    Args:
      package: dotted package, such as "squeeze_jax.models".
      name: the file's name without ".py"; or a path that ends in ".py", relative to the current directory.
      what: how to call it in the error, such as "model".

    Raises:
      UserError: no such file (names the nearest and all valid names), or one that cannot be imported or lacks a definition,
        which is `make` except for jobs and export formats.
    """
    if is_path(name):
        module = _imported(name, what or package)
        for needed in _DEFINES.get(package, ("make",)):
            if not hasattr(module, needed):
                raise UserError(
                    f"{name} does not define {needed}, which every {what or 'file of ' + package} needs: add it to"
                    f" {module.__file__}"
                )
        return module
    choices = names(package)
    if name not in choices:
        raise UserError(
            f"unknown {what or package} {name!r}{nearest(name, choices)}, or give the path of a Python file"
        )
    return importlib.import_module(f"{package}.{name}")


def is_path(name: str) -> bool:
    """Returns whether a name in a config is the path of a Python file of the user's own."""
    return isinstance(name, str) and name.endswith(".py")


def own_files() -> dict[str, str]:
    """Returns {file's name without ".py": path} for the user's own files that were imported."""
    return {pathlib.Path(path).stem: path for path in _own_paths()}


def _own_paths() -> list[str]:
    return [p for p in os.environ.get(_OWN_FILES, "").splitlines() if p]


def _imported(name: str, what: str) -> types.ModuleType:
    """Imports a Python file by its path, once."""
    path = pathlib.Path(name).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"no {what} at {name}: looked for {path}; paths are relative to the current directory"
        )
    path = path.resolve()
    known = _own_paths()
    if str(path) not in known:
        os.environ[_OWN_FILES] = "\n".join([*known, str(path)])
    with blamed(path):
        return importlib.import_module(_module_name(path))


@contextlib.contextmanager
def blamed(path: str | pathlib.Path, passing: tuple[type, ...] = ()) -> Iterator[None]:
    """Turns whatever the user's own code raises into a UserError with its file, line and exception.

    Args:
      path: the file that is imported or called within this context.
      passing: exceptions that pass as they are.
    """
    try:
        yield
    except (UserError, *passing):
        raise
    except SyntaxError as error:
        place = f"{error.filename or path}:{error.lineno or 1}"
        raise UserError(f"{place}: {error.msg}; mend the file") from None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        # Ctrl-C, unless the file itself raises its exception.
        if isinstance(error, KeyboardInterrupt) and not (
            frames and (frames[-1].line or "").startswith("raise")
        ):
            raise
        own = str(pathlib.Path(path).resolve())
        lines = [
            f.lineno for f in frames if str(pathlib.Path(f.filename).resolve()) == own
        ]
        line = lines[-1] if lines else 1
        raise UserError(f"{path}:{line}: {_typed(error)}; mend the file") from None


def _typed(error: BaseException) -> str:
    """Returns an exception's type and message, such as "KeyError: 'x'"."""
    name, message = type(error).__name__, message_of(error)
    return f"{name}: {'no message' if message == name else message}"


def describe_error(error: BaseException) -> str:
    """Returns an exception in words: the message of a UserError; of any other its type, and its place in a file of the user."""
    if isinstance(error, UserError):
        return str(error)
    place = own_place(error)
    return f"{place}: {_typed(error)}" if place else _typed(error)


def own_place(error: BaseException) -> str:
    """Returns "FILE:LINE" of the user's own file that raised an exception, or called what raised it; "" if there is none."""
    own = set(_own_paths())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in own
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def is_fault_of_own(error: BaseException) -> bool:
    """Returns whether the user's own file is at fault: after its last frame, the traceback has none of this library."""
    own, library = set(_own_paths()), str(pathlib.Path(__file__).parent)
    at_fault = False
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in own:
            at_fault = True
        elif frame.filename.startswith(library):
            at_fault = False
    return at_fault


def is_own(module: types.ModuleType) -> bool:
    """Returns whether a module is the user's own file."""
    return module.__name__.startswith(f"{_OWN}.")


def _module_name(path: pathlib.Path) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in path.stem)
    return f"{_OWN}.{stem}_{zlib.crc32(os.fsencode(path)):08x}"


class _OwnFiles(importlib.abc.MetaPathFinder):
    """Finds the modules of the user's own files; a class because Python's import system asks for one."""

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        if not fullname.startswith(f"{_OWN}."):
            return None
        for file in _own_paths():
            if _module_name(pathlib.Path(file)) == fullname:
                return importlib.util.spec_from_file_location(fullname, file)
        return None


if not any(type(finder).__name__ == "_OwnFiles" for finder in sys.meta_path):
    sys.meta_path.append(_OwnFiles())


def row(table: Mapping[str, typing.Any], key: str, what: str):
    """Returns `table[key]`, or raises a UserError that names the nearest key."""
    if key not in table:
        raise UserError(f"unknown {what} {key!r}{nearest(key, table)}")
    return table[key]


def options(defaults: typing.Any, without: Sequence[str] = ()) -> Callable:
    """Returns a decorator that puts the fields of a NamedTuple into a signature that ends in `**options`.

    The function's own parameters have precedence over fields of the same name.

    Args:
      defaults: the NamedTuple, whose values are the defaults.
      without: fields that the function does not take.
    """
    hints = annotations(type(defaults))

    def declare(fn: Callable) -> Callable:
        signature = inspect.signature(fn)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        skipped = {p.name for p in own} | set(without)
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                annotation=hints[name],
            )
            for name, value in defaults._asdict().items()
            if name not in skipped
        ]
        fn.__signature__ = signature.replace(parameters=own + shared)
        fn.__annotations__ |= {p.name: p.annotation for p in shared}
        fn.__options__ = type(defaults)  # whose docstring describes them
        return fn

    return declare


def check(
    fn: Callable,
    section: Mapping[str, typing.Any],
    where: str,
    given: Sequence[str] = (),
) -> None:
    """Checks that `fn(**section)` would bind, and that every value has the type and lies in the range of its annotation.

    Args:
      fn: the function or class whose signature is the schema; `ranges.py` has the types with ranges.
      section: the keyword arguments from the config.
      where: the section's name as the user writes it, such as "config.optim".
      given: parameters that the program supplies itself; the section may not name them.

    Raises:
      UserError: an unknown or missing key, a value of another type or out of its range.
    """
    parameters = {
        k: p for k, p in inspect.signature(fn).parameters.items() if k not in given
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = {
        k: p
        for k, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    hints = annotations(fn)
    for key, value in section.items():
        if not isinstance(key, str):
            raise UserError(f"{where} has the key {key!r}: keys should be names")
        if key not in parameters:
            if open_ended and key not in given:
                continue
            raise UserError(f"unknown key {where}.{key}{nearest(key, parameters)}")
        if wrong := fault(value, hints.get(key, typing.Any), f"{where}.{key}"):
            raise UserError(wrong)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in section:
            raise UserError(f"missing key {where}.{key}: add it to the config")


def checked(fn: Callable) -> Callable:
    """Returns a function that checks its arguments as `check` checks a section of a config, for calls from Python.

    Arrays are not checked, because their values may be unknown while a function is traced.
    """
    parameters = inspect.signature(fn).parameters
    place = f"{fn.__module__.removeprefix('squeeze_jax.')}.{fn.__name__}"

    @functools.wraps(fn)
    def call(*args, **kwargs):
        hints = annotations(fn)
        for name, value in {
            **dict(zip(parameters, args, strict=False)),
            **kwargs,
        }.items():
            if name not in parameters:
                raise UserError(
                    f"{place} has no argument {name!r}{nearest(name, parameters)}"
                )
            value = value.item() if isinstance(value, np.generic) else value
            if hasattr(value, "dtype"):
                continue
            if wrong := fault(value, hints.get(name, typing.Any), f"{place}: {name}"):
                raise UserError(wrong)
        return fn(*args, **kwargs)

    return call


def annotations(fn: Callable) -> dict[str, typing.Any]:
    """Returns the annotations of the parameters of a function or class, with their ranges."""
    fields = hasattr(fn, "__dataclass_fields__") or hasattr(fn, "_fields")
    if isinstance(fn, type) and not fields:
        fn = fn.__init__
    return typing.get_type_hints(fn, include_extras=True)


def fault(value, hint, where: str) -> str:
    """Returns a line about a value of another type or out of its range; "" for a value that is right.

    Args:
      value: from a config.
      hint: the annotation.
      where: the value's name as the user writes it.
    """
    if not fits(value, hint):
        value, hint, where = _culprit(value, hint, where)
        example = _tuple_example(value, hint)
        such_as = f", such as {shown(example)}" if example else ""
        return f"{where} = {shown(value)} ({type(value).__name__}) should be {describe(hint)}{such_as}"
    return _outside(value, hint, where)


def _tuple_example(value, hint) -> tuple | None:
    """Returns a tuple that fits an annotation, of `value` alone if this fits as an item; None if the annotation has no tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _tuple_example(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return next(filter(None, (_tuple_example(value, arg) for arg in args)), None)
    if origin not in (tuple, list, Sequence) or not args:
        return None
    if origin is tuple and args[-1] is not Ellipsis:
        items = [_item_examples(None, arg) for arg in args]
        chosen = tuple(item[n % len(item)] for n, item in enumerate(items) if item)
        return chosen if all(items) else None
    if value is not None and not fault(value, args[0], ""):
        return (value,)
    return _item_examples(value, args[0]) or None


def _item_examples(value, hint) -> tuple:
    """Returns one or two values that an annotation accepts; () for annotations such as dict, whose values depend on their use."""
    samples = (("a", "b"), (1, 2), (0.25, 0.5), (True,))
    nested = _tuple_example(value, hint)
    literal = typing.get_args(hint)[:2] if typing.get_origin(hint) is Literal else ()
    candidates = (literal, *samples, (nested,) if nested else ())
    return next(
        (c for c in candidates if c and not any(fault(v, hint, "") for v in c)), ()
    )


def _culprit(value, hint, where: str) -> tuple:
    """Returns the innermost item of another type, with its annotation and name."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _culprit(value, args[0], where)
    if isinstance(value, list | tuple):
        sequences = [a for a in args if typing.get_origin(a) in (tuple, Sequence)]
        if origin in (typing.Union, types.UnionType) and len(sequences) == 1:
            return _culprit(value, sequences[0], where)
        if args and origin in (tuple, list, Sequence):
            for number, (item, kind) in enumerate(_items(value, hint)):
                if not fits(item, kind):
                    return _culprit(item, kind, f"{where}[{number}]")
    return value, hint, where


def _items(value: Sequence, hint) -> list[tuple]:
    """Returns the items of a sequence, each with its annotation."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or args[-1] is Ellipsis:
        return [(item, args[0]) for item in value]
    return list(zip(value, args, strict=False))


def _outside(value, hint, where: str) -> str:
    """Returns a line about a value out of the range that an annotation declares, or about an item of it; or ""."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        for declared in args[1:]:
            if wrong := declared.fault(value):
                return f"{where} = {shown(value)} {wrong}"
        return _outside(value, args[0], where)
    if origin in (typing.Union, types.UnionType):
        wrong = [_outside(value, arg, where) for arg in args if fits(value, arg)]
        return min(wrong, key=bool, default="")
    items = ()
    if isinstance(value, Mapping) and len(args) == 2:
        items = [(v, args[1], f"[{k!r}]") for k, v in value.items() if fits(v, args[1])]
    elif isinstance(value, list | tuple) and args and origin is not typing.Literal:
        items = [(v, h, f"[{n}]") for n, (v, h) in enumerate(_items(value, hint))]
    wrong = (_outside(item, kind, where + index) for item, kind, index in items)
    return next(filter(None, wrong), "")


def fits(value, hint) -> bool:
    """Returns whether a config value has the type of an annotation, whatever its range.

    An int fits a float, and a list fits a tuple.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or isinstance(hint, typing.TypeVar):
        return True
    if origin is typing.Annotated:
        return fits(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if hint in (None, type(None)):
        return value is None
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float)
    kind = origin or hint
    if kind in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return not args or all(fits(v, args[0]) for v in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(hint) -> str:
    """Returns a type annotation in words: `one of 'sgd', 'adamw'`, `int or None`, `tuple of float`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(args[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if hint is type(None):
        return "None"
    if args and origin in (tuple, list, Sequence):
        if origin is not tuple or args[-1] is Ellipsis:
            return f"tuple of {describe(args[0])}"
        return f"tuple ({', '.join(map(describe, args))})"
    return getattr(origin or hint, "__name__", str(hint))


def late(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`, which imports what its names stand for when they are asked for.

    Args:
      package: its `__name__`.
      places: {public name: module in the package that has it; "module:other" where it has another name there, "module:." for the
        module itself}.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}{nearest(name, places)}"
            )
        module, _, attribute = places[name].partition(":")
        loaded = importlib.import_module(f"{package}.{module}")
        return loaded if attribute == "." else getattr(loaded, attribute or name)

    return load
