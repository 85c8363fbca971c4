"""Evaluates the trained network on the whole evaluation set."""

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
    """Prints the scores of the trained network on the evaluation set, such as its accuracy.

    Raises:
      UserError: the command line names files, there is no checkpoint, or it does not fit.
    """
    if inputs:
        raise UserError(
            f"the job evaluate takes no files: {inputs[0]}; to classify them use --job=predict"
        )
    state = trained_state(built, workdir)
    scores = fit.make_evaluator(built)(state)
    if jax.process_index() == 0:
        print(
            f"step {int(state.step)} · {log.format_scores(scores)} · {built.data.num_eval:,} {built.data.noun}s"
        )


def trained_state(built: Built, workdir: pathlib.Path) -> State:
    """Restores the state of the trained network from the checkpoint that `config.checkpoint.use` selects.

    That is the newest undamaged checkpoint, or the best.

    Args:
      built: the experiment in the phase of the trained network.
      workdir: the run's work directory.

    Raises:
      UserError: there is no such checkpoint, or it does not fit the model.
    """
    directory = workdir / "checkpoints"
    settings = built.checkpoints
    if directory.is_dir():
        with contextlib.closing(
            Checkpoints(directory, **settings, read_only=True)
        ) as checkpoints:
            restored = checkpoints.restore_network(
                functools.partial(_abstract_state, built)
            )
            if restored is not None:
                return restored.state
    raise UserError(
        f"no checkpoint in {workdir}; run --job=fit --workdir={workdir} first"
    )


def _abstract_state(built: Built, note: Mapping[str, Any]) -> State:
    """Returns the shapes of the training state; raises a UserError if a checkpoint's note names another phase."""
    if note.get("phase", 0) != built.phase.index:
        raise UserError(
            f"the checkpoint of step {note['step']} is of phase {note['phase'] + 1} of the run, not of phase"
            f" {built.phase.index + 1}, whose checkpoint is damaged: run --job=fit again"
        )
    return built.abstract()
