"""The main job: train, evaluate, export, run every exported file again, and print one table."""

import pathlib
from collections.abc import Sequence

import jax

from squeeze_jax.errors import UserError
from squeeze_jax.export.runnable import load_format
from squeeze_jax.jobs import _experiment, _settings, benchmark, evaluate, export, fit
from squeeze_jax.jobs._experiment import Built

RUN = "begins"  # where the work directory holds none yet


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Checks what can be checked before a work directory is made.

    Raises:
      UserError: see `fit.ready`; a format of export whose packages are missing.
    """
    if inputs:
        raise UserError(f"{inputs[0]}: files are for --job=predict")
    fit.ready(built)
    if jax.process_count() == 1:
        for key in _settings.of(built, export.Settings).formats:
            load_format(key)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Does the jobs fit, evaluate, export and benchmark in turn; what is trained already is not trained again.

    Raises:
      export.Rejected: a file was rejected; the report has the others.
    """
    ready(built, inputs)
    built = fit.run(built, workdir)
    if built.whole.phases:  # the best checkpoint may be of another phase than the last
        built = _experiment.opened(workdir, built.whole.config())
    evaluate.run(built, workdir)
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            print(
                f"run --job=export and --job=benchmark with --workdir={workdir} in one process"
            )
        return
    rejected = export.write(built, workdir)
    benchmark.run(built, workdir)
    export.report(rejected)
