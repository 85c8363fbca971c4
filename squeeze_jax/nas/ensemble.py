"""Trains several small networks on the same examples in one compiled program, from different random keys."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from squeeze_jax.errors import UserError


def train(
    key: jax.Array,
    init: Callable[[jax.Array], Any],
    loss: Callable[[Any, Any, jax.Array], jax.Array],
    examples: Any,
    optimizer: optax.GradientTransformation,
    *,
    members: int,
    steps: int,
    batch: int,
) -> Any:
    """Returns trained parameters with a leading axis [members].

    Each member has initial weights, an order of the examples and dropout of its own. The order is a sequence of random
    permutations of all examples. `jax.jit` and `jax.vmap` apply to the function.

    Args:
      key: random key; the same key gives the same result.
      init: key → parameters.
      loss: (parameters, examples of a batch, key) → scalar.
      examples: arrays with the same leading axis [n].
      optimizer: the optimizer, which may have a schedule over `steps`.
      members: number of networks.
      steps: training steps.
      batch: examples in each step; all of them in each step if there are fewer.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    batch = min(batch, count)
    epochs = -(-steps * batch // count)

    def member(key):
        init_key, order_key, loss_key = jax.random.split(key, 3)
        orders = jax.vmap(lambda k: jax.random.permutation(k, count))(
            jax.random.split(order_key, epochs)
        )
        rows = orders.reshape(-1)[: steps * batch].reshape(steps, batch)

        def step(carry, row_and_key):
            params, state = carry
            rows, key = row_and_key
            part = jax.tree.map(lambda a: a[rows], examples)
            grads = jax.grad(loss)(params, part, key)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = init(init_key)
        carry = params, optimizer.init(params)
        keys = jax.random.split(loss_key, steps)
        (params, _), _ = jax.lax.scan(step, carry, (rows, keys))
        return params

    return jax.vmap(member)(jax.random.split(key, members))


def standardize(scores: jax.Array, weights: jax.Array) -> tuple:
    """Returns (standardized scores [n], their mean [], their standard deviation []) over examples with weights [n].

    The standard deviation is 1 if all scores are equal.
    """
    total = jnp.sum(weights)
    mean = jnp.sum(weights * scores) / total
    scale = jnp.sqrt(jnp.sum(weights * (scores - mean) ** 2) / total)
    scale = jnp.where(scale > 0, scale, 1.0)
    return (scores - mean) / scale, mean, scale


def check_scores(scores: Any, count: int, place: str) -> jax.Array:
    """Returns scores as float32 [n].

    Args:
      scores: the scores.
      count: number of architectures.
      place: the function's name in errors.

    Raises:
      UserError: their shape is not [count], there are fewer than two, or one of them is not finite.
    """
    shape = np.shape(scores)
    if shape != (count,):
        raise UserError(
            f"{place}: scores have the shape {list(shape)}, but there are {count} architectures: give one score for each"
        )
    if count < 2:
        raise UserError(f"{place}: {count} architectures: give at least two")
    if not isinstance(scores, jax.core.Tracer):
        wrong = np.flatnonzero(~np.isfinite(np.asarray(scores)))
        if len(wrong):
            raise UserError(
                f"{place}: scores[{wrong[0]}] = {np.asarray(scores)[wrong[0]]}: leave out architectures without a score"
            )
    return jnp.asarray(scores, jnp.float32)
