"""Counts parameters and multiply-accumulates (MACs) in the operations that JAX would run.

The rules give the published counts of torchvision's networks to the digit:
  * One MAC is one multiplication and one addition: two FLOPs.
  * Convolutions and matrix products count. Normalisation, bias, activations, pooling and elementwise operations do not.
  * A convolution counts full windows, also where they reach into the padding. A convolution that only moves numbers, as
    `lax.conv_general_dilated_patches` does, counts nothing.
  * Operations whose results no output needs count nothing: XLA leaves them out.
  * A loop counts each iteration, a conditional its costliest branch, `jax.shard_map` the work of all its devices.
  * Every convolution is counted in its native form, whatever lowering the backend would choose.
`Macs.unknown` names what cannot be counted: loops of unknown length, kernels and calls from outside JAX, factorizations.
Tools with other rules give other counts, so compare only counts of one tool.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from squeeze_jax import tree
from squeeze_jax.cost import call, program, selection
from squeeze_jax.cost.program import Operation


class Macs(NamedTuple):
    """The MACs of a function.

    Attributes:
      total: the sum of `by_layer`.
      by_layer: {module name: MACs}, in order of use.
      unknown: what was not counted, each as "primitive in layer".
    """

    total: int
    by_layer: dict[str, int]
    unknown: tuple[str, ...]


def macs(fn: Callable | nn.Module, *args, **kwargs) -> Macs:
    """Counts the MACs of `fn(*args, **kwargs)` without running it.

    Args:
      fn: any function that JAX can trace. For a Linen module the forward pass is counted, and layer names omit the
        module's own name, as parameter names do. The layers of an NNX module have no names.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module the arguments after the variables.
        Arguments without any array are static. In training mode, such as with train=True, a module gets random streams
        and may update its statistics.

    Raises:
      UserError: arguments that do not fit the function.
    """
    if isinstance(fn, nn.Module):
        return _module_macs(fn, *args, **kwargs)
    traced = program.trace(*call.bind_static(fn, args, kwargs))
    by_layer, unknown = {}, {}
    for op, times, count in program.executions(
        traced, lambda op: operation_macs(op) * op.devices
    ):
        if count:
            by_layer[op.layer] = by_layer.get(op.layer, 0) + times * count
        elif description := _uncounted(op):
            unknown[f"{description} in {op.layer or 'the function itself'}"] = None
    return Macs(sum(by_layer.values()), by_layer, tuple(unknown))


def parameters(module: nn.Module, *args, **kwargs) -> int:
    """Counts the trainable parameters of a module.

    A Linen module is called with these arguments, without initializing it. An NNX module has its parameters already.
    """
    if call.is_nnx(module):
        from flax import nnx

        return tree.size(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return tree.size(call.variable_shapes(module, *args, **kwargs).get("params", {}))


def _module_macs(module, *args, **kwargs) -> Macs:
    weights, run, arrays = call.split(module, args, kwargs, first_output=False)
    count = macs(run, weights, arrays)
    root = f"{module.name or type(module).__name__}/"
    by_layer = {k.removeprefix(root): n for k, n in count.by_layer.items()}
    return count._replace(by_layer=by_layer)


# Primitives of JAX that multiply in ways that the rules do not cover.
_OPAQUE = {
    "cholesky",
    "custom_linear_solve",
    "eig",
    "eigh",
    "fft",
    "hessenberg",
    "householder_product",
    "lu",
    "qr",
    "schur",
    "svd",
    "triangular_solve",
    "tridiagonal",
    "tridiagonal_solve",
}

_FREE = {
    p.name
    for module in (lax, primitives)
    for p in vars(module).values()
    if isinstance(p, core.Primitive)
} - _OPAQUE
_FREE |= {
    "all_gather_invariant",
    "pbroadcast",
    "pcast",
    "psum2",
    "psum_invariant",
    "pvary",
    "random_clone",
    "random_unwrap",
    "random_wrap",
    "reduce_scatter",
    "reshard",
    "shard",
}
_FREE -= program.CALLS  # the operations inside a call are counted, not the call itself

PRODUCTS = {"conv_general_dilated", "dot_general"}
_KNOWN = PRODUCTS | _FREE | program.KERNELS


def operation_macs(op: Operation) -> int:
    """Returns the MACs of an operation on one device."""
    if op.name == "conv_general_dilated":
        return 0 if selection.selects(op) else _conv(op.eqn)
    return _dot(op.eqn) if op.name == "dot_general" else 0


def _uncounted(op: Operation) -> str | None:
    """Describes the part of an operation that the rules cannot count; None if they count all of it."""
    if op.name == "while":
        return "while loop, counted as one iteration,"
    return None if op.name in _KNOWN else _describe(op.eqn)


def _conv(eqn) -> int:
    spec = eqn.params["dimension_numbers"]
    x, kernel = (v.aval.shape for v in eqn.invars)
    out, inputs, *positions = (kernel[i] for i in spec.rhs_spec)
    if math.prod(eqn.params["lhs_dilation"]) > 1:
        # A transposed convolution multiplies each input by the whole kernel, but not the zeros between the inputs.
        groups = eqn.params["feature_group_count"]
        return math.prod(x) * math.prod(positions) * (out // groups)
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(positions) * inputs


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    depth = math.prod(shape[i] for i in contracted)
    return math.prod(eqn.outvars[0].aval.shape) * depth


def _describe(eqn) -> str:
    target = eqn.params.get("target_name") or eqn.params.get("call_target_name")
    return f"{eqn.primitive.name} {target}" if target else eqn.primitive.name
