"""Networks by name: options, widths of single layers, blocks that are left out, and the momentum of BatchNorm."""

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
    """Builds the network of `models/<name>.py`, `(x, train) → (logits, endpoints)`; its file says what x is.

    Args:
      name: the file's name.
      widths: output channels of single layers, such as {"bottleneck3/expand": 61}; a layer is called as its parameters.
      absent: residual blocks that are left out, such as ("bottleneck4",).
      norm_momentum: share of the old running statistics that an update of a `BatchNorm` keeps, in [0, 1), instead of the
        network's own; lower for short runs.
      **options: of the file's `make`.

    Raises:
      UserError: an unknown network or option, or a value that does not fit. Unknown layers and blocks, and widths that do
        not fit each other, are errors of the network's initialization.
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
      options: "name", and others.
      where: how an error calls them.

    Raises:
      UserError: an unknown network, an unknown or missing option, or a value of another type.
    """
    registry.check(make, options, where)
    module = registry.load(__package__, options["name"], "model")
    shared = inspect.getfullargspec(make)
    shared = {*shared.args, *shared.kwonlyargs}
    own = {k: v for k, v in options.items() if k not in shared}
    registry.check(module.make, own, where)
