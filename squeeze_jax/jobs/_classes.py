"""Matches a trained network's classes with the data's by name, so that each output keeps its meaning."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from squeeze_jax import models, tree
from squeeze_jax.data import Data
from squeeze_jax.data.source import class_name
from squeeze_jax.errors import UserError, shortened

MULTI_LABEL = "multi_label_classification"
MAX_CHARACTERS = 200  # of a list of class names in an error


class OtherClasses(UserError):
    """The data have other classes than a trained network."""


class OtherTokens(OtherClasses):
    """The data have other tokens than a trained network, or other ids of them."""


def token_digest(source: Any) -> str | None:
    """Returns the digest of the tokens of data and of their ids; None for data without tokens."""
    tokens = getattr(source, "tokenizer", None) or getattr(source, "words", None)
    return tokens.digest() if hasattr(tokens, "digest") else None


def check_same_tokens(theirs: str | None, source: Any, where: str, remedy: str) -> None:
    """Raises `OtherTokens` if a network was trained with other tokens than the data's, or with other ids of them.

    Args:
      theirs: the digest of the network's tokens; None if it is unknown.
      source: the data.
      where: the network's location, for the error message.
      remedy: the end of the error message: what else the user can do.
    """
    ours = token_digest(source) if theirs else None
    if ours is None or ours == theirs:
        return
    key = "tokenizer" if hasattr(source, "tokenizer") else "train"
    raise OtherTokens(
        f"{where} was trained with a vocabulary in which tokens have other ids than in config.data.{key}: restore the file of that"
        f" training, or {remedy}"
    )


def output_names(names: Sequence[str], outputs: int | None) -> tuple[str, ...]:
    """Returns a name for each output of a network; an output that stands for no class is called "class 7", for example.

    Args:
      names: names of the data's classes; without any, the result is empty.
      outputs: number of the network's outputs; None for as many as there are names.
    """
    if not names:
        return ()
    count = max(len(names), outputs or 0)
    return tuple(class_name(names, n) for n in range(count))


def problem_type(source: Data) -> str:
    """Returns how the outputs of a classifier are read for these data, as `problem_type` in transformers' config.json.

    "multi_label_classification" means a sigmoid for each class, "single_label_classification" a softmax over the classes, and
    "regression" the outputs as they are.
    """
    if source.metrics == "labels":
        return MULTI_LABEL
    if source.metrics == "regression" or source.model.get("num_classes") == 1:
        return "regression"
    return "single_label_classification"


def other_problem_line(location: str, theirs: str, source: Data) -> str:
    """Returns the line about a trained classifier whose outputs mean something else than the data's; "" if they do not.

    Args:
      location: where the classifier is.
      theirs: its `problem_type`; "" if it is unknown.
      source: the data.
    """
    ours = problem_type(source)
    if theirs in ("", ours):
        return ""
    return (
        f"classes    {location} was trained with problem_type = {theirs!r}, and config.data is for {ours!r}: the outputs of its"
        " classifier have another meaning"
    )


def unnamed_classes_line(location: str) -> str:
    """Returns the line about a trained classifier whose classes have no names, so that their order cannot be compared."""
    return f"classes    {location} does not name its classes: its classifier is taken to be in the order of the data's"


def class_positions(
    theirs: Sequence[str] | None,
    ours: Sequence[str],
    where: str,
    remedy: str,
    outputs: int = 0,
) -> tuple[int, ...] | None:
    """Returns the position of each of the data's classes among a trained network's classes.

    Names are compared exactly. If they differ, they are compared without regard to upper and lower case.

    Args:
      theirs: names of the network's classes; None if they are unknown.
      ours: names of the data's classes.
      where: the network's location, for the error message.
      remedy: the end of the error message: what the user can do.
      outputs: the number of the network's outputs; those that have no name keep their positions.

    Returns:
      None if both have the same order, or if one of them does not name its classes.

    Raises:
      OtherClasses: the names differ.
    """
    a, b = list(theirs or ()), list(ours)
    if not a or not b or a == b:
        return None
    if sorted(a) != sorted(b):
        a, b = ([name.strip().casefold() for name in names] for names in (a, b))
    if sorted(a) != sorted(b) or len(set(a)) < len(a):
        raise OtherClasses(
            f"{where} was trained on the classes {_listed(theirs)}, config.data has {_listed(ours)}: {remedy}"
        )
    if a == b:
        return None
    return (*(a.index(name) for name in b), *range(len(a), outputs))


def check_same_classes(
    theirs: Sequence[str] | None,
    ours: Sequence[str],
    where: str,
    of_phase: bool = False,
) -> None:
    """Raises `OtherClasses` if a network was trained on other classes than the data's, or in another order.

    Args:
      theirs: names of the network's classes; None if they are unknown.
      ours: names of the data's classes.
      where: the network's work directory, or the label of an earlier phase, for the error message.
      of_phase: whether it is an earlier phase of the same run.
    """
    remedy = "restore their names and their order, or train in another --workdir"
    if of_phase:
        remedy += " that begins with this network"
    else:
        remedy += f', which can begin with this network: --config.init=\'{{"workdir": "{where}"}}\''
    if class_positions(theirs, ours, where, remedy) is not None:
        raise OtherClasses(
            f"{where} was trained on the classes {_listed(theirs)}, config.data has them in the order {_listed(ours)}:"
            f" {remedy}"
        )


def class_arrays(options: Mapping[str, Any], example: Any) -> list[str]:
    """Returns the names of a network's parameters that depend on the classes: their shapes change with `num_classes`.

    Args:
      options: the arguments of `models.make` that build it; without num_classes no parameter depends on the classes.
      example: shapes of the network's inputs.
    """
    if "num_classes" not in options:
        return []
    larger_options = {**options, "num_classes": options["num_classes"] + 1}
    shapes, larger_shapes = (
        tree.flatten(_parameter_shapes(models.make(**network_options), example))
        for network_options in (options, larger_options)
    )
    return [n for n in shapes if shapes[n].shape != larger_shapes[n].shape]


def reorder_classifier(
    params: Mapping[str, Any], options: Mapping[str, Any], example: Any, positions
) -> dict[str, Any]:
    """Returns a network's parameters with the classes of its head in another order.

    The last axis of `class_arrays` is reordered.

    Args:
      params: the network's parameters.
      options: the arguments of `models.make` that build it, with num_classes.
      example: shapes of the network's inputs.
      positions: one for each output, see `class_positions`.
    """
    of_classes, positions = class_arrays(options, example), np.asarray(positions)

    def reorder(name, array):
        return np.asarray(array)[..., positions] if name in of_classes else array

    return tree.map_named(reorder, params)


class ReorderedClasses(nn.Module):
    """A network whose logits are put into another order of the classes; its parameters keep their names.

    Attributes:
      net: returns (logits [..., classes], endpoints).
      positions: see `class_positions`.
    """

    net: nn.Module
    positions: tuple[int, ...]

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, *inputs, **options):
        logits, endpoints = self.net(*inputs, **options)
        return logits[..., np.asarray(self.positions)], endpoints


def _parameter_shapes(net, example):
    keys = dict.fromkeys(("params", "dropout", "sample"), jax.random.key(0))
    return jax.eval_shape(lambda x: net.init(keys, x, train=False), example)["params"]


def _listed(names: Sequence[str]) -> str:
    return shortened(f"({', '.join(names)})", MAX_CHARACTERS)
