"""Networks by name: options, widths of single layers, and blocks that are left out."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn.reshaped import reshaped
from squeeze_jax.ranges import Count


def make(
    name: str,
    *,
    widths: Mapping[str, Count] | None = None,
    absent: tuple[str, ...] = (),
    **options,
) -> nn.Module:
    """Builds the network of `models/<name>.py`, `(x, train) → (logits, endpoints)`; its file says what x is.

    Args:
      name: the file's name.
      widths: output channels of single layers, such as {"bottleneck3/expand": 61}; a layer is called as its parameters.
      absent: residual blocks that are left out, such as ("bottleneck4",).
      **options: of the file's `make`.

    Raises:
      UserError: an unknown network or option, or a value that does not fit. Unknown layers and blocks, and widths that do
        not fit each other, are errors of the network's initialization.
    """
    check({"name": name, "widths": widths, "absent": absent, **options})
    net = registry.load(__package__, name, "model").make(**options)
    if not isinstance(net, nn.Module):
        raise UserError(
            f"config.model.name = {name!r} makes a {type(net).__name__}: return a flax.linen.Module"
        )
    return reshaped(net, widths or {}, absent)


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
    own = {k: v for k, v in options.items() if k not in ("name", "widths", "absent")}
    registry.check(module.make, own, where)
