"""Taps: the places inside layers where arrays can be replaced from outside the model.

`Conv`, `Dense`, `LSTM` and attention pass their arrays through `tap`. Each tap has a name, the layer's path and a role:

    <conv or dense>/inputs        what the layer reads
    <conv or dense>/kernel        its kernel, in the dtype of the computation
    <conv or dense>/outputs       what it returns, bias included
    <lstm>/recurrent_kernel       its kernel of hidden states; inputs, kernel and outputs as above
    <attention>/query, key, value, probabilities      the four factors of attention's two products

so the tap of a kernel is called as the parameter is. Outside of `intercepting` a tap costs nothing and changes nothing.
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
    """Passes every tap's array through `replace` within this context, while a network is traced or run.

    Args:
      replace: (tap, array) → an array of the same shape.
    """
    before = getattr(_local, "replace", None)
    _local.replace = replace
    try:
        yield
    finally:
        _local.replace = before


def tap(module: nn.Module, role: str, x: Any) -> Any:
    """Returns `x`, or what the enclosing `intercepting` makes of it.

    Args:
      module: the layer that calls it, bound.
      role: see above.
      x: the array; layers whose groups stay apart give a tuple of arrays, each of which is a tap of its own.

    Raises:
      ValueError: the replacement has another shape.
    """
    replace = getattr(_local, "replace", None)
    if replace is None:
        return x
    if isinstance(x, tuple):
        return tuple(tap(module, role, part) for part in x)
    name = "/".join((*module.path, role))
    changed = replace(Tap(name, tuple(x.shape), x.dtype), x)
    if changed.shape != x.shape:
        raise ValueError(
            f"{name}: an interception returned shape {changed.shape} for {x.shape}"
        )
    return changed
