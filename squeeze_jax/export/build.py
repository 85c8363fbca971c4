"""From a live function to checked files: convert, run in the file's own runtime, compare, and only then give it its name."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files, stop
from squeeze_jax.errors import UserError
from squeeze_jax.export import checks, class_names, process, runtime
from squeeze_jax.export.parity import Disagreement, compare, first_diverging
from squeeze_jax.export.runnable import (
    Runnable,
    fitted,
    format_of,
    outputs,
    specs,
)
from squeeze_jax.nn.conv import lowering

__all__ = ["Disagreement", "Exported", "make"]

STEM = "model"
CHECK_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that ran and agreed.

    Attributes:
      format: its registry key.
      path: the file.
      bytes: its size.
      max_difference: largest |file - live| over the outputs for the check examples.
      agreement: share of check examples with the same top class, 0..1; see `parity.compare`.
    """

    format: str
    path: Path
    bytes: int
    max_difference: float
    agreement: float


def make(
    fn: Callable[[dict[str, Any]], Any],
    inputs: Mapping[str, Any],
    directory: str | Path,
    *,
    formats: tuple[str, ...] = ("stablehlo", "tflite", "tflite_int8"),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    calibration: Any = None,
    check: Any,
    endpoints_fn: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    tolerance: float = 1e-4,
    int8_agreement: float = 0.95,
    agreement: Callable | None = None,
    classes: Sequence[str] = (),
    timeout: float = 600.0,
) -> list[Exported]:
    """Exports a function to each format; a file gets its name only after it ran and agreed with the live function.

    A float file agrees if max |file - live| ≤ tolerance · max |live| for each output, an integer file if the share of
    equal top classes is at least `int8_agreement`, see `parity.compare`. The files are `model.stablehlo` (and
    `model.mlir`, to read), `model.tflite`, `model_int8.tflite`, `model_dynamic.tflite`. Inputs have the names given
    here. An output that is an array is called logits, and the outputs in a tuple are called output_0, output_1, ….
    Files hold XLA's own convolutions.

    Args:
      fn: {name: [b, ...]} → logits [b, ...], or a tuple or a mapping of several outputs; closes over parameters that
        are host arrays. The outputs of an example may depend on nothing but its inputs: a network in training mode, with
        the batch's statistics or with dropout, is an error.
      inputs: {name: jax.ShapeDtypeStruct of one example}, such as {"image": float32 (h, w, c)}, or {"tokens": int32
        (l,), "segments": int32 (l,), "attended": int32 (l,)}.
      directory: where the files go.
      formats: registry keys: the names of the files in `export/formats`.
      ranges: {input: (least, greatest value)} of inputs whose ranges are known, such as {"image": (0, 255)} for pixels,
        which then go into an integer file as they are. The ranges of other inputs are measured on the calibration
        examples.
      calibration: real examples {name: [n, ...]}, for integer formats that measure ranges.
      check: real examples {name: [n, ...]} to compare on.
      endpoints_fn: same inputs → the model's named stages, first to last; tells where a rejected file goes wrong.
      tolerance: of float formats, relative to an output's largest number.
      int8_agreement: of integer formats, 0..1; of float formats too where `agreement` is given.
      agreement: (live outputs, the file's) → float [n], 0..1, of each check example; None for `parity.same_answers`.
      classes: names of the classes, which go into the files as `labels.txt`: `load(path).classes` reads them.
      timeout: seconds for one file to run on the check examples.

    Returns:
      One `Exported` a format, in order.

    Raises:
      UserError: unknown format, a class name with a line break, no check or calibration examples or of other names, shapes or dtypes than the inputs,
        a directory that cannot be written to, or outputs of the live function that are not finite, that are no arrays of
        examples, that are random or depend on other examples.
      Disagreement: a file does not agree; it is left as `<name>.rejected`, an earlier one of its name untouched.
      process.Crash: a converter or a runtime failed.
    """
    class_names.check(classes)
    modules = [format_of(key) for key in formats]
    inputs, directory = specs(inputs, ranges), files.path(directory)
    check = fitted(check, inputs, "the model")
    checks.shapes(fn, inputs)
    runnable, live = _live(fn, inputs, check)
    for name, values in live.items():
        if not np.isfinite(values).all():
            bad = int(np.argwhere(~np.isfinite(values))[0][0])
            raise UserError(
                f"the model's {name} for check example {bad} are not finite: export a checkpoint from before it diverged"
            )
    checks.independent(fn, runnable, check, live, CHECK_BATCH)
    limits = dict(tolerance=tolerance, int8_agreement=int8_agreement)
    limits["agreement"] = agreement
    done = []
    with _scratch(directory) as folder:
        run = functools.partial(
            _converted,
            folder=Path(folder),
            inputs=inputs,
            calibration=calibration,
            check=check,
            classes=classes,
            timeout=timeout,
        )
        for key, module in zip(formats, modules, strict=True):
            stop.check()
            paths, found = run(module, fn, STEM)
            verdict = compare(live, found, integer=module.INTEGER, **limits)
            if not verdict.agrees:
                for path in paths:
                    os.replace(path, directory / f"{path.name}.rejected")
                stage, why = None, ""
                if endpoints_fn is not None:
                    stage, why = _blame(endpoints_fn, module, run, tolerance)
                raise Disagreement(paths[0].name, verdict, stage, why)
            for path in paths:
                os.replace(path, directory / path.name)
            final = directory / paths[0].name
            size, same = final.stat().st_size, verdict.agreement
            done.append(Exported(key, final, size, verdict.difference, same))
    return done


def _converted(
    module, fn, name, *, folder, inputs, calibration, check, classes, timeout
):
    """Converts to files in a folder and runs the first; returns (paths, outputs)."""
    with lowering("native"):
        contents = module.convert(fn, inputs, calibration)
    if getattr(module, "NAMED", False):
        runs = next(iter(contents))
        contents[runs] = class_names.attach(contents[runs], classes)
    paths = [files.write(folder / (name + end), data) for end, data in contents.items()]
    try:
        found = runtime.run(paths[0], check, batch=CHECK_BATCH, timeout=timeout)
    except (
        UserError,
        process.Crash,
    ) as error:  # the examples fit: it is the file's fault
        said = str(error).replace(f"{folder}{os.sep}", "")  # that folder goes
        raise process.Crash(f"the converted file does not run: {said}") from None
    return paths, found["outputs"]


def _live(fn, inputs, check) -> tuple[Runnable, dict[str, np.ndarray]]:
    """Runs a function; returns it as a file would be, and its outputs in its order."""
    run, names = checks.live(fn)
    runnable = Runnable(inputs, None, run, None, "")
    found = outputs(runnable, check, CHECK_BATCH)
    return runnable, {name: found[name] for name in names}


def _blame(endpoints_fn, module, run, tolerance) -> tuple[str | None, str]:
    """Exports the stages in the same way and returns (the first that diverges, what to say of it)."""
    _, live = _live(endpoints_fn, run.keywords["inputs"], run.keywords["check"])
    try:
        _, found = run(module, endpoints_fn, "stages")
    except process.Crash as error:
        return None, f"; the stages alone could not be run: {error}"
    first = first_diverging(live, found, integer=module.INTEGER, tolerance=tolerance)
    if first is None:
        names = list(live)
        explained = " within what 8 bits explain" if module.INTEGER else ""
        return None, f"; the stages {names[0]} to {names[-1]} agree{explained}"
    return first[0], f" (largest difference {first[1]:.3g})"


def _scratch(directory: Path) -> tempfile.TemporaryDirectory:
    """A folder on the same disk, so that renaming out of it is atomic."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
