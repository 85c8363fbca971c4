"""What a training run is made of at one moment."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

OBJECTIVE = "objective"


class State(NamedTuple):
    """A training run's complete state but for its position in the data.

    Attributes:
      step: int32 [], updates done so far.
      params: float32 master weights, as `{module: {name: array}}`; under "objective" those that the loss learns
        beside the network, such as projections between a student's and a teacher's layers.
      stats: running statistics of the normalisations, in float32; may be empty.
      opt: the state of the optax chain.
      ema: `{"params", "stats"}` averaged over the steps, or None.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt: Any
    ema: Any = None

    def variables(self, *, averaged: bool = True) -> dict[str, Any]:
        """The network's variables to evaluate and export: the averaged ones where there are any."""
        source = self.ema if averaged and self.ema else self._asdict()
        return {"params": network(source["params"]), "batch_stats": source["stats"]}


def network(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without those of the objective."""
    return {name: value for name, value in params.items() if name != OBJECTIVE}


def create(
    model: nn.Module,
    tx: optax.GradientTransformation,
    example: Any,
    key: jax.Array,
    *,
    given: Mapping[str, Any] | None = None,
    objective: Callable[[jax.Array], Any] | None = None,
    ema: bool = False,
) -> State:
    """Initialises a state; pure, so that it can be jitted and `eval_shape`d.

    Args:
      model: maps what `example` is of to (logits, endpoints).
      tx: the optimizer's chain.
      example: pytree of `jax.ShapeDtypeStruct`s, what the network is called with.
      key: the seed of the initial weights.
      given: {"params", "batch_stats"}, either may be left out or have only some of the leaves: what to begin with
        instead.
      objective: key → parameters that the objective learns beside the network's; they go into `params["objective"]`.
      ema: whether to carry averaged weights.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example)
    variables = model.init(key, zeros)
    params = _merged(variables["params"], (given or {}).get("params", {}))
    stats = _merged(
        variables.get("batch_stats", {}), (given or {}).get("batch_stats", {})
    )
    more = objective(jax.random.fold_in(key, 1)) if objective else {}
    if more:
        params[OBJECTIVE] = more
    average = jax.tree.map(jnp.copy, {"params": params, "stats": stats})
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        opt=tx.init(params),
        ema=average if ema else None,
    )


def _merged(made: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is made, with the leaves that are given instead."""
    return {
        name: _merged(value, given.get(name, {}))
        if isinstance(value, Mapping)
        else given.get(name, value)
        for name, value in made.items()
    }
