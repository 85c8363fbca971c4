"""Opens an exported file in its runtime, and gives every runtime the same interface, `Runnable`."""

import importlib.metadata
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import files, registry
from squeeze_jax.errors import UserError, message_of, nearest, shortened
from squeeze_jax.export import listing

FORMATS = "squeeze_jax.export.formats"
TFLITE_IDENTIFIER = b"TFL3"  # a TFLite file has it in its bytes 4 to 8


class Spec(NamedTuple):
    """The shape and dtype of a file's input for one example, such as ((224, 224, 3), float32).

    Attributes:
      shape, dtype: shape and dtype of one example, without the batch axis.
      range: (minimum, maximum) of an input's possible values, such as (0, 255) for pixels; None if unknown.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    range: tuple[float, float] | None = None


class Runnable(NamedTuple):
    """A file opened in its runtime.

    Attributes:
      inputs: {name: Spec} of its inputs.
      batch: the only batch size that it accepts; None for any.
      run: {input: [batch, ...]}, in the dtypes of `inputs` → {output: [batch, ...]}, float32, or integers and bools as
        the file computes them.
      timed: the same inputs → a function that runs the file once on them. Timing that function excludes copying the inputs.
      runtime: name and version of the runtime.
    """

    inputs: dict[str, Spec]
    batch: int | None
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    timed: Callable[[Mapping[str, np.ndarray]], Callable[[], Any]]
    runtime: str


def load_format(key: str) -> types.ModuleType:
    """Loads the module of an export format and checks that the packages it needs are installed.

    Raises:
      UserError: the format is unknown, or a package is missing, for example because it is not built for this platform.
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


def open_file(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a file in the runtime of its format, see `format_of`.

    Raises:
      UserError: no such file, no such format, or the runtime cannot read it.
    """
    path = files.path(path)
    if not path.is_file():
        raise UserError(f"no exported file at {path}: export it first")
    listing.verify(path)
    key = format_of(path)
    if key is None:
        raise UserError(
            f"{path} is not an exported file that can be run: expected .stablehlo or .tflite, or for a format of your own the"
            " name of its Python file"
        )
    try:
        return registry.load(FORMATS, key).load(path, threads)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # each runtime raises its own exceptions for a damaged file
        raise UserError(
            f"{path} cannot be run as {Path(key).stem}: {message_of(error)}"
        ) from error


def format_of(path: str | Path) -> str | None:
    """Returns the format of an exported file: the one that its suffix names in upper or lower case, or "tflite" by its content.

    Returns:
      A name of a format of the library, or the path of the Python file of a format of the user's own; None if unknown.

    Raises:
      UserError: the file has another suffix and cannot be read.
    """
    suffix = Path(path).suffix.removeprefix(".")
    # A user's method or model may have the name of a format of the library; the format takes precedence.
    formats = registry.own_files() | {key: key for key in registry.names(FORMATS)}
    lower_case_formats = {name.lower(): key for name, key in formats.items()}
    key = formats.get(suffix) or lower_case_formats.get(suffix.lower())
    if key is not None:
        return key
    return "tflite" if is_tflite(path) else None


def is_tflite(path: str | Path) -> bool:
    """Returns whether a file begins as a TFLite file does; raises a UserError if it cannot be read."""
    try:
        with files.open_file(path) as file:
            return file.read(8)[4:] == TFLITE_IDENTIFIER
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def input_specs(
    inputs: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Spec]:
    """Returns {name: Spec} of a model's inputs.

    Args:
      inputs: {name: an object with a shape and a dtype of one example, such as `jax.ShapeDtypeStruct`}.
      ranges: {input: (minimum, maximum)} of the inputs whose ranges are known.

    Raises:
      UserError: `inputs` is not such a mapping, or a range is empty or belongs to an unknown or integer input.
    """
    example = "{'image': jax.ShapeDtypeStruct((224, 224, 3), 'float32')}"
    if not isinstance(inputs, Mapping) or not inputs:
        raise UserError(
            f"inputs should be a dict of one example's shapes, such as {example}, not {shortened(repr(inputs), 100)}"
        )
    for name, array in inputs.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise UserError(
                f"the input {name!r} is {shortened(repr(array), 100)} and should have a shape and a dtype: {example}"
            )
    specs = {
        name: Spec(tuple(map(int, array.shape)), np.dtype(array.dtype))
        for name, array in inputs.items()
    }
    for name, bounds in (ranges or {}).items():
        if name not in specs:
            raise UserError(f"ranges: there is no input {name!r}{nearest(name, specs)}")
        if specs[name].dtype.kind != "f":
            raise UserError(
                f"ranges: the input {name} is {specs[name].dtype}: integers stay what they are; leave its range out"
            )
        bounds = tuple(map(float, bounds))
        if (
            len(bounds) != 2
            or not bounds[0] < bounds[1]
            or not np.isfinite(bounds).all()
        ):
            raise UserError(
                f"ranges: {name} = {bounds} should be the least and the greatest value"
            )
        specs[name] = specs[name]._replace(range=bounds)
    return specs


def name_outputs(result: Any) -> dict[str, Any]:
    """Returns {name: output} for the result of a function.

    A mapping keeps its names. A single array is called logits, and the arrays of a sequence output_0, output_1, ….

    Raises:
      UserError: the result is none of these or empty, or an output is not an array.
    """
    if isinstance(result, Mapping):
        outputs = dict(result)
    elif isinstance(result, tuple | list) and not hasattr(result, "shape"):
        nested = next((item for item in result if isinstance(item, Mapping)), None)
        if nested is not None:
            raise UserError(
                "the function returns a tuple of outputs and a dict, as a network does with its endpoints: return the"
                " outputs alone, such as model.apply(variables, x)[0]"
            )
        outputs = {f"output_{i}": item for i, item in enumerate(result)}
    else:
        outputs = {"logits": result}
    if not outputs:
        raise UserError(
            "the function returns nothing: it should return an array [b, ...]"
        )
    for name, output in outputs.items():
        if not hasattr(output, "shape") or not isinstance(name, str):
            raise UserError(
                f"the function's output {name!r} is of type {type(output).__name__}: it should return an array, or a flat dict"
                " of arrays by name"
            )
    return outputs


def check_examples(
    examples: Any, inputs: Mapping[str, Any], taker: str = "the file"
) -> dict[str, np.ndarray]:
    """Checks that examples match the inputs of a file, and returns them as arrays.

    Args:
      examples: {name: [n, ...]}; for a file with one input also the array itself.
      inputs: {name: Spec} of the file's inputs.
      taker: name of the file or model in error messages.

    Returns:
      {name: [n, ...]} in the order of the inputs, in the dtypes of the examples.

    Raises:
      UserError: an input is missing or unknown, an array has another shape or has floats for integers, there are no examples,
        or the inputs have different numbers of examples.
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


def compute_outputs(
    runnable: Runnable, examples: Any, batch: int
) -> dict[str, np.ndarray]:
    """Runs a file on all examples, in batches of equal size so that its program is compiled only once.

    Args:
      runnable: an opened file.
      examples: as for `check_examples`, in any dtype that the file accepts; pixels are 0..255.
      batch: batch size if the file accepts any.

    Returns:
      {output: [n, ...]}.

    Raises:
      UserError: as `check_examples`.
    """
    arrays = check_examples(examples, runnable.inputs)
    n = len(next(iter(arrays.values())))
    size = runnable.batch or min(batch, n)
    batches = []
    for start in range(0, n, size):
        rows = np.arange(start, start + size).clip(max=n - 1)
        batches.append(runnable.run(cast_rows(arrays, runnable.inputs, rows)))
    return {
        name: np.concatenate([outputs[name] for outputs in batches])[:n]
        for name in batches[0]
    }


def check_finite(arrays: Mapping[str, np.ndarray], argument: str) -> None:
    """Raises a UserError for examples with values that are not finite; `argument` names the examples."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            example = int(np.argwhere(~np.isfinite(array))[0][0])
            raise UserError(
                f"{argument}: {name} of example {example} has values that are not finite: give other examples"
            )


def cast_rows(
    arrays: Mapping[str, np.ndarray], inputs: Mapping[str, Spec], rows: Any
) -> dict[str, np.ndarray]:
    """Returns the selected rows of examples, in the dtypes of a file's inputs.

    Raises:
      UserError: an integer that the input's dtype does not hold.
    """
    cast = {}
    for name, array in arrays.items():
        dtype, values = inputs[name].dtype, array[rows]
        if dtype.kind in "iu" and values.dtype.kind in "iu":
            limits = np.iinfo(dtype)
            for value in (int(values.min()), int(values.max())):
                if not limits.min <= value <= limits.max:
                    raise UserError(
                        f"{name} has the value {value}, and the file takes {dtype}, {limits.min} to {limits.max}"
                    )
        cast[name] = values.astype(dtype)
    return cast
