"""Does everything in turn: trains, evaluates and exports the network, and measures the exported files.

For a config with the section "search", the trained network is a space of networks. Then the job measures the latency tables of
the section "latency_table", searches the space, and trains, exports and measures the found network in its own work directory.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from squeeze_jax import files
from squeeze_jax.errors import UserError
from squeeze_jax.export.runnable import load_format
from squeeze_jax.jobs import (
    _experiment,
    _search_report,
    _settings,
    _workdir,
    benchmark,
    evaluate,
    export,
    fit,
    latency_table,
    search,
)
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
    if "search" in built.whole.jobs:
        to = _settings.job_settings(built, search.Settings).to
        # An earlier call of this job may have written the found network.
        if to is not None and not _workdir.is_trained(files.path(to)):
            search.check_target(files.path(to))
    if jax.process_count() == 1:
        for key in _settings.job_settings(built, export.Settings).formats:
            load_format(key)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Does the jobs fit, evaluate, export and benchmark in turn; training continues from the newest checkpoint.

    What an interrupted run has finished is kept. With several processes, export and benchmark are left out, because they run
    in one process.

    Raises:
      export.Rejected: a format was rejected; the report has the others.
    """
    ready(built, inputs)
    if "search" in built.whole.jobs:
        search.check_before_training(built, workdir)
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
    if "search" in built.whole.jobs:
        _search_and_ship(built, workdir)
        return
    rejected = export.write_files(built, workdir)
    benchmark.run(built, workdir)
    export.raise_rejected(rejected)


def _search_and_ship(built: Built, workdir: pathlib.Path) -> None:
    """Searches a trained space, and does this job in the found network's work directory."""
    sections = dataclasses.asdict(built.whole)["jobs"]  # as this command has them
    if "latency_table" in sections:
        config = _workdir.read(workdir) | sections
        latency_table.run(_experiment.build(_experiment.check(config)), workdir)
    found = search.found_directory(built, workdir)
    if _workdir.is_trained(found):
        print(f"found      already: {found}")
    else:
        search.run(built, workdir)
    print()
    shipped = {k: v for k, v in sections.items() if k in ("export", "benchmark")}
    config = _workdir.read(found) | shipped
    run(_experiment.build(_experiment.check(config)), found)
    print(_search_report.describe_latencies(workdir, found))
