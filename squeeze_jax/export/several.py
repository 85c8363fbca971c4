"""Converts several functions to TFLite files in one child process, which loads the converter once.

python -m squeeze_jax.export.several FOLDER FORMAT     # converts all NAME.mlirbc there, as `convert` has written them
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import files, stop
from squeeze_jax.errors import UserError
from squeeze_jax.export import process
from squeeze_jax.export.formats import tflite, tflite_int8
from squeeze_jax.export.runnable import Spec

FORMATS = ("tflite", "tflite_int8")
SECONDS = 3600.0


class Job(NamedTuple):
    """A function to convert.

    Attributes:
      name: of the file, without its suffix.
      fn: {input: [1, ...]} → an array or a mapping of arrays, with constant weights.
      inputs: {input: Spec}.
      calibration: examples {input: [n, ...]} for an integer file; None for a float one.
    """

    name: str
    fn: Callable
    inputs: Mapping[str, Spec]
    calibration: Mapping[str, Any] | None = None


def convert(
    jobs: Iterable[Job],
    folder: Path,
    key: str,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes NAME.tflite for each job that has no file yet; an interrupted call goes on where it stopped.

    Args:
      jobs: functions; each is traced only if its file is missing.
      folder: where the files go.
      key: format, one of `FORMATS`.
      progress: called with the number of new files while the child converts.

    Raises:
      process.Crash: a conversion failed; the message names the file.
    """
    from squeeze_jax.nn import conv
    from squeeze_jax.nn.conv import lowering

    wanted = []
    for job in jobs:
        stop.check()
        if (folder / f"{job.name}.tflite").exists():
            continue
        with lowering("native"), conv.separate_groups():
            program = tflite.lower(job.fn, job.inputs)
        if job.calibration is not None:
            np.savez(folder / f"{job.name}.npz", **job.calibration)
        arguments = json.dumps(program.arguments)
        files.write(folder / f"{job.name}.json", arguments)
        files.write(folder / f"{job.name}.mlirbc", program.stablehlo)
        wanted.append(folder / f"{job.name}.tflite")
    if not wanted:
        return
    try:
        process.run_module(
            *("squeeze_jax.export.several", folder, key),
            what=f"the conversion to {key}",
            timeout=SECONDS,
            poll=lambda: progress(sum(path.exists() for path in wanted)),
        )
    except process.Crash as error:
        failed = next((path.stem for path in wanted if not path.exists()), "")
        raise process.Crash(f"{failed}: {error}") from None


def _convert_folder(folder: Path, key: str) -> None:
    """Converts all programs of a folder, in the order of their names, and deletes them."""
    for source in sorted(folder.glob("*.mlirbc")):
        settings = source.with_suffix(".json")
        calibration = source.with_suffix(".npz")
        arguments = json.loads(settings.read_text())
        content = tflite.to_flatbuffer(source.read_bytes(), **arguments)
        if key == "tflite_int8":
            with np.load(calibration) as examples:
                content = tflite_int8.quantize_file(
                    content, dict(examples), arguments["ranges"]
                )
        files.write(source.with_suffix(".tflite"), content)
        for path in (source, settings, calibration):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        _convert_folder(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(process.USER_ERROR)
