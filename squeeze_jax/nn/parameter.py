"""Returns a module's parameters without tracing their initializers in each forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: Sequence[int],
    *dtype: Any,
) -> jax.Array:
    """Returns `module.param(name, init, shape, *dtype)`.

    `Module.param` traces the initializer in each forward pass, to compare shapes. This function compares the shape that it is
    given, so the initializer runs only for a new parameter.

    Raises:
      flax.errors.ScopeParamShapeError: the module's variables have another shape.
    """
    if not module.is_initializing() and module.has_variable("params", name):
        value = module.get_variable("params", name)
        if getattr(value, "shape", None) == tuple(shape):
            return value
    return module.param(name, init, shape, *dtype)
