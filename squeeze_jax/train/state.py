"""What a training run is made of at one moment."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class State(NamedTuple):
    """A training run's complete state but for its position in the data.

    Attributes:
      step: int32 [], updates done so far.
      params: float32 master weights, as `{module: {name: array}}`.
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
        """The variables to evaluate and export: the averaged ones where there are any."""
        source = self.ema if averaged and self.ema else self._asdict()
        return {"params": source["params"], "batch_stats": source["stats"]}


def create(
    model: nn.Module,
    tx: optax.GradientTransformation,
    shape: tuple[int, int, int],
    key: jax.Array,
    *,
    ema: bool = False,
) -> State:
    """Initialises a state; pure, so that it can be jitted and `eval_shape`d.

    Args:
      model: maps images [b, h, w, c] to (logits, endpoints).
      tx: the optimizer's chain.
      shape: (h, w, c) of one image.
      key: the seed of the initial weights.
      ema: whether to carry averaged weights.
    """
    variables = model.init(key, jnp.zeros((1, *shape), jnp.float32))
    params, stats = variables["params"], variables.get("batch_stats", {})
    average = jax.tree.map(jnp.copy, {"params": params, "stats": stats})
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        opt=tx.init(params),
        ema=average if ema else None,
    )
