"""Files are the registry, signatures are the schema.

`load("squeeze_jax.models", "squeezenet")` imports the file of that name; `check` compares a config section with the
signature of the function it will be splatted into, so that a misspelt key or a wrong type is an error before any work.
Wherever a config names a file of the library, the path of a Python file of the user's own does too: "./my_model.py".
"""

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
from collections.abc import Callable, Mapping, Sequence

from squeeze_jax.errors import UserError, nearest

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
    """Whether a name in a config is the path of a Python file of the user's own."""
    return isinstance(name, str) and name.endswith(".py")


def own_files() -> dict[str, str]:
    """{file's name without ".py": path} of the user's own files that were imported."""
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
    try:
        return importlib.import_module(_module_name(path))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in frames[::-1] if f.filename == str(path)), 1)
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"{path}:{line}: {type(error).__name__}: {reason}; mend the file"
        ) from None


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
    hints = typing.get_type_hints(type(defaults))

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
        return fn

    return declare


def check(
    fn: Callable,
    section: Mapping[str, typing.Any],
    where: str,
    given: Sequence[str] = (),
) -> None:
    """Checks that `fn(**section)` would bind and that every value fits its annotation.

    Args:
      fn: the function or class whose signature is the schema.
      section: the keyword arguments from the config.
      where: the section's name as the user writes it, such as "config.optim".
      given: parameters that the program supplies itself; the section may not name them.

    Raises:
      UserError: unknown or missing key, or a value of another type.
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
    hints = typing.get_type_hints(fn)
    for key, value in section.items():
        if key not in parameters:
            if open_ended and key not in given:
                continue
            raise UserError(f"unknown key {where}.{key}{nearest(key, parameters)}")
        if key in hints and not fits(value, hints[key]):
            raise UserError(
                f"{where}.{key} = {value!r} ({type(value).__name__}) should be {describe(hints[key])}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in section:
            raise UserError(f"missing key {where}.{key}: add it to the config")


def fits(value, hint) -> bool:
    """Whether a config value fits a type annotation; an int fits a float, a list fits a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
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
        return all(fits(v, args[0]) for v in value) if args else True
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(hint) -> str:
    """A type annotation as a user reads it: `one of 'sgd', 'adamw'`, `int or None`."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return (
        getattr(hint, "__name__", str(hint))
        if not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )
