"""Magnitude pruning: the smallest weights become zero, more of them as training goes on.

Zhu and Gupta 2017, arXiv 1710.01878, equation 1: from step t0 on, every dt steps until t0 + n dt, the share of zeros is

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3

so that many weights go early, while the network can still make up for them. Plug point update: the masks are the state
of a gradient transform. Masked weights are exactly zero after each update, in averaged weights and in exported files.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Update

RULES = (("kernel$", True),)


class MagnitudeState(NamedTuple):
    """Which weights are kept: {parameter's name: bool array of its shape}; parameters without a mask are not pruned."""

    masks: dict[str, jax.Array]


def make(
    sparsity: float,
    begin: int,
    end: int,
    every: int = 10,
    initial: float = 0.0,
    scope: Literal["global", "layer"] = "global",
    rules: tuple = RULES,
) -> Update:
    """Returns the gradient transform; it stands after the optimizer in `config.update`.

    Args:
      sparsity: final share of zeros among the pruned parameters, s_f, in [0, 1).
      begin: the first step that prunes, t0; steps count from the begin of the phase.
      end: the step of the final sparsity, t0 + n dt.
      every: steps between two changes of the masks, dt.
      initial: sparsity at `begin`, s_i.
      scope: "global" compares the weights of all layers, "layer" prunes the same share of each.
      rules: (regex, whether to prune) over parameter names, first match wins, no match means no.

    Raises:
      UserError: values out of range; when it gets the parameters, a rule that matches none, or nothing to prune.
    """
    _check(sparsity, initial, begin, end, every)

    def init(params):
        return MagnitudeState(
            {k: jnp.ones(w.shape, bool) for k, w in pruned(params, rules).items()}
        )

    def update(updates, state, params=None, *, step, **extra):
        del extra
        after = pruned(jax.tree.map(jnp.add, params, updates), rules)
        share = _scheduled(step, sparsity, initial, begin, end)
        due = (step >= begin) & (step <= end)
        due &= ((step - begin) % every == 0) | (step == end)
        masks = jax.lax.cond(
            due, lambda: _smallest_out(after, share, scope), lambda: state.masks
        )

        def masked(name, change, weight):
            # weight + (-weight) is zero exactly, whatever the optimizer wanted.
            keep = masks.get(name)
            return change if keep is None else jnp.where(keep, change, -weight)

        return tree.map_named(masked, updates, params), MagnitudeState(masks)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return Update(tx, lambda params, state: apply(params, state.masks))


def _check(sparsity, initial, begin, end, every) -> None:
    for name, value in ("sparsity", sparsity), ("initial", initial):
        if not 0 <= value < 1:
            raise UserError(f"prune.magnitude: {name} = {value} should lie in [0, 1)")
    if initial > sparsity:
        raise UserError(
            f"prune.magnitude: initial = {initial} should not be above sparsity = {sparsity}"
        )
    if not 0 <= begin < end:
        raise UserError(
            f"prune.magnitude: begin = {begin} and end = {end} should satisfy 0 <= begin < end"
        )
    if every < 1:
        raise UserError(f"prune.magnitude: every = {every} should be at least 1")


def pruned(params: Mapping[str, Any], rules=RULES) -> dict[str, jax.Array]:
    """The network's parameters that the rules prune, by name.

    Raises:
      UserError: a rule that matches no parameter, or rules that prune none.
    """
    network = {k: v for k, v in params.items() if k != METHODS}
    where = "prune.magnitude: rules"
    chosen = tree.flatten(tree.apply_rules(rules, network, default=False, where=where))
    found = {k: w for k, w in tree.flatten(network).items() if chosen[k]}
    if not found:
        raise UserError(
            f"{where} = {rules!r} prune no parameter: give one the value True"
        )
    return found


def apply(params, masks: Mapping[str, jax.Array]):
    """Parameters with the masked weights at zero."""

    def masked(name, weight):
        keep = masks.get(name)
        return weight if keep is None else jnp.where(keep, weight, 0)

    return tree.map_named(masked, params)


def _scheduled(step, sparsity, initial, begin, end):
    """Equation 1."""
    left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1)
    return sparsity + (initial - sparsity) * left**3


def _smallest_out(weights: Mapping[str, jax.Array], share, scope):
    """Masks that leave out a share of the weights, the smallest; of equal ones those that come first."""
    if scope == "layer":
        return {k: _mask(jnp.abs(w), share) for k, w in weights.items()}
    sizes = jnp.concatenate([jnp.abs(w).ravel() for w in weights.values()])
    flat, masks, begin = _mask(sizes, share), {}, 0
    for name, weight in weights.items():
        masks[name] = flat[begin : begin + weight.size].reshape(weight.shape)
        begin += weight.size
    return masks


def _mask(sizes, share):
    flat = sizes.ravel()
    order = jnp.argsort(flat, stable=True)
    count = jnp.round(share * flat.size).astype(jnp.int32)
    kept = jnp.arange(flat.size) >= count
    return jnp.zeros(flat.shape, bool).at[order].set(kept).reshape(sizes.shape)


def zeros(params, rules=RULES) -> dict[str, float]:
    """The share of zeros in each parameter that the rules prune, 0..1."""
    return {k: float(jnp.mean(w == 0)) for k, w in pruned(params, rules).items()}
