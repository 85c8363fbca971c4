"""Does everything in turn: trains, evaluates and exports the network, and measures the exported files."""

import pathlib
from collections.abc import Sequence

import jax

from squeeze_jax.errors import UserError
from squeeze_jax.export.runnable import load_format
from squeeze_jax.jobs import _experiment, _settings, benchmark, evaluate, export, fit
from squeeze_jax.jobs._experiment import Built

RUN = "begins"  # a run, unless the work directory holds one


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Checks what can be checked before the work directory is created.

    Raises:
      UserError: see `fit.ready`; or the packages of an export format are missing.
    """
    if inputs:
        if inputs[0] in _settings.job_names():
            raise UserError(
                f"{inputs[0]} is a job, not a file: write --job={inputs[0]}"
            )
        raise UserError(f"{inputs[0]}: files are for --job=predict")
    fit.ready(built)
    if jax.process_count() == 1:
        for key in _settings.job_settings(built, export.Settings).formats:
            load_format(key)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Does the jobs fit, evaluate, export and benchmark in turn; training continues from the newest checkpoint.

    With several processes, export and benchmark are left out, because they run in one process.

    Raises:
      export.Rejected: a format was rejected; the report has the others.
    """
    ready(built, inputs)
    built = fit.run(built, workdir)
    if built.whole.phases:  # the trained network may be from an earlier phase
        built = _experiment.build_trained(workdir, built.whole.config())
    evaluate.run(built, workdir)
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            print(
                f"run --job=export and --job=benchmark with --workdir={workdir} in one process"
            )
        return
    rejected = export.write_files(built, workdir)
    benchmark.run(built, workdir)
    export.raise_rejected(rejected)
