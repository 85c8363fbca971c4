"""Loads any trained network in one call: published weights, folders of `transformers`, work directories of runs."""

import logging
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from squeeze_jax import files, models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _noted, _pretrained
from squeeze_jax.models import _load
from squeeze_jax.weights import foreign

_log = logging.getLogger("squeeze_jax")


def load(
    path: str | Path,
    model: nn.Module | str | None = None,
    example: Any = None,
    **options: Any,
) -> Any:
    """Loads trained weights into a network: as `models._load.load`, whose arguments these are, and work directories too.

    A work directory gives the network of the checkpoint that `config.checkpoint.use` of its run selects, with the weights
    that it runs with. Options such as num_classes=7 change the network; then the classifier is initialised anew.

    Args:
      path: a file of weights, a folder of `transformers`, or a work directory of `run.py`.
      model: a network, or the name of its file in `models`; None for a folder or a work directory, which say it.
      example: an input of the network or its shape; see `models._load.load`.
      **options: names, under, key, fresh; and options of the network's `make`.

    Returns:
      variables if `model` is a network; else (network, variables).

    Raises:
      UserError: see `models._load.load`; or the network does not fit the run's.
    """
    folder = files.path(path)
    if not (folder / _noted.MODEL).is_file():
        return _load.load(path, model, example, **options)
    fresh = options.pop("fresh", None)
    fresh = jax.random.key(0) if fresh is None else fresh
    if unused := [n for n in ("names", "under", "key") if options.pop(n, None)]:
        raise UserError(f"{unused[0]} has no effect on the work directory {path}")
    network = _pretrained.find(workdir=str(path), where="load")
    if network.forwards:
        _log.warning("%s: the weights are as the run's methods leave them", path)
    if isinstance(model, nn.Module):
        if options:
            raise UserError(
                f"{next(iter(options))} has no effect on a network that is made"
            )
        return _into(model, network, network.options["name"], example, fresh)
    stored = network.options["name"]
    if model not in (None, stored):
        raise UserError(f"{path} holds the network {stored!r}, not {model!r}")
    net = models.make(**network.options | options)
    return net, _into(net, network, stored, example, fresh)


def _into(net, network, name, example, fresh):
    """Returns the variables of a network with the weights of a run's, and a new classifier where that does not fit."""
    variables = network.plain(network.options, fresh)
    shapes = foreign.variable_shapes(net, _load.example_input(net, example))
    head = _pretrained.head_names(name)
    loaded, want = tree.flatten(variables), tree.flatten(dict(shapes))
    taken = {}
    for leaf, shape in want.items():
        array = loaded.get(leaf)
        if array is not None and array.shape == shape.shape:
            taken[leaf] = array
        elif not leaf.partition("/")[2].startswith(head):
            found = "is not there" if array is None else f"is {array.shape}"
            raise UserError(
                f"{network.where} does not fit the model: {leaf} {found}, should be {shape.shape}"
            )
    layers = sorted(
        {n.rpartition("/")[0].partition("/")[2] for n in want if n not in taken}
    )
    if layers:
        _log.warning(
            "%s: %s initialised anew: train it", network.where, ", ".join(layers)
        )
    return _load.complete_variables(net, taken, example, fresh)
