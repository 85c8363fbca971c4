"""Builds networks by name, and changes the widths of single layers, absent blocks and the momentum of BatchNorm."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn.reshaped import reshaped
from squeeze_jax.ranges import Count, Rate


def make(
    name: str,
    *,
    widths: Mapping[str, Count] | None = None,
    absent: tuple[str, ...] = (),
    norm_momentum: Rate | None = None,
    **options,
) -> nn.Module:
    """Builds the network of `models/<name>.py`, `(x, train) → (logits, endpoints)`. Its file defines the input x.

    Args:
      name: the file's name.
      widths: output channels of single layers, such as {"bottleneck3/expand": 61}; layers have the names of their parameters.
      absent: residual blocks to omit, such as ("bottleneck4",).
      norm_momentum: share of the old running statistics that an update of a `BatchNorm` keeps, in [0, 1); None for the
        network's own. Short runs need a lower value.
      **options: options of the file's `make`.

    Raises:
      UserError: the network or an option is unknown, or a value is out of range. Unknown layers and blocks, and widths that do
        not fit each other, raise an error when the network is initialised.
    """
    own = {"widths": widths, "absent": absent, "norm_momentum": norm_momentum}
    check({"name": name, **own, **options})
    net = registry.load(__package__, name, "model").make(**options)
    if not isinstance(net, nn.Module):
        raise UserError(
            f"config.model.name = {name!r} makes a {type(net).__name__}: return a flax.linen.Module"
        )
    return reshaped(net, widths or {}, absent, norm_momentum)


def check(options: Mapping[str, Any], where: str = "config.model") -> None:
    """Checks the names and types of the options of `make`, before anything is built.

    Args:
      options: "name" and the other options.
      where: name of the options in error messages.

    Raises:
      UserError: the network or an option is unknown, an option is missing, or a value has another type.
    """
    registry.check(make, options, where)
    module = registry.load(__package__, options["name"], "model")
    shared = inspect.getfullargspec(make)
    shared = {*shared.args, *shared.kwonlyargs}
    own = {k: v for k, v in options.items() if k not in shared}
    registry.check(module.make, own, where)


def elastic(
    options: Mapping[str, Any], where: str = "config.model"
) -> dict[str, tuple[tuple[Any, ...], ...]]:
    """Returns the space of networks that a search can choose from: {option: for each position its values, ascending}.

    Args:
      options: options of `make`; the values of elastic options do not matter.
      where: name of the options in error messages.

    Raises:
      UserError: the network's file has no function `elastic`.
    """
    name = options["name"]
    module = registry.load(__package__, name, "model")
    if not hasattr(module, "elastic"):
        raise UserError(
            f"{where}.name = {name!r} has no elastic options: choose a network whose file has a function elastic, such as"
            " 'ofa_mobilenet_v3'"
        )
    return module.elastic(**{k: v for k, v in options.items() if k != "name"})
