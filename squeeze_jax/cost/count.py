"""Parameters and multiply-accumulates (MACs), counted in what JAX would run and not declared by anyone.

The rules, which give the published counts of torchvision's networks to the digit:
  * One MAC is one multiplication and one addition: two FLOPs.
  * Convolutions and matrix products count; normalisation, bias, activations, pooling and elementwise work do not.
  * A convolution counts full windows, also where they reach into the padding.
  * Loops count each iteration, a conditional its costliest branch, `jax.shard_map` the work of all its devices.
  * Every convolution is counted in its native form, whatever lowering the backend would choose.
What cannot be counted (loops of unknown length, kernels and calls from outside JAX, factorizations) is named in
`Macs.unknown`. Counts of tools with other rules differ: compare only counts of one tool.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from squeeze_jax import tree
from squeeze_jax.nn.conv import lowering


class Macs(NamedTuple):
    """The count of a function: `total` is the sum of `by_layer`, whose keys are module names in order of use.

    `unknown` names what was not counted, as "primitive in layer".
    """

    total: int
    by_layer: dict[str, int]
    unknown: tuple[str, ...]


def macs(fn: Callable | nn.Module, *args, **kwargs) -> Macs:
    """Counts the MACs of `fn(*args, **kwargs)` without running it.

    Args:
      fn: any function that JAX can trace; of a Linen module the forward pass is counted and the layers are named
        without the module's own name, as its parameters are.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module what follows the variables.
    """
    if isinstance(fn, nn.Module):
        return _module_macs(fn, *args, **kwargs)
    with lowering("native"):
        jaxpr = jax.make_jaxpr(lambda a, k: fn(*a, **k))(args, kwargs)
    by_layer, unknown = {}, {}
    for layer, count, what in _walk(jaxpr.jaxpr, "", 1):
        by_layer[layer] = by_layer.get(layer, 0) + count
        if what:
            unknown[f"{what} in {layer or 'the function itself'}"] = None
    by_layer = {layer: count for layer, count in by_layer.items() if count}
    return Macs(sum(by_layer.values()), by_layer, tuple(unknown))


def parameters(module: nn.Module, *args, **kwargs) -> int:
    """Counts the trainable parameters of a Linen module called with these arguments, without making them."""
    return tree.size(_variables(module, *args, **kwargs).get("params", {}))


def _variables(module, *args, **kwargs):
    def init(a):
        return module.init(jax.random.key(0), *a, **kwargs)

    return jax.eval_shape(init, args)


def _module_macs(module, *args, **kwargs) -> Macs:
    variables = _variables(module, *args, **kwargs)
    count = macs(lambda v, *a: module.apply(v, *a, **kwargs), variables, *args)
    root = f"{module.name or type(module).__name__}/"
    by_layer = {k.removeprefix(root): n for k, n in count.by_layer.items()}
    return count._replace(by_layer=by_layer)


# Primitives that run the jaxprs in their parameters once, or, the last, once on each device.
_CALLS = {
    "call",
    "checkpoint",
    "closed_call",
    "composite",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "linear_call",
    "pjit",
    "remat",
    "remat2",
    "shard_map",
}

# Of the primitives that JAX itself defines these multiply, in ways that the rules do not cover.
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

_REMAT = {"checkpoint", "rematted_computation"}

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
}


def _walk(
    jaxpr: core.Jaxpr, scope: str, times: int
) -> Iterator[tuple[str, int, str | None]]:
    """Yields (layer, MACs, what is not counted or None) of each equation that matters."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        layer = _layer(scope, str(eqn.source_info.name_stack))
        if name == "conv_general_dilated":
            yield layer, times * _conv(eqn), None
        elif name == "dot_general":
            yield layer, times * _dot(eqn), None
        elif name == "scan":
            yield from _walk(params["jaxpr"].jaxpr, layer, times * params["length"])
        elif name == "cond":
            branches = [list(_walk(b.jaxpr, layer, times)) for b in params["branches"]]
            yield from max(branches, key=lambda found: sum(n for _, n, _ in found))
        elif name == "while":
            yield layer, 0, "while loop, counted as one iteration,"
            for part in ("cond_jaxpr", "body_jaxpr"):
                yield from _walk(params[part].jaxpr, layer, times)
        elif name in _CALLS:
            devices = _devices(params) if name == "shard_map" else 1
            for inside in core.jaxprs_in_params(params):
                yield from _walk(inside, layer, times * devices)
        elif name not in _FREE:
            yield layer, 0, _describe(eqn)


def _conv(eqn) -> int:
    spec = eqn.params["dimension_numbers"]
    x, kernel = (v.aval.shape for v in eqn.invars)
    out, inputs, *positions = (kernel[i] for i in spec.rhs_spec)
    if math.prod(eqn.params["lhs_dilation"]) > 1:
        # Transposed: each input position meets the whole kernel, the zeros between them do not.
        groups = eqn.params["feature_group_count"]
        return math.prod(x) * math.prod(positions) * (out // groups)
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(positions) * inputs


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    depth = math.prod(shape[i] for i in contracted)
    return math.prod(eqn.outvars[0].aval.shape) * depth


def _devices(params) -> int:
    # Called manual_axes or, since axes can be made manual one after the other, newly_manual_axes.
    axes = next(v for k, v in params.items() if k.endswith("manual_axes"))
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _describe(eqn) -> str:
    target = eqn.params.get("target_name") or eqn.params.get("call_target_name")
    return f"{eqn.primitive.name} {target}" if target else eqn.primitive.name


def _layer(scope: str, stack: str) -> str:
    """The module's name of an equation in a jaxpr whose own is `scope`: `transpose(jvp(Net))/fire2` is Net/fire2."""
    # The backward pass of a rematerialization names the module twice.
    stack = re.sub(r"transpose\(jvp\(([^()]*)\)\)/(?=jvp\(\1\))", "", stack)
    while (plain := re.sub(r"\w+\(([^()]*)\)", r"\1", stack)) != stack:
        stack = plain
    parts = [p for p in stack.split("/") if p and p not in _REMAT]
    return "/".join([scope, *parts] if scope else parts)
