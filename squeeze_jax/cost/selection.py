"""Convolutions whose kernel only selects numbers, such as those inside `lax.conv_general_dilated_patches`.

Their kernel is an identity matrix that the function itself makes from comparisons of positions, so it is known without
running the function. Each of its rows holds one 1 and zeros: the convolution moves numbers, and its gradient adds them up
where they came from. Neither multiplies.
"""

import math

import jax
import numpy as np

from squeeze_jax.cost.program import Operation, Value

# Primitives that make and rearrange such a kernel; a kernel made in any other way is data.
_POSITIONS = {"iota", "eq"}
_ARRANGE = {
    "add",
    "broadcast_in_dim",
    "convert_element_type",
    "reshape",
    "rev",
    "squeeze",
    "transpose",
}
_MOST = 2**24  # entries of a kernel that is looked at


def selects(op: Operation) -> bool:
    """Whether a convolution's kernel has at most one 1 for each output, or for each input of a group, and else zeros."""
    value = op.inputs[1]
    if math.prod(value.shape) > _MOST or not _from_positions(value):
        return False
    with jax.ensure_compile_time_eval():
        kernel = np.asarray(_evaluated(value))
    if not np.isin(kernel, (0, 1)).all():
        return False
    spec = op.params["dimension_numbers"].rhs_spec
    kernel = kernel.transpose(spec)  # [outputs, inputs of a group, positions...]
    outputs = kernel.reshape(len(kernel), -1)
    groups = op.params["feature_group_count"]
    inputs = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
    inputs = inputs.reshape(groups * kernel.shape[1], -1)
    return bool((outputs.sum(1) <= 1).all() or (inputs.sum(1) <= 1).all())


def _from_positions(value: Value) -> bool:
    """Whether an array is made of comparisons of positions alone."""
    seen, left = set(), [value]
    while left:
        source = left.pop().source
        if source is None or source.name not in _POSITIONS | _ARRANGE:
            return False
        seen.add(source.name)
        values = zip(source.eqn.invars, source.inputs, strict=True)
        left += [value for variable, value in values if not hasattr(variable, "val")]
    return seen >= _POSITIONS


def _evaluated(value: Value):
    op = value.source
    arguments = [
        variable.val if hasattr(variable, "val") else _evaluated(each)
        for variable, each in zip(op.eqn.invars, op.inputs, strict=True)
    ]
    return op.eqn.primitive.bind(*arguments, **op.params)
