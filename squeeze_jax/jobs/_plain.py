"""Writes a plain network as a work directory, so that every job goes on from it.

The network may come from shrinking, from the extraction of a sub-network, or from another program.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _noted, _settings, _workdir
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints


def write(
    workdir: str | pathlib.Path,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> Built:
    """Writes a network as a work directory whose only checkpoint, of step 0, holds it.

    The jobs evaluate, predict, export, benchmark and cost go on from there, and the job fit trains on from these weights as
    the config says.

    Args:
      workdir: a new work directory.
      config: as of run.py: the data, the optimizer and the number of steps that the job fit would do; "model" and "init"
        are left out.
      options: of `models.make`.
      variables: {"params", "batch_stats"} of the network.

    Raises:
      UserError: the work directory holds a run already, or the variables do not fit the network.
    """
    workdir = files.path(workdir)
    if any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{workdir} holds a run already: choose another work directory")
    kept = {k: v for k, v in config.items() if k not in ("model", "init")}
    config = _settings.canonical(kept | {"model": dict(options)})
    built = _experiment.build(_experiment.check(config))
    abstract = built.abstract()
    expected = {
        "params": forward.parameters(abstract.params),
        "batch_stats": abstract.stats,
    }
    arrays = {k: variables.get(k, {}) for k in expected}
    if problems := tree.differences(expected, arrays):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the variables do not fit the network {options.get('name')!r}: {'; '.join(problems[:3])}{more}"
        )
    state = built.create(
        tree.map_named(lambda name, a: np.asarray(a, np.float32), arrays)
    )
    _workdir.begin(workdir, config)
    directory, settings = workdir / "checkpoints", built.checkpoints
    with contextlib.closing(Checkpoints(directory, **settings)) as checkpoints:
        note = {"phase": 0, "first": 0, "options": built.options}
        note["forward"] = built.experiment.forward
        checkpoints.save(state, 0, built.whole.config(), note=note)
        checkpoints.wait()
    _noted.write(workdir, built.options, settings, built.data)
    return built
