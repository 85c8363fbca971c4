"""The model zoo: one architecture a file, the file's name is the key."""

from collections.abc import Mapping

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models._folder import load, options, save
from squeeze_jax.nn.reshaped import reshaped

__all__ = ["load", "make", "options", "save"]


def make(
    name: str,
    *,
    widths: Mapping[str, int] | None = None,
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
    module = registry.load(__name__, name, "model")
    registry.check(module.make, options, "config.model")
    return reshaped(module.make(**options), widths or {}, absent)
