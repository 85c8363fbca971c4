"""Magnitude pruning with a polynomial schedule; a method of the plug point `update`.

Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878. The smallest weights become zero and stay zero. At the steps
t = begin, begin + every, ..., end, the sparsity follows equation 1:

    s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3

The transform follows the optimizer in `config.update`. It ranks the weights as they are after the update. It replaces the
update of a pruned weight w by -w, so that the weight is exactly 0 whatever momentum the optimizer has.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count, Rate, Whole
from squeeze_jax.registry import checked


class MagnitudeState(NamedTuple):
    """The state of the transform.

    Attributes:
      masks: {name of a parameter: bool array of its shape}, False for pruned weights.
    """

    masks: dict[str, jax.Array]


@checked
def make(
    sparsity: Rate,
    begin: Whole,
    end: Count,
    every: Count,
    initial: Rate = 0.0,
    rules: tuple[tuple[str, bool], ...] = (("kernel$", True),),
    scope: Literal["global", "layer"] = "global",
) -> methods.Update:
    """Returns the transform; list it after "optim" in `config.update`.

    A pruned weight is never restored. Weights of equal magnitude are pruned in the order of their positions.

    Args:
      sparsity: final sparsity s_f, the share of weights that are zero from step `end` on; in [0, 1).
      begin: first step that prunes; steps count from 0 at the begin of the phase.
      end: last step that prunes further weights.
      every: number of steps from one pruning to the next; divides end - begin.
      initial: initial sparsity s_i, at step `begin`; in [0, sparsity].
      rules: ordered pairs (regex, bool) for parameter names. The first match decides whether a parameter is pruned. A
        parameter without a match is not pruned.
      scope: "global" ranks the weights of all pruned parameters together, so layers get different sparsities; "layer" gives
        each parameter the same sparsity.

    Raises:
      UserError: A value is out of range. When the transform gets the parameters: a rule matches no parameter, or none is
        pruned.
    """
    _check(sparsity, begin, end, every, initial, rules)
    sparsities = schedule(sparsity, begin, end, every, initial)

    def init(params):
        names = pruned_names(params, rules)
        weights = tree.flatten(params)
        return MagnitudeState(
            {name: jnp.ones(weights[name].shape, bool) for name in names}
        )

    def update(updates, state, params=None, *, step, grads=None, **extra):
        del extra
        if updates is grads:
            raise UserError(
                'config.update lists prune.magnitude before the optimizer: list it after "optim"'
            )
        weights, changes = tree.flatten(params), tree.flatten(updates)
        masks = jax.lax.cond(
            (step >= begin) & (step <= end) & ((step - begin) % every == 0),
            lambda masks: _prune_masks(
                masks,
                {name: weights[name] + changes[name] for name in masks},
                sparsities,
                (step - begin) // every,
                scope,
            ),
            lambda masks: masks,
            state.masks,
        )

        def mask_update(name, change, weight):
            if name not in masks:
                return change
            return jnp.where(masks[name], change, -weight)

        updates = tree.map_named(mask_update, updates, params)
        return updates, MagnitudeState(masks)

    def project(params, state):
        def mask_weight(name, weight):
            if name not in state.masks:
                return weight
            return jnp.where(state.masks[name], weight, jnp.zeros_like(weight))

        return tree.map_named(mask_weight, params)

    def metrics(params, state):
        pruned_counts = [jnp.sum(~mask) for mask in state.masks.values()]
        count = sum(mask.size for mask in state.masks.values())
        return {"sparsity": jnp.float32(sum(pruned_counts)) / count}

    tx = optax.GradientTransformationExtraArgs(init, update)
    return methods.Update(tx, project, metrics, until=end)


def schedule(
    sparsity: float, begin: int, end: int, every: int, initial: float = 0.0
) -> np.ndarray:
    """Returns the sparsity at each pruning by equation 1, float64 [prunings]; for the arguments see `make`."""
    steps = np.arange(begin, end + 1, every)
    return sparsity + (initial - sparsity) * (1 - (steps - begin) / (end - begin)) ** 3


def sparsity(params: Mapping[str, Any]) -> dict[str, float]:
    """Returns the share of zeros in each of the network's parameters, {name: share}; parameters of methods are left out."""
    network = {k: v for k, v in params.items() if k != methods.METHODS}
    return {
        name: float(jnp.mean(value == 0))
        for name, value in tree.flatten(network).items()
    }


def pruned_names(params: Mapping[str, Any], rules: tree.Rules) -> list[str]:
    """Returns the names of the network's parameters that the rules prune.

    Raises:
      UserError: A rule matches no parameter, or the rules prune none.
    """
    network = {k: v for k, v in params.items() if k != methods.METHODS}
    chosen = tree.apply_rules(rules, network, default=False, where="magnitude.rules")
    names = [name for name, prune in tree.flatten(chosen).items() if prune]
    if not names:
        raise UserError(
            f"magnitude.rules = {rules!r} prunes no parameter: give one rule the value True"
        )
    return names


def _prune_masks(masks, weights, sparsities, number, scope):
    """Returns masks with the sparsity of pruning `number` in the schedule."""
    names = list(masks)
    # The parameters of one set are ranked together.
    name_sets = [names] if scope == "global" else [[name] for name in names]
    result = {}
    for name_set in name_sets:
        size = sum(masks[name].size for name in name_set)
        # Counted on the host in float64, because float32 cannot count more than 2^24 weights.
        counts = [round(sparsity * size) for sparsity in sparsities.tolist()]
        pruned = sum(jnp.sum(~masks[name], dtype=jnp.int32) for name in name_set)
        count = jnp.maximum(jnp.asarray(counts, jnp.int32)[number], pruned)
        keys = [_sort_key(weights[name], masks[name]) for name in name_set]
        new_masks = (~small for small in smallest(keys, count))
        result |= dict(zip(name_set, new_masks, strict=True))
    return {name: result[name] for name in names}


def _sort_key(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns uint32 integers that order weights by magnitude; 0 for weights that are already pruned."""
    magnitude = jnp.abs(weight.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    return jnp.where(mask, bits + 1, 0)


def smallest(keys: Sequence[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Marks the `count` smallest values of several arrays; among equal values, the first ones.

    The function finds the largest marked value bit by bit, from the highest bit to the lowest. Each bit needs one count over
    all arrays. So values are only counted; they are not sorted, concatenated or moved between devices.

    Args:
      keys: uint32 arrays.
      count: number of values to mark, int32 []; at most the number of all values.

    Returns:
      A bool array for each array of `keys`, True for marked values.
    """

    def count_below(limit):
        return sum(jnp.sum(key < limit, dtype=jnp.int32) for key in keys)

    def set_bit(number, limit):
        higher = limit | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        return jnp.where(count_below(higher) < count, higher, limit)

    limit = jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))
    equal_count = count - count_below(limit)  # values equal to the limit to mark
    marks = []
    for key in keys:
        equal = key == limit
        rank = jnp.cumsum(equal.reshape(-1), dtype=jnp.int32).reshape(key.shape)
        marks.append((key < limit) | (equal & (rank <= equal_count)))
        equal_count = equal_count - jnp.sum(equal, dtype=jnp.int32)
    return marks


def _check(sparsity, begin, end, every, initial, rules):
    """Raises a UserError for values out of range."""
    if not 0 <= sparsity < 1:
        raise UserError(f"magnitude.sparsity = {sparsity} should lie in [0, 1)")
    if not 0 <= initial <= sparsity:
        raise UserError(
            f"magnitude.initial = {initial} should lie in [0, {sparsity}], up to the final sparsity"
        )
    if begin < 0:
        raise UserError(f"magnitude.begin = {begin} should not be negative")
    if end <= begin:
        raise UserError(f"magnitude.end = {end} should be larger than begin = {begin}")
    if every < 1 or (end - begin) % every:
        raise UserError(
            f"magnitude.every = {every} should divide end - begin = {end - begin}, so that the last pruning is at the end"
        )
    for rule in rules:
        if len(rule) == 2 and not isinstance(rule[1], bool):
            raise UserError(
                f"magnitude.rules: the value of {rule[0]!r} should be True or False, not {rule[1]!r}"
            )
