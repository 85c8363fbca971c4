"""What the trained network says of files or words on the command line: labels of images or sentences, answers."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from squeeze_jax import stop
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import evaluate, export
from squeeze_jax.jobs._experiment import Built

EXAMPLES = False  # of the data are not needed


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints what the data make of `inputs` and the network's answers.

    Raises:
      UserError: data without predictions, no input, one that cannot be read, or no checkpoint.
    """
    export.alone("predict")
    if getattr(built.data, "predict", None) is None:
        raise UserError(
            f"the job predict has nothing to print for {built.experiment.data.get('name', 'images')!r} data: their task defines no predict"
        )
    answer = []  # read and compiled when the first input is known to be one

    def call(batch):
        if not answer:
            state = evaluate.trained(built, workdir)
            answer.append(jax.jit(export.live(built, state)))
        return jax.tree.map(np.asarray, answer[0](batch))

    for line in built.data.predict(inputs, call):
        stop.check()
        print(line)
