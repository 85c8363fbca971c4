"""Decides the options of an experiment's network, and checks that the network fits the data."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import data, models, registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _pretrained


def model_options(e, source: data.Data, init_network) -> dict[str, Any]:
    """Returns the arguments of `models.make` for an experiment's network.

    Later sources replace earlier ones: the trained network of `config.init`, the data (such as the number of classes),
    `config.model`.

    Args:
      e: the experiment.
      source: the data.
      init_network: the trained network of `config.init`, or None. Its options count only if all of it is taken.

    Raises:
      UserError: no network is named, the network does not read such data, or `config.model` contradicts `config.init`.
    """
    takes_all = init_network is not None and not (
        e.init.get("only") or e.init.get("layers")
    )
    init_options = init_network.options if takes_all else {}
    name = e.model.get("name", init_options.get("name"))
    if name is None:
        raise UserError("missing key config.model.name: add it to the config")
    if takes_all and name != init_options["name"]:
        raise UserError(
            f"config.model.name = {name!r}, but {init_network.location} holds {init_options['name']!r}: leave the key out, or"
            " take only what fits by config.init.only"
        )
    if takes_all and "variant" in e.model and "variant" not in init_options:
        raise UserError(
            f"config.model.variant = {e.model['variant']!r}: the sizes are those of {init_network.location}; leave the key"
            " out"
        )
    module = registry.load("squeeze_jax.models", name, "model")
    reads = getattr(module, "INPUTS", "images")
    if reads != source.reads:
        raise UserError(
            f"config.model.name = {name!r} reads {reads}, but config.data gives {source.reads}: choose a network for"
            f" {source.reads}"
        )
    parameters = inspect.signature(module.make).parameters
    data_options = {k: v for k, v in source.model.items() if k in parameters}
    options = {"name": name} | dict(init_options) | data_options | dict(e.model)
    models.check(options, "config.model")
    return options


def check_fit(options: Mapping[str, Any], model: nn.Module, source: data.Data) -> None:
    """Raises a UserError if a network has fewer classes or tokens than the data, or is for another task.

    Args:
      options: the arguments of `models.make` that built the network.
      model: the network.
      source: the data.
    """
    classes, needed = options.get("num_classes"), source.model.get("num_classes")
    if classes is not None and needed is not None and classes < needed:
        raise UserError(
            f"config.model.num_classes = {classes}, but the data's labels go up to {needed - 1}; leave the key out or set"
            f" it to {needed}"
        )
    task = source.model.get("task")
    model_task = getattr(model, "task", task)
    if task is not None and model_task != task:
        if "task" not in options:
            raise UserError(
                f"config.model.name = {options['name']!r} is for {model_task!r}, but config.data is for {task!r}: choose"
                " another network"
            )
        raise UserError(
            f"config.model.task = {model_task!r}, but config.data is for {task!r}: leave the key out"
        )
    vocabulary_size = getattr(source, "vocabulary", None)
    if vocabulary_size is not None and not _pretrained.vocabulary_fits(
        model, vocabulary_size
    ):
        raise UserError(
            f"the tokenizer has {vocabulary_size:,} tokens, the model's embedding {model.row.vocabulary:,}: give the"
            f" tokenizer that the network was trained with, or set config.model.vocabulary={vocabulary_size}"
        )
