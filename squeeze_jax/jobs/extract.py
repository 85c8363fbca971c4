"""Extracts one network of a trained space, as a work directory of its own: every job goes on from there.

The network is an ordinary one, with its part of the largest network's weights, and the config is that of the run's last phase. The statistics of its normalisation layers are
measured anew on training examples.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from squeeze_jax import files, models, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _plain, _plugs, _settings, evaluate, fit
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.methods import METHODS
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.recalibrate import recalibrate
from squeeze_jax.ranges import Count, PathStr
from squeeze_jax.train import forward, log, sharding

METHOD = "nas.once_for_all"
SIZES = ("smallest", "largest")  # names of architectures
# Keys of a config that train the whole space, and that the extracted network's config does not keep.
_OF_SPACE = ("gradients", "phases", "model", "init", "extract")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.extract`.

    Attributes:
      to: the new work directory.
      arch: elastic options of the network, such as {"depth": 2, "kernel": (3, 5, ...)}, each with one value for all positions
        or one for each; options that are absent have their largest values. Or "smallest" or "largest".
      examples: number of training examples for the statistics of normalisation layers; at least 1.
    """

    to: PathStr | None = None
    arch: Mapping[str, Any] | str = dataclasses.field(default_factory=dict)
    examples: Count = 2048


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Raises a UserError if the network has no elastic options, or the settings do not name a network and a work directory."""
    if inputs:
        raise UserError(f"the job extract takes no files: {inputs[0]}")
    settings = _settings.job_settings(built, Settings)
    if settings.to is None:
        raise UserError(
            "config.extract.to is missing: name the new work directory, such as --config.extract.to=runs/small"
        )
    if any((files.path(settings.to) / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"config.extract.to = {settings.to} holds a run already: choose another work directory"
        )
    architecture(_family(built), settings.arch)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> Built:
    """Writes the work directory `config.extract.to`, and prints the extracted network's costs and scores.

    Returns:
      The experiment of the new work directory.

    Raises:
      UserError: see `ready`; or there is no checkpoint.
    """
    ready(built, inputs)
    settings = _settings.job_settings(built, Settings)
    family = _family(built)
    arch = architecture(family, settings.arch)
    state = jax.device_get(evaluate.trained_state(built, workdir))
    options, variables = family.extract(
        arch, state.plain(), transforms_of(built, state.variables()["params"])
    )
    elastic = family.space.options(arch)
    print(f"extracted  {_describe(elastic)}")
    if built.experiment.gradients is None:
        print("warning    the last phase has trained the largest network alone")
    examples = min(settings.examples, built.data.num_train)
    variables["batch_stats"] = recalibrated(built, options, variables, examples)
    if variables["batch_stats"]:
        print(f"statistics measured anew on {examples:,} training examples")
    config = built.experiment.config()  # with the settings of the last phase
    kept = {k: v for k, v in config.items() if k not in _OF_SPACE}
    kept["steps"] = built.phase.steps
    small = _plain.write(settings.to, kept, options, variables)
    scores = fit.make_evaluator(small)(
        evaluate.trained_state(small, files.path(settings.to))
    )
    parameters, macs = size_of(small, variables)
    print(f"network    {parameters:,} parameters, {macs:,} MACs per example")
    print(f"scores     {log.format_scores(scores)}")
    print(f"written    {settings.to}: next, --job=fit, export or benchmark")
    return small


def architecture(family: Family, arch: Mapping[str, Any] | str):
    """Returns the architecture that settings name; raises a UserError if the space does not have it."""
    if isinstance(arch, Mapping):
        return family.space.arch(arch)
    if arch not in SIZES:
        raise UserError(
            f'config.extract.arch = {arch!r} should be "smallest", "largest" or a dict such as {{"depth": 2}}'
        )
    return getattr(family.space, arch)()


def transforms_of(built: Built, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the matrices of kernels that the gradient method has learned, {layer: {"7to5": matrix}}; {} without them."""
    gradients = built.plugs.gradients
    return params.get(METHODS, {}).get(gradients.name, {}) if gradients else {}


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
    example = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), built.data.example()
    )
    macs = count.macs(built.model.apply, dict(variables), example).total
    return tree.size(variables["params"]), macs


def _family(built: Built) -> Family:
    """Returns the networks that the run's last phase has trained."""
    section = built.experiment.gradients or {}
    choices = section.get("choices") if section.get("name") == METHOD else None
    return Family(built.options, _plugs.plain(built.data.example()), choices)


def _describe(options: Mapping[str, Any]) -> str:
    """Returns the elastic options in a line, such as "depth 2 1, kernel 3 5"."""
    return ", ".join(
        f"{name} {' '.join(map(str, values))}" for name, values in options.items()
    )
