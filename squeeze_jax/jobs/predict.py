"""Prints the trained network's predictions for files or texts on the command line."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from squeeze_jax import stop
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import evaluate, export
from squeeze_jax.jobs._experiment import Built

EXAMPLES = False  # the data's examples are not needed


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints the predictions for `inputs`, in the form that the data's kind defines.

    Raises:
      UserError: this kind of data has no predictions, there is no input, an input cannot be read, or there is no checkpoint.
    """
    export.check_single_process("predict")
    if getattr(built.data, "predict", None) is None:
        raise UserError(
            f"the job predict has nothing to print for {built.experiment.data.get('name', 'images')!r} data: their task"
            " defines no predict"
        )
    compiled = []  # filled at the first batch, when an input has turned out to be readable

    def infer(batch):
        if not compiled:
            state = evaluate.trained_state(built, workdir)
            compiled.append(jax.jit(export.inference_function(built, state)))
        return jax.tree.map(np.asarray, compiled[0](batch))

    for line in built.data.predict(inputs, infer):
        stop.check()
        print(line)
