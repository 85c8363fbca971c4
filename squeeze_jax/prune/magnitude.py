"""Magnitude pruning with a polynomial schedule, a method of the plug point `update`.

Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878. The smallest weights become zero and stay zero. The
sparsity follows equation 1 at the steps t = begin, begin + every, ..., end:

    s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3

The transform stands after the optimizer. It ranks the weights as they are after the update, and replaces the update of
a pruned weight w by -w, so that the weight is exactly 0 whatever the optimizer's momentum says.
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


class MagnitudeState(NamedTuple):
    """Masks of the parameters that are pruned.

    Attributes:
      masks: {parameter name: bool, of the parameter's shape}; False for a pruned weight.
    """

    masks: dict[str, jax.Array]


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
      sparsity: share of the weights that are zero from step `end` on (s_f), in [0, 1).
      begin: first step of the phase, from 0, whose update prunes.
      end: last step whose update prunes more weights.
      every: steps between two prunings; divides end - begin.
      initial: sparsity at step `begin` (s_i), in [0, sparsity].
      rules: ordered (regex, bool) over parameter names; the first match decides whether a parameter is pruned, and a
        parameter without a match is not.
      scope: "global" compares the weights of all pruned parameters, so layers differ in sparsity; "layer" gives each
        parameter the same sparsity.

    Raises:
      UserError: values out of range; when it receives parameters, a rule that matches none.
    """
    _check(sparsity, begin, end, every, initial, rules)
    shares = schedule(sparsity, begin, end, every, initial)

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
            lambda masks: _pruned(
                masks,
                {name: weights[name] + changes[name] for name in masks},
                shares,
                (step - begin) // every,
                scope,
            ),
            lambda masks: masks,
            state.masks,
        )

        def masked(name, change, weight):
            if name not in masks:
                return change
            return jnp.where(masks[name], change, -weight)

        updates = tree.map_named(masked, updates, params)
        return updates, MagnitudeState(masks)

    def project(params, state):
        def masked(name, weight):
            if name not in state.masks:
                return weight
            return jnp.where(state.masks[name], weight, jnp.zeros_like(weight))

        return tree.map_named(masked, params)

    def metrics(params, state):
        zeros = [jnp.sum(~mask) for mask in state.masks.values()]
        count = sum(mask.size for mask in state.masks.values())
        return {"sparsity": jnp.float32(sum(zeros)) / count}

    tx = optax.GradientTransformationExtraArgs(init, update)
    return methods.Update(tx, project, metrics, until=end)


def schedule(
    sparsity: float, begin: int, end: int, every: int, initial: float = 0.0
) -> np.ndarray:
    """Returns the sparsity at each pruning, float64 [prunings]; equation 1. Arguments as in `make`."""
    steps = np.arange(begin, end + 1, every)
    return sparsity + (initial - sparsity) * (1 - (steps - begin) / (end - begin)) ** 3


def sparsity(params: Mapping[str, Any]) -> dict[str, float]:
    """Returns the share of each parameter's values that are zero, by name; parameters of methods are left out."""
    network = {k: v for k, v in params.items() if k != methods.METHODS}
    return {
        name: float(jnp.mean(value == 0))
        for name, value in tree.flatten(network).items()
    }


def pruned_names(params: Mapping[str, Any], rules: tree.Rules) -> list[str]:
    """Returns the names of the network's parameters that the rules prune.

    Raises:
      UserError: a rule matches no parameter, or the rules prune none.
    """
    network = {k: v for k, v in params.items() if k != methods.METHODS}
    chosen = tree.apply_rules(rules, network, default=False, where="magnitude.rules")
    names = [name for name, prune in tree.flatten(chosen).items() if prune]
    if not names:
        raise UserError(
            f"magnitude.rules = {rules!r} prunes no parameter: give one rule the value True"
        )
    return names


def _pruned(masks, weights, shares, number, scope):
    """Returns masks with the sparsity that the schedule has at this pruning."""
    names = list(masks)
    parts = [names] if scope == "global" else [[name] for name in names]
    result = {}
    for part in parts:
        size = sum(masks[name].size for name in part)
        # On the host in float64: float32 cannot count more than 2^24 weights.
        counts = [round(share * size) for share in shares.tolist()]
        already = sum(jnp.sum(~masks[name], dtype=jnp.int32) for name in part)
        count = jnp.maximum(jnp.asarray(counts, jnp.int32)[number], already)
        keys = [_key(weights[name], masks[name]) for name in part]
        kept = (~small for small in smallest(keys, count))
        result |= dict(zip(part, kept, strict=True))
    return {name: result[name] for name in names}


def _key(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns integers that order weights by magnitude, uint32; 0 for weights that are pruned already."""
    magnitude = jnp.abs(weight.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    return jnp.where(mask, bits + 1, 0)


def smallest(keys: Sequence[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Marks the `count` smallest values of several arrays; among equal ones those that come first.

    The value at rank `count` is built bit by bit from the highest: each bit needs one count over all arrays. So
    nothing is sorted, concatenated or moved between devices, only counted.

    Args:
      keys: uint32 arrays.
      count: int32 [], at most the number of values.

    Returns:
      A bool array for each of `keys`.
    """

    def below(limit):
        return sum(jnp.sum(key < limit, dtype=jnp.int32) for key in keys)

    def bit(number, limit):
        higher = limit | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        return jnp.where(below(higher) < count, higher, limit)

    limit = jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))
    left = count - below(limit)  # how many of the values that equal the limit
    marks = []
    for key in keys:
        equal = key == limit
        position = jnp.cumsum(equal.reshape(-1), dtype=jnp.int32).reshape(key.shape)
        marks.append((key < limit) | (equal & (position <= left)))
        left = left - jnp.sum(equal, dtype=jnp.int32)
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
