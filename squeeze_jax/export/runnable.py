"""An exported file, opened: the one shape that every runtime is brought into."""

import importlib.metadata
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import files, registry
from squeeze_jax.errors import UserError, nearest, shortened
from squeeze_jax.export import listing

FORMATS = "squeeze_jax.export.formats"


class Spec(NamedTuple):
    """An input or an output of a file, without the axis of examples, such as ((224, 224, 3), float32).

    Attributes:
      shape, dtype: of one example.
      range: the least and the greatest value that an input may have, such as (0, 255) of pixels, or None: unknown.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    range: tuple[float, float] | None = None


class Runnable(NamedTuple):
    """A file in its runtime.

    Attributes:
      inputs: what it takes, {name: Spec}.
      batch: the only batch size it takes; None means any.
      run: {name: [batch, ...]}, of the inputs' dtypes → {name: float32 [batch, ...]} of its outputs.
      timed: such inputs → a function that runs the file once on them; copying them in is not timed.
      runtime: name and version of what runs it.
    """

    inputs: dict[str, Spec]
    batch: int | None
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    timed: Callable[[Mapping[str, np.ndarray]], Callable[[], Any]]
    runtime: str


def format_of(key: str) -> types.ModuleType:
    """Loads a format's file and looks for the packages that it needs.

    Raises:
      UserError: no such format, or a package is missing, as where it is not built for this kind of machine.
    """
    module = registry.load(FORMATS, key, "export format")
    for package in module.NEEDS:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"export format {key} needs the package {package}: pip install {package}, or leave {key} out of"
                " config.export.formats"
            ) from None
    return module


def opened(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a file in the runtime that its extension names.

    Raises:
      UserError: no such file, no such format, or the runtime cannot read it.
    """
    path = files.path(path)
    if not path.is_file():
        raise UserError(f"no exported file at {path}: export it first")
    listing.verify(path)
    extension = path.suffix.removeprefix(".")
    # A method or a model of the user's own may be called as a format of the library, so that the library's comes first.
    loaders = registry.own_files() | {key: key for key in registry.names(FORMATS)}
    if extension not in loaders:
        raise UserError(
            f"{path} is no exported file that can be run: expected .stablehlo or .tflite, or for a format of your own the"
            " name of its Python file"
        )
    try:
        return registry.load(FORMATS, loaders[extension]).load(path, threads)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # each runtime has exceptions of its own for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be run as {extension}: {reason[0]}") from error


def specs(
    inputs: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Spec]:
    """Returns inputs as `Spec`s.

    Args:
      inputs: {name: whatever has a shape and a dtype, such as `jax.ShapeDtypeStruct`}, of one example.
      ranges: {input: (least, greatest value)}, of those whose ranges are known.

    Raises:
      UserError: inputs that are no such mapping, or a range of an unknown input, of integers, or that is empty.
    """
    example = "{'image': jax.ShapeDtypeStruct((224, 224, 3), 'float32')}"
    if not isinstance(inputs, Mapping) or not inputs:
        raise UserError(
            f"inputs should be a dict of one example's shapes, such as {example}, not {shortened(repr(inputs), 100)}"
        )
    for name, each in inputs.items():
        if not hasattr(each, "shape") or not hasattr(each, "dtype"):
            raise UserError(
                f"the input {name!r} is {shortened(repr(each), 100)} and should have a shape and a dtype: {example}"
            )
    found = {
        name: Spec(tuple(map(int, each.shape)), np.dtype(each.dtype))
        for name, each in inputs.items()
    }
    for name, ends in (ranges or {}).items():
        if name not in found:
            raise UserError(f"ranges: there is no input {name!r}{nearest(name, found)}")
        if found[name].dtype.kind != "f":
            raise UserError(
                f"ranges: the input {name} is {found[name].dtype}: integers stay what they are; leave its range out"
            )
        ends = tuple(map(float, ends))
        if len(ends) != 2 or not ends[0] < ends[1] or not np.isfinite(ends).all():
            raise UserError(
                f"ranges: {name} = {ends} should be the least and the greatest value"
            )
        found[name] = found[name]._replace(range=ends)
    return found


def named(found: Any) -> dict[str, Any]:
    """Returns a function's outputs by name: an array is called logits, and the arrays of a sequence output_0, output_1, ….

    Raises:
      UserError: it is neither, or an output is no array.
    """
    if isinstance(found, Mapping):
        named_outputs = dict(found)
    elif isinstance(found, tuple | list) and not hasattr(found, "shape"):
        nested = next((each for each in found if isinstance(each, Mapping)), None)
        if nested is not None:
            raise UserError(
                "the function returns a tuple of outputs and a dict, as a network does with its endpoints: return the"
                " outputs alone, such as model.apply(variables, x)[0]"
            )
        named_outputs = {f"output_{i}": each for i, each in enumerate(found)}
    else:
        named_outputs = {"logits": found}
    if not named_outputs:
        raise UserError(
            "the function returns nothing: it should return an array [b, ...]"
        )
    for name, each in named_outputs.items():
        if not hasattr(each, "shape") or not isinstance(name, str):
            raise UserError(
                f"the function's output {name!r} is of type {type(each).__name__}: it should return an array, or a flat dict"
                " of arrays by name"
            )
    return named_outputs


def fitted(
    examples: Any, inputs: Mapping[str, Any], taker: str = "the file"
) -> dict[str, np.ndarray]:
    """Checks that examples are what a file takes.

    Args:
      examples: {name: [n, ...]}; for a file of one input also the array alone.
      inputs: what it takes, {name: Spec}.
      taker: what takes them, for errors.

    Returns:
      {name: [n, ...]} in the order of the inputs, of the same dtypes as they came.

    Raises:
      UserError: a missing or an unknown input, another shape, real numbers for integers, no examples, or not as many
        of one input as of another.
    """
    names = ", ".join(inputs)
    if not isinstance(examples, Mapping):
        if len(inputs) > 1:
            raise UserError(
                f"{taker} takes {names}: give an array for each, not one for all"
            )
        examples = dict.fromkeys(inputs, examples)
    for name in examples:
        if name not in inputs:
            raise UserError(f"{taker} has no input {name!r}{nearest(name, inputs)}")
    for name in inputs:
        if name not in examples:
            raise UserError(f"{taker} takes {names}: {name} is missing")
    arrays = {name: np.asarray(examples[name]) for name in inputs}
    for name, array in arrays.items():
        shape, dtype, _ = inputs[name]
        if array.shape[1:] != shape or not array.size:
            expected = ", ".join(map(str, ("n", *shape)))
            raise UserError(
                f"{name} is {list(array.shape)}, {taker} takes [{expected}] with n ≥ 1"
            )
        if array.dtype.kind not in ("biuf" if dtype.kind == "f" else "biu"):
            raise UserError(f"{name} is {array.dtype}, {taker} takes {dtype}")
        if len(array) != len(arrays[next(iter(arrays))]):
            first = next(iter(arrays))
            raise UserError(
                f"{name} has {len(array)} examples, {first} has {len(arrays[first])}"
            )
    return arrays


def outputs(runnable: Runnable, examples: Any, batch: int) -> dict[str, np.ndarray]:
    """Runs all examples, in batches of one size so that a compiled program is compiled once.

    Args:
      runnable: an opened file.
      examples: see `fitted`, any dtype that fits; pixels are 0..255.
      batch: examples at a time where the file takes any number.

    Returns:
      {name: [n, ...]} of its outputs.

    Raises:
      UserError: see `fitted`.
    """
    arrays = fitted(examples, runnable.inputs)
    n = len(next(iter(arrays.values())))
    size = runnable.batch or min(batch, n)
    parts = []
    for start in range(0, n, size):
        rows = np.arange(start, start + size).clip(max=n - 1)
        parts.append(runnable.run(cast(arrays, runnable.inputs, rows)))
    return {
        name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]
    }


def cast(
    arrays: Mapping[str, np.ndarray], inputs: Mapping[str, Spec], rows: Any
) -> dict[str, np.ndarray]:
    """Some examples in the dtypes that a file takes."""
    return {name: a[rows].astype(inputs[name].dtype) for name, a in arrays.items()}
