"""Trained networks to begin with or to learn from: folders of `transformers`, and work directories of earlier runs."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.export import files
from squeeze_jax.jobs._settings import tuples
from squeeze_jax.train.checkpoint import Checkpoints

MODEL = "model.json"  # in a work directory: what its network was made with
HEAD = re.compile(r"^(head|pooler|classifier)/")
LAYER = re.compile(r"^layer(\d+)/")


class Network(NamedTuple):
    """A trained network.

    Attributes:
      options: what `models.make` makes it of.
      read: (task, num_classes, key) → variables, numpy; what of a head is not there is initialised by the key.
      where: how an error calls it.
    """

    options: dict[str, Any]
    read: Callable[[dict[str, Any], jax.Array | None], dict[str, Any]]
    where: str


def find(folder: str = "", workdir: str = "", *, where: str) -> Network:
    """Looks for a network, without reading its weights.

    Args:
      folder: one that `transformers` writes: config.json and model.safetensors or pytorch_model.bin.
      workdir: of a run of this project.
      where: the section of the config that names it.

    Raises:
      UserError: neither or both are given, or there is no network.
    """
    if bool(folder) == bool(workdir):
        raise UserError(
            f"{where} should name a folder of transformers or a workdir of an earlier run, one of them"
        )
    if folder:
        return Network(models.options(folder), _folder_reader(folder), folder)
    path = pathlib.Path(workdir) / MODEL
    try:
        options = tuples(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{where}.workdir = {workdir!r} holds no trained network (no {MODEL}): train one there first"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    return Network(options, lambda options, key: checkpoint(workdir), workdir)


def settings(
    folder: str = "", workdir: str = "", only: str = "", layers: tuple[int, ...] = ()
) -> Network:
    """The network of `config.init`, see `find` and `begin`; the parameters are its keys."""
    for layer in layers:
        if layer < 1:
            raise UserError(f"config.init.layers has {layer}: layers count from 1")
    try:
        re.compile(only)
    except re.error as error:
        raise UserError(
            f"config.init.only = {only!r} is no regular expression ({error})"
        ) from None
    return find(folder, workdir, where="config.init")


def _folder_reader(folder):
    def read(options, key):
        rest = {k: v for k, v in options.items() if k != "name"}
        return models.load(folder, fresh=key, **rest)[1]

    return read


def checkpoint(workdir: str) -> dict[str, Any]:
    """The variables of a run's newest checkpoint, numpy.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if directory.is_dir():
        with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
            found = checkpoints.weights()
        if found is not None:
            return found
    raise UserError(f"no checkpoint in {workdir}: train there first")


def note(workdir: pathlib.Path, options: Mapping[str, Any]) -> None:
    """Writes what a run's network is made of, so that others can begin with it or learn from it."""
    files.write(workdir / MODEL, json.dumps(options, indent=2) + "\n")


def alone(workdir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run that has begun, without what only its training needs: networks to begin with or to learn from.

    Args:
      workdir: of the run.
      config: as it was begun.
    """
    path, rest = workdir / MODEL, dict(config)
    if path.exists():
        rest["model"] = tuples(json.loads(path.read_text()))
        for key in "init", "distill", "objective":
            rest.pop(key, None)
    return rest


def begin(
    network: Network,
    options: Mapping[str, Any],
    shapes: Mapping[str, Any],
    key: jax.Array,
    *,
    only: str = "",
    layers: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The variables that a run begins with: of a trained network, where they fit.

    Args:
      network: the trained one.
      options: what the new network is made of.
      shapes: {"params", "batch_stats"} of the new network.
      key: for what of the head the trained network does not have.
      only: takes the parameters whose names this regular expression finds, and leaves the others as initialised.
      layers: takes these of the trained network's layers, counted from 1, as the first, second, …

    Raises:
      UserError: parameters are missing or of other shapes, but for the head's; names the first.
    """
    whole = not only and not layers
    given = network.read(
        {**network.options, **options} if whole else network.options, key
    )
    if layers:
        given = given | {"params": _chosen(given["params"], layers, network.where)}
    fitted = {}
    for collection, wanted in shapes.items():
        have = tree.flatten(given.get(collection, {}))
        want = tree.flatten(wanted)
        names = [n for n in want if re.search(only, n)] if only else list(want)
        if only and collection == "params" and not names:
            raise UserError(
                f"config.init.only = {only!r} matches no parameter; there is {next(iter(want))}, for example"
            )
        taken = {}
        for name in names:
            array = have.get(name)
            if array is not None and np.shape(array) == want[name].shape:
                taken[name] = np.asarray(array, want[name].dtype)
            elif not HEAD.search(name):
                found = "is not there" if array is None else f"is {np.shape(array)}"
                raise UserError(
                    f"{network.where} does not fit the model: {name} {found}, should be {want[name].shape}; take only"
                    " what fits by config.init.only, a regular expression over names"
                )
        fitted[collection] = traverse_util.unflatten_dict(taken, sep="/")
    return fitted


def _chosen(params, layers, where):
    """Parameters with the chosen layers in place of all."""
    there = {int(m[1]) for m in map(LAYER.match, tree.flatten(params)) if m}
    for layer in layers:
        if layer not in there:
            raise UserError(
                f"config.init.layers has {layer}: {where} has layers 1 to {max(there, default=0)}"
            )
    kept = {k: v for k, v in params.items() if not re.fullmatch(r"layer\d+", k)}
    return kept | {f"layer{n}": params[f"layer{of}"] for n, of in enumerate(layers, 1)}


def teacher(
    section: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> tuple[nn.Module, Callable[[], dict[str, Any]], str]:
    """A network to learn from, a function that reads its variables, and where it is.

    Args:
      section: {"folder": …} or {"workdir": …}.
      defaults: options that the data decide, such as the task.
      where: the section's name in the config.
    """
    if not isinstance(section, Mapping):
        raise UserError(
            f'{where} = {section!r} should be {{"workdir": DIR}} or {{"folder": DIR}}'
        )
    registry.check(find, section, where, given=("where",))
    network = find(**section, where=where)
    options = {**network.options, **defaults}
    return models.make(**options), lambda: network.read(options, None), network.where
