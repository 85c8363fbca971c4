"""Writes a network as a work directory, so that every job can use it.

The network may come from pruning whole channels, from the extraction of a sub-network, or from another program.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from squeeze_jax import files, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _model_json, _settings, _workdir
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.weights import foreign


def write(
    workdir: str | pathlib.Path,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> Built:
    """Writes a network as a work directory with one checkpoint, of step 0.

    The jobs evaluate, predict, export, benchmark and cost use the network, and the job fit trains it further as the config
    says.

    Args:
      workdir: a new work directory.
      config: a config as run.py takes it: the data, the optimizer and the number of steps for the job fit. Its sections
        "model" and "init" are ignored.
      options: the arguments of `models.make` that build the network.
      variables: {"params", "batch_stats"} of the network, arrays that are stored as float32.

    Returns:
      The experiment.

    Raises:
      UserError: the work directory holds a run already, or the variables do not fit the network.
    """
    workdir = files.path(workdir)
    if any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{workdir} holds a run already: choose another work directory")
    others = {k: v for k, v in config.items() if k not in ("model", "init")}
    config = _settings.canonical(others | {"model": dict(options)})
    built = _experiment.build(_experiment.check(config))
    abstract = built.abstract()
    expected = {
        "params": forward.parameters(abstract.params),
        "batch_stats": abstract.stats,
    }
    arrays = {k: variables.get(k, {}) for k in expected}
    if problems := tree.differences(expected, arrays):
        module = registry.load("squeeze_jax.models", options["name"], "model")
        raise foreign.misfit("the variables", problems, foreign.advice_for(module))
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
    _workdir.write_config(workdir)
    _model_json.write(workdir, built.options, settings, built.data)
    return built
