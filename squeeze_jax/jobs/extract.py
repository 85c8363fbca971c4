"""Extracts one network of a trained space, as a work directory of its own: every job goes on from there.

The job copies the network's part of the largest network's weights, and measures the statistics of its normalisation layers
on training examples. The new work directory has the config of the run's last phase, without the settings of supernets.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from squeeze_jax import files, models, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _found,
    _phases,
    _places,
    _plain,
    _settings,
    _space,
    _workdir,
    evaluate,
    fit,
)
from squeeze_jax.jobs._experiment import Built, Experiment
from squeeze_jax.nas.recalibrate import recalibrate
from squeeze_jax.nas.space import Arch
from squeeze_jax.ranges import Count, PathStr
from squeeze_jax.train import forward, log, sharding
from squeeze_jax.train.state import State

ARCH = "config.extract.arch"
PARTIAL = ".partial"  # ends the name of a work directory that is being written
# Keys of a config that train the whole space, and that the extracted network's config does not keep.
_OF_SPACE = ("gradients", "phases", "model", "init")
_OF_SPACE += ("extract", "latency_table", "search")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.extract`.

    Attributes:
      to: the new work directory; it has to be named.
      arch: elastic options of the network, such as {"depth": 2, "kernel": (3, 5, ...)}, each with one value for all positions
        or one for each; options that are absent have their largest values. Or "smallest" or "largest".
      examples: number of training examples for the statistics of normalisation layers; at least 1.
    """

    to: PathStr | None = None
    arch: Mapping[str, Any] | str = dataclasses.field(default_factory=dict)
    examples: Count = 2048


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Raises a UserError if the network has no elastic options, or the settings do not name a work directory."""
    if inputs:
        raise UserError(f"the job extract takes no files: {inputs[0]}")
    settings = _settings.job_settings(built, Settings)
    if settings.to is None:
        raise UserError(
            "config.extract.to is missing: name the new work directory, such as --config.extract.to=runs/small"
        )
    check_target(files.path(settings.to), "config.extract.to")
    _space.family(built)


def check_target(
    target: pathlib.Path, key: str, workdir: pathlib.Path | None = None
) -> None:
    """Raises a UserError if a path cannot become a new work directory.

    Args:
      target: the path.
      key: how the error calls it, such as "config.extract.to".
      workdir: the run's work directory, in which other folders have their own use; None if it is not known yet.
    """
    if workdir is not None and (used := _places.used_by_run(target, workdir)):
        raise UserError(
            f"{key} = {str(target)!r} lies in {used}, which the run itself writes: choose another folder"
        )
    partial = target.with_name(target.name + PARTIAL)
    if os.path.lexists(partial) and not _is_partial(partial):
        raise UserError(
            f"{key} = {str(target)!r}: {partial}, where it is written first, exists already: move it away, or choose another"
            " folder"
        )
    if any((target / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"{key} = {str(target)!r} holds a run already: choose another work directory, or delete it"
        )
    files.check_new_folder(target, key, PARTIAL)


def _is_partial(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds nothing but what an interrupted extraction leaves there."""
    names = {"config.json", "model.json", _found.NAME, "checkpoints", ".lock"}
    return folder.is_dir() and all(
        p.name in names or files.written_name(p) in names for p in folder.iterdir()
    )


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> Built:
    """Writes the work directory `config.extract.to`, and prints the extracted network's costs and scores.

    Returns:
      The experiment of the new work directory.

    Raises:
      UserError: see `ready`; or there is no checkpoint.
    """
    ready(built, inputs)
    settings = _settings.job_settings(built, Settings)
    check_target(files.path(settings.to), "config.extract.to", workdir)
    trained = _space.trained(built, workdir)
    arch = _space.architecture(trained.networks, settings.arch, ARCH)
    state = evaluate.trained_state(built, workdir)
    target = files.path(settings.to)
    return write(built, trained, state, arch, target, settings.examples)


def write(
    built: Built,
    trained: _space.Trained,
    state: State,
    arch: Arch,
    target: pathlib.Path,
    examples: int,
    steps: int | None = None,
    found: str = "",
) -> Built:
    """Writes a network's work directory, and prints its costs and scores.

    Args:
      built: the experiment in the phase of the trained network.
      trained: the networks.
      state: the trained state.
      arch: the network's architecture.
      target: the new work directory.
      examples: number of training examples for the statistics of normalisation layers.
      steps: number of training steps in the new config; None takes the number of the trained phase.
      found: the text of `found.json` for a network that a search has found; "" for none.

    Returns:
      The experiment of the new work directory.
    """
    networks, state = trained.networks, jax.device_get(state)
    options, variables = networks.extract(
        arch, state.plain(), trained.transforms(state.variables()["params"])
    )
    print(f"extracted  {_space.describe(networks.space.options(arch))}")
    if not trained.method:
        print("warning    the run has trained the largest network alone")
    examples = min(examples, built.data.num_train)
    variables["batch_stats"] = recalibrated(built, options, variables, examples)
    if variables["batch_stats"]:
        batch = built.experiment.batch
        whole = -(-examples // batch) * batch
        print(f"statistics measured anew on {whole:,} training examples")
    config = trained.experiment.config()  # with the settings of the last phase
    kept = {k: v for k, v in config.items() if k not in _OF_SPACE}
    kept["steps"] = steps or built.phase.steps
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted extraction
    try:
        small = _plain.write(partial, kept, options, variables)
        if found:
            files.write(partial / _found.NAME, found)
        scores = fit.make_evaluator(small)(evaluate.trained_state(small, partial))
        # Last, because the same command refuses a complete work directory.
        _workdir.move(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    parameters, macs = size_of(small, variables)
    print(f"network    {parameters:,} parameters, {macs:,} MACs per example")
    print(f"scores     {log.format_scores(scores)}")
    print(f"written    {target}: next, --job=fit, export or benchmark", flush=True)
    return small


def recalibrated(
    built: Built,
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
    examples: int,
) -> dict[str, Any]:
    """Returns the statistics of a network's normalisation layers on training examples, as they are augmented in training.

    Args:
      built: the experiment, for its data.
      options: options of `models.make` of the network.
      variables: its {"params", "batch_stats"}.
      examples: number of examples, rounded up to whole batches.
    """
    if not jax.tree.leaves(variables.get("batch_stats", {})):
        return {}
    e, data = built.experiment, built.data
    network = forward.make(
        models.make(**options, norm_momentum=0.0), data.example(), dtype=e.dtype
    )
    replicated = sharding.replicated(built.mesh)
    placed = jax.device_put(variables, replicated)

    @jax.jit
    def batch_statistics(batch, key):
        augmented = data.augment(key, batch)
        _, changed = forward.run(
            network, placed, data.inputs(augmented), train=True, key=key
        )
        return changed["batch_stats"]

    keys = iter(jax.random.split(jax.random.key(e.seed), -(-examples // e.batch)))
    batches = data.train(e.batch, e.seed, 0, (0, 1))
    try:
        stats = recalibrate(
            lambda pair: batch_statistics(fit.put_batch(pair[0], built), pair[1]),
            ((next(batches), key) for key in keys),
        )
    finally:
        batches.close()
    return jax.tree.map(np.asarray, jax.device_get(stats))


def size_of(built: Built, variables: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (parameters, MACs per example) of a network."""
    example = _space.one_example(built)
    macs = count.macs(built.model.apply, dict(variables), example).total
    return tree.size(variables["params"]), macs


def training_macs(
    whole: Experiment, smallest: float, mean: float, largest: float
) -> float:
    """Returns the MACs of a training run, in which a backward pass costs two forward passes.

    Args:
      whole: the experiment with all its phases and methods.
      smallest, mean, largest: MACs of the smallest, of a random and of the largest network for one example.
    """
    total = 0.0
    for index in range(max(1, len(whole.phases))):
        experiment, phase = _phases.at_phase(whole, index)
        section = experiment.gradients or {}
        each = 3 * largest
        if section.get("name") == _space.METHOD:
            random = section.get("random", 2)
            each = 3 * random * mean + largest
            if section.get("rule", "sandwich") == "sandwich":
                each += 2 * largest + 3 * smallest
        total += each * phase.steps * experiment.batch
    return total
