"""Class names: those of a trained network are matched with those of the data, so that each output keeps its meaning."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError, shortened

SHOWN = 200  # characters of a list of names in an error


class OtherClasses(UserError):
    """The data have other classes than a trained network."""


def order(
    theirs: Sequence[str] | None, ours: Sequence[str], where: str, remedy: str
) -> tuple[int, ...] | None:
    """Returns the place of each of the data's classes in a trained network's; None where places are the same or unknown.

    Names are compared without regard to upper and lower case.

    Args:
      theirs: names of a network's classes; None where it names none.
      ours: those of the data.
      where: the network in an error.
      remedy: ends the error.

    Raises:
      OtherClasses: the names differ.
    """
    if not theirs or not ours:
        return None
    a, b = ([name.strip().casefold() for name in names] for names in (theirs, ours))
    if a == b:
        return None
    if sorted(a) != sorted(b) or len(set(a)) < len(a):
        raise OtherClasses(
            f"{where} was trained on the classes {_shown(theirs)}, config.data has {_shown(ours)}: {remedy}"
        )
    return tuple(a.index(name) for name in b)


def check_same(theirs: Sequence[str] | None, ours: Sequence[str], workdir: str) -> None:
    """Raises `OtherClasses` for data whose classes are not those that a work directory's network was trained on."""
    remedy = (
        "restore their names and their order, or train in another --workdir, which can begin with this network:"
        f' --config.init=\'{{"workdir": "{workdir}"}}\''
    )
    if order(theirs, ours, workdir, remedy) is not None:
        raise OtherClasses(
            f"{workdir} was trained on the classes {_shown(theirs)}, config.data has them in the order {_shown(ours)}:"
            f" {remedy}"
        )


def reordered(
    params: Mapping[str, Any], options: Mapping[str, Any], example: Any, places
) -> dict[str, Any]:
    """Returns a network's parameters with its classes at other places.

    Args:
      params: of the network.
      options: of `models.make`, with num_classes.
      example: shapes of the network's inputs.
      places: see `order`.
    """
    more = {**options, "num_classes": options["num_classes"] + 1}
    shapes, other = (
        tree.flatten(_shapes(models.make(**each), example)) for each in (options, more)
    )
    places = np.asarray(places)

    def place(name, array):
        changes = name in shapes and shapes[name].shape != other[name].shape
        return np.asarray(array)[..., places] if changes else array

    return tree.map_named(place, params)


class Placed(nn.Module):
    """A network whose classes are at other places, under the same names of parameters.

    Attributes:
      net: returns (logits [..., classes], endpoints).
      places: see `order`.
    """

    net: nn.Module
    places: tuple[int, ...]

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, *inputs, **options):
        logits, endpoints = self.net(*inputs, **options)
        return logits[..., np.asarray(self.places)], endpoints


def _shapes(net, example):
    keys = dict.fromkeys(("params", "dropout", "sample"), jax.random.key(0))
    return jax.eval_shape(lambda x: net.init(keys, x, train=False), example)["params"]


def _shown(names: Sequence[str]) -> str:
    return shortened(f"({', '.join(names)})", SHOWN)
