"""Loads any trained network in one call: published weights, a folder of `transformers`, or a run's work directory."""

import logging
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from squeeze_jax import files, models, tree
from squeeze_jax.errors import UserError, shown
from squeeze_jax.jobs import _model_json, _pretrained, _workdir
from squeeze_jax.models import _load
from squeeze_jax.nn.mode import mode_argument
from squeeze_jax.weights import foreign, weight_files
from squeeze_jax.weights import pretrained as weights

_log = logging.getLogger("squeeze_jax")


def load(
    path: str | Path,
    model: nn.Module | str | None = None,
    example: Any = None,
    **options: Any,
) -> Any:
    """Loads trained weights into a network.

    Published weights and folders are loaded by `models._load.load`, which explains all arguments. A work directory gives the
    network of the checkpoint that `config.checkpoint.use` of its run selects; methods that change weights, such as pruning
    masks, are applied. Options such as num_classes=7 change the network; then the classifier is initialised anew.

    Args:
      path: a file of weights, a folder of `transformers`, or a work directory of `run.py`.
      model: a network, or the name of its file in `models`; None for a folder or a work directory, which name their network.
      example: an input of the network or its shape; see `models._load.load`.
      **options: names, under, key, fresh; and options of the network's `make`.

    Returns:
      variables if `model` is a network; else (network, variables).

    Raises:
      UserError: see `models._load.load`; or the network does not fit the run's.
    """
    if not isinstance(path, str | Path):
        raise UserError(
            f"{shown(path)} is no path: give a file of weights, a folder of transformers or a work directory"
        )
    if isinstance(model, type):
        raise UserError(
            f"model is the class {model.__name__}: give a network, {model.__name__}(…)"
        )
    folder = files.path(path)
    if not folder.exists() and not weight_files.is_known(folder):
        raise UserError(
            f"there is no file or folder {path}: check the path; a network of the Hugging Face Hub is downloaded first, such as"
            f" by huggingface_hub.snapshot_download"
        )
    if not (folder / _model_json.NAME).is_file():
        return _load.load(path, model, example, **options)
    fresh = options.pop("fresh", None)
    fresh = jax.random.key(0) if fresh is None else fresh
    if unused := [n for n in ("names", "under", "key") if options.pop(n, None)]:
        raise UserError(f"{unused[0]} has no effect on the work directory {path}")
    trained = _pretrained.find_network(workdir=str(folder), where="load")
    example = _example_of(folder) if example is None else example
    if trained.forward_sections:
        _log.warning("%s: the weights are as the run's methods leave them", path)
    if isinstance(model, nn.Module):
        if options:
            raise UserError(
                f"{next(iter(options))} has no effect on a network that is made"
            )
        return _load_into(model, trained, trained.options["name"], example, fresh)
    name = trained.options["name"]
    if model not in (None, name):
        raise UserError(f"{path} holds the network {name!r}, not {model!r}")
    net = models.make(**trained.options | options)
    return net, _load_into(net, trained, name, example, fresh)


def _example_of(workdir: Path) -> tuple[int, ...] | None:
    """Returns the shape of an image of a run's data, [1, h, w, c]; None for other data."""
    channels = (_model_json.read(workdir) or {}).get("source", {}).get("channels")
    if not channels:
        return None
    size = _workdir.read(workdir).get("data", {}).get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return 1, height, width, channels


def _load_into(net, trained, name, example, fresh):
    """Returns a network's variables with a trained network's weights; initialises the classifier if it does not fit.

    Args:
      net: the network.
      trained: the `PretrainedNetwork`.
      name: the file of `models` that both are made by.
      example, fresh: see `load`.

    Raises:
      UserError: a parameter outside the classifier is missing or has another shape.
    """
    variables, _ = trained.plain_variables(trained.options, fresh)
    mode = mode_argument(net, False)
    shapes = foreign.variable_shapes(net, _load.example_input(net, example), **mode)
    expected, module = tree.flatten(dict(shapes)), _load.module_of(net)
    classifier = (
        *_pretrained.classifier_layers(name),
        *getattr(module, "CLASSIFIER", ()),
    )
    loaded = tree.flatten(variables)
    taken, _ = weights.fit_same_names(
        loaded, expected, classifier, module, trained.location
    )
    for names, problem in (
        (expected.keys() - taken.keys(), "initialised anew: train it"),
        (loaded.keys() - expected.keys(), "left out: the network has none"),
    ):
        layers = sorted({n.rpartition("/")[0].partition("/")[2] for n in names})
        if layers:
            _log.warning("%s: %s %s", trained.location, ", ".join(layers), problem)
    return _load.complete_variables(net, taken, example, fresh)
