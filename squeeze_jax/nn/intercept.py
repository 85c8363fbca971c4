"""Taps: places inside layers where code outside the model can read and replace arrays.

`Conv`, `Dense`, `LSTM` and attention pass their arrays through `tap`. The name of a tap is the layer's path and a role:

    <conv or dense>/inputs        the layer's input
    <conv or dense>/kernel        the layer's kernel, in the dtype of the computation
    <conv or dense>/outputs       the layer's output, bias included
    <lstm>/recurrent_kernel       the kernel that multiplies the hidden states; inputs, kernel and outputs as above
    <attention>/query, key, value, probabilities      the four factors of the two products of attention

So the tap of a kernel has the same name as the parameter. Outside an `intercepting` context a tap does nothing and takes no
time.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from squeeze_jax.methods import Tap

_local = threading.local()


@contextlib.contextmanager
def intercepting(replace: Callable[[Tap, Any], Any]) -> Iterator[None]:
    """Replaces the array at every tap by `replace(tap, array)`, in networks that are traced or run inside this context.

    Args:
      replace: (tap, array) → an array of the same shape.
    """
    outer_replace = getattr(_local, "replace", None)
    _local.replace = replace
    try:
        yield
    finally:
        _local.replace = outer_replace


def tap(module: nn.Module, role: str, x: Any) -> Any:
    """Returns `x`, or its replacement inside an `intercepting` context.

    Args:
      module: the layer that calls this function, bound.
      role: role of the array, see the table at the top.
      x: the array. Layers that keep their channel groups separate pass a tuple of arrays; each of them is replaced on its own.

    Raises:
      ValueError: The replacement has another shape.
    """
    replace = getattr(_local, "replace", None)
    if replace is None:
        return x
    if isinstance(x, tuple):
        return tuple(tap(module, role, group) for group in x)
    name = "/".join((*module.path, role))
    replacement = replace(Tap(name, tuple(x.shape), x.dtype), x)
    if replacement.shape != x.shape:
        raise ValueError(
            f"{name}: an interception returned shape {replacement.shape} for {x.shape}"
        )
    return replacement
