"""The space of networks that a run trains, for the jobs that extract, measure and search."""

from collections.abc import Mapping
from typing import Any

import jax

from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _phases, _plugs
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.methods import METHODS
from squeeze_jax.nas import costs
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.space import Arch

METHOD = "nas.once_for_all"
SIZES = ("smallest", "largest")  # names of architectures


def family(built: Built, whole: bool = False) -> Family:
    """Returns the networks that the experiment's phase trains.

    Args:
      built: the experiment in the phase of the trained network.
      whole: whether the run's last phase counts instead.

    Raises:
      UserError: the network has no elastic options.
    """
    experiment = built.experiment
    if whole:
        last = max(0, len(built.whole.phases) - 1)
        experiment, _ = _phases.at_phase(built.whole, last)
    section = experiment.gradients or {}
    choices = section.get("choices") if section.get("name") == METHOD else None
    return Family(built.options, _plugs.plain(built.data.example()), choices)


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


def transforms_of(built: Built, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the matrices of kernels that the gradient method has learned, {layer: {"7to5": matrix}}; {} without them."""
    gradients = built.plugs.gradients
    return params.get(METHODS, {}).get(gradients.name, {}) if gradients else {}


def describe(options: Mapping[str, Any]) -> str:
    """Returns elastic options in a line, such as "depth 2 1, kernel 3 5"."""
    return ", ".join(
        f"{name} {' '.join(map(str, values))}" for name, values in options.items()
    )
