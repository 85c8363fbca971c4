"""Writes the predictions on the test set in the official format of a benchmark, GLUE or SQuAD."""

import pathlib
from collections.abc import Sequence

import jax.numpy as jnp

from squeeze_jax import files
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import evaluate, export, fit
from squeeze_jax.jobs._experiment import Built


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Writes the files to `workdir/submission`.

    Raises:
      UserError: the command line names files, the data have no official format, or the test set or the checkpoint is
        missing.
    """
    if inputs:
        raise UserError(f"the job submit takes no files: {inputs[0]}")
    export.check_single_process("submit")
    data = built.data
    if not hasattr(data, "submission"):
        raise UserError(
            f"config.data has nothing to submit: there is no official format for a {data.noun}"
        )
    state = evaluate.trained_state(built, workdir)
    if hasattr(data, "test"):  # this split has no labels, so no score is computed
        rows = fit.run_evaluation(built, state, data.test, _keep_logits, _keep_rows)
    else:
        measure = built.metric.measure
        rows = fit.run_evaluation(built, state, data.eval, measure, _keep_rows)
    for name, text in data.submission(rows).items():
        path = files.write(workdir / "submission" / name, text)
        print(f"written    {path}")


def _keep_logits(logits, batch):
    """Serves as the function `measure` of a `Metric`: keeps the logits of each example."""
    return {"examples": jnp.sum(batch["mask"])}, {"logits": logits}


def _keep_rows(sums, rows):
    """Serves as the function `score` of a `Metric`: returns what was kept of each example."""
    del sums
    return rows
