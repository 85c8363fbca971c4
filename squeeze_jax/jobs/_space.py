"""The space of networks that a run trains, for the jobs that extract, measure and search."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _phases, _plugs, _workdir
from squeeze_jax.jobs._experiment import Built, Experiment
from squeeze_jax.methods import METHODS
from squeeze_jax.nas import costs
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.space import Arch

METHOD = "nas.once_for_all"
SIZES = ("smallest", "largest")  # names of architectures


class Trained(NamedTuple):
    """How the networks of a space were trained.

    Attributes:
      networks: the networks.
      method: name of the method under which the training state has its matrices of kernels; "" if there is no such method.
      experiment: the experiment in the phase of the trained network, with its gradient method, and with the keys that the
        command has changed, such as the path of the data.
    """

    networks: Family
    method: str
    experiment: Experiment

    def transforms(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the matrices of kernels that the method has learned, {layer: {"7to5": matrix}}; {} without them."""
        return params.get(METHODS, {}).get(self.method, {})


def trained(built: Built, workdir: pathlib.Path) -> Trained:
    """Returns the networks that the phase of the trained network has trained.

    Args:
      built: the experiment, as a job gets it that needs a trained network: without the methods of training.
      workdir: its work directory, whose config has them.

    Raises:
      UserError: the network has no elastic options.
    """
    config, now = _workdir.read(workdir), built.whole.config()
    changed = {k: now[k] for k in _workdir.FREE_SECTIONS if k in now}
    whole = _experiment.check(config | changed)
    experiment, _ = _phases.at_phase(whole, built.phase.index)
    return Trained(*_family(built, experiment), experiment)


def family(built: Built) -> Family:
    """Returns the networks that the last phase of an experiment trains, which may be untrained.

    Raises:
      UserError: the network has no elastic options.
    """
    last = max(0, len(built.whole.phases) - 1)
    return _family(built, _phases.at_phase(built.whole, last)[0])[0]


def _family(built: Built, experiment: Experiment) -> tuple[Family, str]:
    """Returns (the networks that an experiment trains, the name of its method)."""
    section, choices, method = experiment.gradients or {}, None, ""
    if section.get("name") == METHOD:
        choices = section.get("choices")
        method = _plugs.make_plugs(experiment).gradients.name
    plain = _plugs.plain(built.data.example())
    try:
        return Family(built.options, plain, choices), method
    except UserError:
        if method or not _has_fixed_options(built.options, plain):
            raise
        raise UserError(
            "config.model names one network of the space, which the run has trained alone: name the --workdir of the run that"
            " has trained the space"
        ) from None


def _has_fixed_options(options: Mapping[str, Any], plain: Any) -> bool:
    """Returns whether a network has elastic options, and its options give values of them."""
    with contextlib.suppress(UserError):
        return any(options.get(name) is not None for name in plain.elastic(options))
    return False


def pieces(built: Built, networks: Family) -> costs.Pieces:
    """Returns the pieces of all networks of a space, for one example."""
    return costs.Pieces(networks, one_example(built))


def one_example(built: Built) -> Any:
    """Returns the shapes of the network's inputs for one example."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), built.data.example()
    )


def architecture(networks: Family, arch: Mapping[str, Any] | str, where: str) -> Arch:
    """Returns the architecture that a setting names.

    Args:
      networks: the space.
      arch: "smallest", "largest", or elastic options.
      where: the setting's name, for error messages.

    Raises:
      UserError: the space does not have it.
    """
    if isinstance(arch, Mapping):
        return networks.space.arch(arch)
    if arch not in SIZES:
        raise UserError(
            f'{where} = {arch!r} should be "smallest", "largest" or a dict such as {{"depth": 2}}'
        )
    return getattr(networks.space, arch)()


def describe(options: Mapping[str, Any]) -> str:
    """Returns elastic options in a line, such as "depth 2 1, kernel 3 5"."""
    return ", ".join(
        f"{name} {' '.join(map(str, values))}" for name, values in options.items()
    )
