"""The network of an experiment: which options it is made with, and whether it fits the data."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import data, models, registry
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _pretrained


def options(e, source: data.Data, begin) -> dict[str, Any]:
    """Returns the options of `models.make`: those of a trained network, then those that the data decide, then the config's."""
    whole = begin is not None and not (e.init.get("only") or e.init.get("layers"))
    there = begin.options if whole else {}
    name = e.model.get("name", there.get("name"))
    if name is None:
        raise UserError("missing key config.model.name: add it to the config")
    if whole and name != there["name"]:
        raise UserError(
            f"config.model.name = {name!r}, but {begin.where} holds {there['name']!r}: leave the key out, or take only"
            " what fits by config.init.only"
        )
    if whole and "variant" in e.model and "variant" not in there:
        raise UserError(
            f"config.model.variant = {e.model['variant']!r}: the sizes are those of {begin.where}; leave the key out"
        )
    network = registry.load("squeeze_jax.models", name, "model")
    reads = getattr(network, "INPUTS", "images")
    if reads != source.reads:
        raise UserError(
            f"config.model.name = {name!r} reads {reads}, but config.data gives {source.reads}: choose a network for"
            f" {source.reads}"
        )
    known = inspect.signature(network.make).parameters
    decided = {k: v for k, v in source.model.items() if k in known}
    options = {"name": name} | dict(there) | decided | dict(e.model)
    models.check(options, "config.model")
    return options


def check_fit(options: Mapping[str, Any], model: nn.Module, source: data.Data) -> None:
    """Raises a UserError if a network has too few classes or tokens for the data, or another task."""
    classes, needed = options.get("num_classes"), source.model.get("num_classes")
    if classes is not None and needed is not None and classes < needed:
        raise UserError(
            f"config.model.num_classes = {classes}, but the data's labels go up to {needed - 1}; leave the key out or set"
            f" it to {needed}"
        )
    task = source.model.get("task")
    own = getattr(model, "task", task)
    if task is not None and own != task:
        if "task" not in options:
            raise UserError(
                f"config.model.name = {options['name']!r} is for {own!r}, but config.data is for {task!r}: choose another"
                " network"
            )
        raise UserError(
            f"config.model.task = {own!r}, but config.data is for {task!r}: leave the key out"
        )
    words = getattr(source, "vocabulary", None)
    if words is not None and not _pretrained.reads(model, words):
        raise UserError(
            f"the tokenizer has {words:,} tokens, the model's embedding {model.row.vocabulary:,}: give the tokenizer that"
            f" the network was trained with, or set config.model.vocabulary={words}"
        )
