"""Evaluates the trained network on the whole test set."""

import contextlib
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from squeeze_jax.errors import UserError
from squeeze_jax.jobs import fit
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import log
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.state import State


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints the scores of the trained network, such as its accuracy.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    if inputs:
        raise UserError(
            f"the job evaluate takes no files: {inputs[0]}; to classify them use --job=predict"
        )
    state = trained(built, workdir)
    result = fit.evaluator(built)(state)
    if jax.process_index() == 0:
        print(
            f"step {int(state.step)} · {log.format_scores(result)} · {built.data.num_eval:,} {built.data.noun}s"
        )


def trained(built: Built, workdir: pathlib.Path) -> State:
    """The state that `config.checkpoint.use` names: the newest whole checkpoint or the best.

    Raises:
      UserError: there is none, or it does not fit the model.
    """
    directory = workdir / "checkpoints"
    settings = built.checkpoints
    if directory.is_dir():
        with contextlib.closing(
            Checkpoints(directory, **settings, read_only=True)
        ) as checkpoints:
            restored = checkpoints.restore_network(functools.partial(_abstract, built))
            if restored is not None:
                return restored.state
    raise UserError(
        f"no checkpoint in {workdir}; run --job=fit --workdir={workdir} first"
    )


def _abstract(built: Built, note: Mapping[str, Any]) -> State:
    """Returns the shapes of a checkpoint; raises a UserError if it belongs to another phase than the experiment."""
    if note.get("phase", 0) != built.phase.index:
        raise UserError(
            f"the checkpoint of step {note['step']} is of phase {note['phase'] + 1} of the run, not of phase"
            f" {built.phase.index + 1}, whose checkpoint is damaged: run --job=fit again"
        )
    return built.abstract()
