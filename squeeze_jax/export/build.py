"""Exports a function to files: converts it, runs each file in its own runtime, and compares the outputs with the function's.

A file gets its final name only if its outputs agree.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files, registry, stop
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.export import checks, class_names, process, runtime
from squeeze_jax.export.parity import Disagreement, compare, first_diverging
from squeeze_jax.export.runnable import (
    Runnable,
    check_examples,
    check_finite,
    compute_outputs,
    input_specs,
    load_format,
)
from squeeze_jax.nn.conv import lowering
from squeeze_jax.ranges import Positive, Share

__all__ = ["Disagreement", "Exported", "Exporter", "make"]

STEM = "model"
CHECK_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported file that ran and agreed with the live model.

    Attributes:
      format: registry key of its format.
      path: path of the file.
      bytes: size of the file.
      max_difference: largest |file output - live output| over the check examples.
      agreement: share of check examples with the same top class, 0..1; see `parity.compare`.
    """

    format: str
    path: Path
    bytes: int
    max_difference: float
    agreement: float


@registry.checked
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
    tolerance: Positive = 1e-4,
    int8_agreement: Share = 0.95,
    agreement: Callable | None = None,
    classes: Sequence[str] = (),
    timeout: Positive = 600.0,
) -> list[Exported]:
    """Exports a function to each format and keeps a file only if its outputs agree with the function's.

    A float file agrees if max |file - live| ≤ tolerance · max |live| for each output. An integer file agrees if the share
    of equal top classes is at least `int8_agreement`; see `parity.compare`. The files are `model.stablehlo` (with
    `model.mlir` as readable text), `model.tflite`, `model_int8.tflite` and `model_dynamic.tflite`. Inputs keep their names
    from `inputs`. A single output array is called logits, and the outputs in a tuple output_0, output_1, …. Files contain
    XLA's native convolutions.

    Args:
      fn: {name: [b, ...]} → logits [b, ...], or a tuple or mapping of several outputs. Parameters that it closes over are
        host arrays. The outputs of an example may depend only on its own inputs: a network in training mode, which uses
        batch statistics or dropout, is an error.
      inputs: {name: jax.ShapeDtypeStruct of one example}, such as {"image": float32 (h, w, c)}, or {"tokens": int32
        (l,), "segments": int32 (l,), "attended": int32 (l,)}.
      directory: folder for the files.
      formats: registry keys: the names of the files in `export/formats`.
      ranges: {input: (minimum, maximum)} of the inputs whose ranges are known, such as {"image": (0, 255)} for pixels,
        which an integer file then takes unchanged. The ranges of other inputs are measured on the calibration examples.
      calibration: real examples {name: [n, ...]}, for integer formats that measure ranges.
      check: real examples {name: [n, ...]} on which outputs are compared.
      endpoints_fn: the same inputs → the model's named stages, first to last. They locate the error in a rejected file.
      tolerance: limit for float formats, relative to the largest absolute value of an output.
      int8_agreement: least agreement for integer formats, 0..1; also for float formats if `agreement` is given.
      agreement: (live outputs, file outputs) → float [n], the agreement 0..1 of each check example; None for
        `parity.same_answers`.
      classes: class names, which the files store as `labels.txt`; `load(path).classes` reads them.
      timeout: seconds that one file may run on the check examples.

    Returns:
      One `Exported` per format, in order.

    Raises:
      UserError: an unknown format; a class name with a line break; missing check or calibration examples, or examples whose
        names, shapes or dtypes differ from the inputs; a directory that cannot be written to; or outputs of the live
        function that are not finite, are not arrays with an axis of examples, are random, or depend on other examples.
      Disagreement: a file does not agree. It is kept as `<name>.rejected`; an earlier file of that name is left untouched.
      process.Crash: a converter or a runtime failed.
    """
    for key in formats:
        load_format(key)
    exporter = Exporter(
        fn,
        inputs,
        ranges=ranges,
        calibration=calibration,
        check=check,
        endpoints_fn=endpoints_fn,
        tolerance=tolerance,
        int8_agreement=int8_agreement,
        agreement=agreement,
        classes=classes,
        timeout=timeout,
    )
    return [exporter.write(key, directory) for key in formats]


class Exporter:
    """Exports a function, which runs on the check examples once for all formats.

    For the arguments and errors see `make`.
    """

    def __init__(
        self,
        fn: Callable[[dict[str, Any]], Any],
        inputs: Mapping[str, Any],
        *,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        calibration: Any = None,
        check: Any,
        endpoints_fn: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        tolerance: float = 1e-4,
        int8_agreement: float = 0.95,
        agreement: Callable | None = None,
        classes: Sequence[str] = (),
        timeout: float = 600.0,
    ):
        class_names.check(classes)
        inputs = input_specs(inputs, ranges)
        check = check_examples(check, inputs, "the model")
        check_finite(check, "check")
        if calibration is not None:
            examples = check_examples(calibration, inputs, "to calibrate, the model")
            check_finite(examples, "calibration")
        checks.check_output_shapes(fn, inputs)
        runnable, outputs = _run_model(fn, inputs, check)
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                example = int(np.argwhere(~np.isfinite(values))[0][0])
                raise UserError(
                    f"the model's {name} for check example {example} are not finite: export a checkpoint from before it diverged"
                )
        _check_number_of_classes(classes, outputs)
        checks.check_independence(fn, runnable, check, outputs, CHECK_BATCH)
        self._fn, self._endpoints_fn, self._outputs = fn, endpoints_fn, outputs
        self._limits = dict(
            tolerance=tolerance, int8_agreement=int8_agreement, agreement=agreement
        )
        self._run = functools.partial(
            _convert_and_run,
            inputs=inputs,
            calibration=calibration,
            check=check,
            classes=classes,
            timeout=timeout,
        )

    def write(self, key: str, directory: str | Path) -> Exported:
        """Writes the function's file of one format to a folder, if it agrees."""
        stop.check()
        module, directory = load_format(key), files.path(directory)
        with _temporary_folder(directory) as folder:
            run = functools.partial(self._run, folder=Path(folder))
            paths, outputs = run(module, self._fn, STEM)
            verdict = compare(
                self._outputs, outputs, integer=module.INTEGER, **self._limits
            )
            if not verdict.agrees:
                for path in paths:
                    files.move(path, directory / f"{path.name}.rejected")
                stage, detail = None, ""
                if self._endpoints_fn is not None:
                    stage, detail = _locate_divergence(
                        self._endpoints_fn, module, run, self._limits["tolerance"]
                    )
                raise Disagreement(paths[0].name, verdict, stage, detail)
            for path in paths:
                files.move(path, directory / path.name)
                with contextlib.suppress(OSError):  # what is no file is not ours
                    # A file that was rejected before is out of date.
                    (directory / f"{path.name}.rejected").unlink(missing_ok=True)
        path = directory / paths[0].name
        return Exported(
            format=key,
            path=path,
            bytes=path.stat().st_size,
            max_difference=verdict.difference,
            agreement=verdict.agreement,
        )


def _check_number_of_classes(classes, outputs) -> None:
    """Raises a UserError unless there is a class name for each logit of a model with one output."""
    (output, *others) = outputs.values()
    if classes and not others and len(classes) != output.shape[-1]:
        raise UserError(
            f"classes names {len(classes)} classes, and the model returns {output.shape[-1]} logits: name each class, in order"
        )


def _convert_and_run(
    module, fn, name, *, folder, inputs, calibration, check, classes, timeout
):
    """Converts a function to files in a folder, runs the first file, and returns (paths, outputs of that file)."""
    with lowering("native"):
        try:
            contents = module.convert(fn, inputs, calibration)
        except Exception as error:
            if isinstance(error, Reported) or not registry.is_own(module):
                raise
            line = registry.describe_error(error)
            raise process.Crash(f"the conversion failed: {line}") from error
    if getattr(module, "NAMED", False):
        first = next(iter(contents))
        contents[first] = class_names.attach(contents[first], classes)
    paths = [files.write(folder / (name + end), data) for end, data in contents.items()]
    try:
        results = runtime.run(paths[0], check, batch=CHECK_BATCH, timeout=timeout)
    except (UserError, process.Crash) as error:
        # The examples have been checked, so the file is at fault. Its temporary folder will be gone.
        reason = str(error).replace(f"{folder}{os.sep}", "")
        raise process.Crash(f"the converted file does not run: {reason}") from None
    return paths, results["outputs"]


def _run_model(fn, inputs, check) -> tuple[Runnable, dict[str, np.ndarray]]:
    """Runs the live function on the check examples.

    Returns:
      (the function as a `Runnable`, {name: output [n, ...]} in the function's own order).
    """
    run, names = checks.compile_model(fn)
    runnable = Runnable(inputs, None, run, None, "")
    arrays = compute_outputs(runnable, check, CHECK_BATCH)
    return runnable, {name: arrays[name] for name in names}


def _locate_divergence(endpoints_fn, module, run, tolerance) -> tuple[str | None, str]:
    """Exports the model's stages in the same format and finds the first stage whose outputs diverge.

    Returns:
      (stage or None, end of the error message).
    """
    _, model_stages = _run_model(
        endpoints_fn, run.keywords["inputs"], run.keywords["check"]
    )
    try:
        _, file_stages = run(module, endpoints_fn, "stages")
    except process.Crash as error:
        return None, f"; the stages alone could not be run: {error}"
    first = first_diverging(
        model_stages, file_stages, integer=module.INTEGER, tolerance=tolerance
    )
    if first is None:
        names = list(model_stages)
        explained = " within what 8 bits explain" if module.INTEGER else ""
        return None, f"; the stages {names[0]} to {names[-1]} agree{explained}"
    return first[0], f" (largest difference {first[1]:.3g})"


def _temporary_folder(directory: Path) -> tempfile.TemporaryDirectory:
    """Returns a temporary folder on the same disk, so that moving a file out of it is atomic."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
