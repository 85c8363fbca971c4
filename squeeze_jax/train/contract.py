"""Checks, while a step is traced, that methods return what their plug points ask for; see `methods` for the contracts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError, shortened

RESERVED = ("loss", "grad_norm", "examples")  # metrics that the step itself records


def check_like(returned: Any, expected: Any, what: str) -> None:
    """Raises a UserError unless a pytree has the leaves of another one, with equal shapes and dtypes.

    Args:
      returned: what a method returned.
      expected: arrays or shapes.
      what: the beginning of the error, such as "the update my_clip returns updates".
    """
    leaves, wanted = _described(returned), _described(expected)
    for name, kind in wanted.items():
        if name not in leaves:
            raise UserError(f"{what} without {name}: return one array for each")
        if leaves[name] != kind:
            raise UserError(
                f"{what} in which {name} is {leaves[name]}, not {kind}: keep shapes and dtypes"
            )
    for name in leaves:
        if name not in wanted:
            raise UserError(f"{what} with {name}, which does not belong there")


def check_state(name: str, declared: bool, returned: bool) -> None:
    """Raises a UserError if a method declares state and returns none, or the reverse."""
    if declared and not returned:
        raise UserError(
            f"the method {name} declares state and does not return it: return the next state as the last value"
        )
    if returned and not declared:
        raise UserError(
            f"the method {name} returns state that it does not declare: set the field state of its value"
        )


def check_computed(name: str, returned: Any, params: Any, declared: bool) -> tuple:
    """Returns what a method of the plug point gradients computed, if it is (grads, stats, metrics) or these and its state.

    Raises:
      UserError: the method returned anything else, or metrics without "loss".
    """
    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        count = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise UserError(
            f"the method {name} returns a {type(returned).__name__}{count}: return (grads, stats, metrics), or (grads, stats,"
            " metrics, state)"
        )
    check_state(name, declared, len(returned) == 4)
    grads, stats, metrics, *_ = returned
    check_like(grads, params, f"the method {name} returns gradients")
    if not isinstance(stats, Mapping):
        raise UserError(
            f"the method {name} returns {type(stats).__name__} for statistics: return the dict that the forward pass returned"
        )
    check_metrics(f"the method {name}", metrics)
    if "loss" not in metrics:
        raise UserError(f"the method {name} returns metrics without 'loss'")
    return returned


def check_metrics(owner: str, metrics: Any) -> None:
    """Raises a UserError unless metrics are a dict of scalars; `owner` is the beginning of the error."""
    if not isinstance(metrics, Mapping) or any(jnp.shape(m) for m in metrics.values()):
        raise UserError(
            f"{owner} returns metrics that are no dict of scalars: {shortened(repr(metrics), 100)}"
        )


def add_metrics(metrics: Mapping[str, Any], new: Any, owner: str) -> dict[str, Any]:
    """Returns metrics with those of another owner.

    Args:
      metrics: {name: scalar}.
      new: {name: scalar} of the owner.
      owner: the beginning of an error, such as "the loss my_loss".

    Raises:
      UserError: the new metrics are no dict of scalars, or one has the name of a metric that the step records.
    """
    check_metrics(owner, new)
    for name in new:
        if name in RESERVED or name in metrics:
            raise UserError(
                f"{owner} returns a metric {name!r}, which the training step records already: give it another name"
            )
    return {**metrics, **new}


def _described(tree: Any) -> dict[str, str]:
    """Returns {path: dtype and shape} of a pytree's leaves."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)  # fmt: skip
        described[name] = f"{jnp.result_type(leaf)} {list(jnp.shape(leaf))}"
    return described
