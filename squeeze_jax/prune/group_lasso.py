"""Group lasso: a penalty that drives whole filters to zero, so that they can be removed.

Wen, Wu, Wang, Chen, Li 2016, arXiv 1608.03665 (structured sparsity learning), equations 2 to 4, with the weight of Yuan
and Lin 2006 for groups of different sizes:

    penalty = strength * sum over groups g of sqrt(size of g) * ||w_g||_2

The norm is not squared, so penalty(2 w) = 2 penalty(w): its pull does not fade as a group gets smaller. Plug point
objective.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Objective

RULES = (("kernel$", 1.0),)


def make(
    strength: float,
    groups: Literal["filters", "channels", "shapes"] = "filters",
    rules: tuple = RULES,
) -> Objective:
    """Returns the penalty; its metric "sparse_groups" is the share of groups whose RMS is below a thousandth.

    Args:
      strength: factor of the whole penalty, λ, above 0.
      groups: "filters": the weights of one output channel; "channels": of one input channel; "shapes": of one position
        of one input channel, over all filters.
      rules: (regex, factor) over parameter names, first match wins, no match means 0; kernels of any rank.

    Raises:
      UserError: a strength that is not positive; when it gets the parameters, a rule that matches none.
    """
    if not strength > 0:
        raise UserError(
            f"prune.group_lasso: strength = {strength} should be above 0; leave the loss out for none"
        )

    def loss(logits, endpoints, batch, params, own):
        del logits, endpoints, batch, own
        squares = squared_norms(params, groups, rules)
        total = sum(f * penalty(s, size) for s, size, f in squares)
        small = jnp.concatenate([s / size < 1e-6 for s, size, _ in squares])
        return strength * total, {"sparse_groups": jnp.mean(small, dtype=jnp.float32)}

    return Objective(loss)


def squared_norms(
    params: Mapping[str, Any], groups: str = "filters", rules=RULES
) -> list[tuple[jax.Array, int, float]]:
    """(the groups' squared norms [n], elements of a group, factor) of each kernel that the rules penalise."""
    network = {k: v for k, v in params.items() if k != METHODS}
    where = "prune.group_lasso: rules"
    factors = tree.flatten(tree.apply_rules(rules, network, default=0.0, where=where))
    found = []
    for name, kernel in tree.flatten(network).items():
        if factors[name]:
            if kernel.ndim < 2:
                raise UserError(
                    f"{where}: {name} of shape {kernel.shape} is no kernel [..., inputs, outputs]"
                )
            over = {
                "filters": tuple(range(kernel.ndim - 1)),
                "channels": (*range(kernel.ndim - 2), kernel.ndim - 1),
                "shapes": (kernel.ndim - 1,),
            }[groups]
            squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), over).ravel()
            found.append((squares, kernel.size // squares.size, factors[name]))
    return found


def penalty(squares: jax.Array, size: int) -> jax.Array:
    """sqrt(size) times the sum of norms, of squared norms [n]; the gradient of a group at zero is zero."""
    alive = squares > 0
    # The square root's derivative is infinite at zero, also where its value is not used.
    norms = jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1.0)), 0.0)
    return jnp.sqrt(jnp.float32(size)) * jnp.sum(norms)
