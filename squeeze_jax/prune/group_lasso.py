"""Group lasso on the kernels of convolutions and dense layers; a method of the plug point `objective`.

Wen et al. 2016, "Learning structured sparsity in deep neural networks", arXiv 1608.03665, section 3.1, with the factor for the
size of a group from Yuan and Lin 2006. The penalty pulls whole groups of weights towards zero:

    penalty = sum over groups g of sqrt(size of g) * ||w_g||_2

The `weight` of the method's section in `config.objective` multiplies the penalty in the loss.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.registry import checked

SMALL = 0.1  # a group is small if its norm is below this share of the largest norm in its kernel


@checked
def make(
    groups: Literal["filters", "channels", "shapes"] = "filters",
    rules: tuple[tuple[str, bool], ...] = (("kernel$", True),),
) -> methods.Objective:
    """Returns the penalty as an objective; its gradient for a group of zeros is zero.

    The metric "small_groups" is the share of groups whose norm is below a tenth of the largest norm in their kernel.

    Args:
      groups: which weights of a kernel [height, width, inputs, outputs] form a group. "filters" has one group per output,
        "channels" one per input, and "shapes" one per (row, column, input). In a dense kernel [inputs, outputs], "channels"
        and "shapes" are the same. In a grouped convolution, an input is a channel within its group.
      rules: ordered pairs (regex, bool) for parameter names. The first match decides whether a parameter is penalised. A
        parameter without a match is not penalised.

    Raises:
      UserError: The value of a rule is not a bool. When the method gets the parameters: a rule matches no parameter, no
        parameter is penalised, or a penalised one has fewer than 2 axes.
    """
    for rule in rules:
        if len(rule) == 2 and not isinstance(rule[1], bool):
            raise UserError(
                f"group_lasso.rules: the value of {rule[0]!r} should be True or False, not {rule[1]!r}"
            )

    def init(key, params):
        del key
        _penalised(params, rules)  # raises errors before training starts
        return {}

    def loss(logits, endpoints, batch, params, own):
        del logits, endpoints, batch, own
        kernels = _penalised(params, rules).values()
        norms = [group_norms(kernel, groups).reshape(-1) for kernel in kernels]
        small = jnp.concatenate([n < SMALL * jnp.max(n) for n in norms])
        total = sum(penalty(kernel, groups) for kernel in kernels)
        return total, {"small_groups": jnp.mean(small, dtype=jnp.float32)}

    return methods.Objective(loss, init)


def penalty(kernel: jax.Array, groups: str) -> jax.Array:
    """Returns the sum over a kernel's groups of sqrt(size of the group) * norm, float32 [].

    Args:
      kernel: [..., inputs, outputs].
      groups: see `make`.
    """
    norms = group_norms(kernel, groups)
    return math.sqrt(kernel.size / norms.size) * jnp.sum(norms)


def group_norms(kernel: jax.Array, groups: str) -> jax.Array:
    """Returns the Euclidean norm of each group of a kernel; the arguments are those of `penalty`."""
    axes = range(kernel.ndim)
    inputs, outputs = kernel.ndim - 2, kernel.ndim - 1
    reduced_axes = {
        "filters": [axis for axis in axes if axis != outputs],
        "channels": [axis for axis in axes if axis != inputs],
        "shapes": [outputs],
    }[groups]
    squares = jnp.sum(jnp.square(kernel), tuple(reduced_axes))
    # The derivative of sqrt is infinite at 0, and infinity times 0 is NaN.
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _penalised(params: Mapping[str, Any], rules: tree.Rules) -> dict[str, Any]:
    """Returns the network's parameters that the rules choose, {name: array}."""
    network = {k: v for k, v in params.items() if k != methods.METHODS}
    chosen = tree.apply_rules(rules, network, default=False, where="group_lasso.rules")
    chosen, values = tree.flatten(chosen), tree.flatten(network)
    kernels = {name: values[name] for name in values if chosen[name]}
    if not kernels:
        raise UserError(
            f"group_lasso.rules = {rules!r} penalises no parameter: give one rule the value True"
        )
    for name, kernel in kernels.items():
        if kernel.ndim < 2:
            raise UserError(
                f"group_lasso.rules: {name} of shape {kernel.shape} has no groups; exclude it by a rule with the value"
                " False"
            )
    return kernels
