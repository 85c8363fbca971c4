"""Recognises convolutions whose kernel only selects numbers, such as those of `lax.conv_general_dilated_patches`.

Their kernel is an identity matrix that the function itself computes by comparing positions, so it is known without running
the function. Each row of the kernel holds one 1 and zeros: the convolution moves numbers, and its gradient adds them up
at their original positions. Neither multiplies.
"""

import math

import jax
import numpy as np

from squeeze_jax.cost.program import Operation, Value

# Primitives that create and rearrange such a kernel; a kernel computed in any other way counts as data.
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
_MAX_KERNEL_SIZE = 2**24  # entries; larger kernels are not evaluated


def selects(op: Operation) -> bool:
    """Returns whether a convolution's kernel only selects numbers.

    Such a kernel consists of zeros and at most one 1 for each output, or at most one 1 for each input of a group.
    """
    value = op.inputs[1]
    if math.prod(value.shape) > _MAX_KERNEL_SIZE or not _from_positions(value):
        return False
    with jax.ensure_compile_time_eval():
        kernel = np.asarray(_evaluate(value))
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
    """Returns whether an array is computed only from comparisons of positions."""
    seen, pending = set(), [value]
    while pending:
        source = pending.pop().source
        if source is None or source.name not in _POSITIONS | _ARRANGE:
            return False
        seen.add(source.name)
        values = zip(source.eqn.invars, source.inputs, strict=True)
        pending += [value for variable, value in values if not hasattr(variable, "val")]
    return seen >= _POSITIONS


def _evaluate(value: Value):
    """Computes a constant by running the operations that produce it."""
    op = value.source
    arguments = [
        variable.val if hasattr(variable, "val") else _evaluate(operand)
        for variable, operand in zip(op.eqn.invars, op.inputs, strict=True)
    ]
    return op.eqn.primitive.bind(*arguments, **op.params)
