"""A function as the operations it runs, in order: what costs are found from that no operation tells alone.

A jaxpr is flattened: the operations of calls (jit, remat, custom derivatives, composites, `jax.shard_map`) take the
call's place, so that every value has one name from where it is made to its last use. Loops and conditionals stay one
operation each, with a program for each body. Values are told apart by what they are made of: weights and constants
alone, which a device has before it starts, or what goes in, which are activations.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from squeeze_jax import tree
from squeeze_jax.cost import call
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import lowering

# Functions of jax.nn, as their calls are named, that TFLite computes by one operation, here HARD_SWISH.
KERNELS = {"hard_silu", "hard_swish"}

# Primitives that run the jaxpr in their parameters once, or, the last, once on each device.
CALLS = {
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

_REMAT = {"checkpoint", "rematted_computation"}


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array of a program; two are the same only if they are one object.

    Attributes:
      shape, dtype: of the array.
      weights: names of the weights that it is made of, empty for a constant; None for an activation, which depends
        on the inputs.
      source: of a constant that the program itself makes, the operation that does.
    """

    shape: tuple[int, ...]
    dtype: Any
    weights: frozenset[str] | None = None
    source: "Operation | None" = None

    def nbytes(self, bits: int | None) -> int:
        """Bytes at so many bits a floating-point number; integers, and all with None, have those of their dtype."""
        if bits is None or not jnp.issubdtype(self.dtype, jnp.floating):
            return math.prod(self.shape) * self.dtype.itemsize
        return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(eq=False, slots=True)
class Operation:
    """One primitive, or one of KERNELS.

    Attributes:
      name: of the primitive, or "shard" where an array is cut for devices or joined from them.
      layer: the Linen module it belongs to.
      inputs, outputs: values.
      eqn: the jaxpr's equation.
      bodies: of a loop or a conditional.
      axes: {mesh axis: devices along it} of the `jax.shard_map`s that it runs inside.
    """

    name: str
    layer: str
    inputs: list[Value]
    outputs: list[Value]
    eqn: core.JaxprEqn
    bodies: tuple["Program", ...] = ()
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def devices(self) -> int:
        """How many devices run it."""
        return math.prod(self.axes.values())


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """Operations in the order they run.

    Attributes:
      inputs: what the function, or each turn of a loop, is given anew; not what a body reads from outside.
      operations: in order.
      outputs: what it returns.
    """

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def trace(
    fn: Callable | nn.Module,
    *args,
    first: bool = False,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> Program:
    """Returns the program of `fn(*args, **kwargs)` with native convolutions, without running it.

    Args:
      fn: any function that JAX can trace: its arguments are inputs, and what it closes over are constants. Of a Linen
        module it is the forward pass: its variables are weights, called `params/fire2/squeeze1x1/kernel`, and
        layers are named without the module's own name. An NNX module's state are weights; its layers have no names.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module what follows the variables. An argument
        without any array, such as a string, a number or a tuple of numbers, is static: it is passed on as it is.
      first: of a tuple returned by a module keep the first alone, the result that networks return before their
        endpoints.
      weight_argnums: positions of the arguments of a function that are weights, called by their positions: `0/kernel`.
    """
    weights, run, args = call.split(fn, args, kwargs, first, weight_argnums)
    prefix = f"{root(fn)}/" if isinstance(fn, nn.Module) else ""
    with lowering("native"):
        jaxpr = jax.make_jaxpr(run)(weights, args).jaxpr
    names = [*tree.flatten(weights), *[None] * len(jax.tree.leaves(args))]
    values = [
        _value(v, None if name is None else {name})
        for v, name in zip(jaxpr.invars, names, strict=True)
    ]
    env = dict(zip(jaxpr.invars, values, strict=True))
    program = _program(jaxpr, env, values, "", {})
    _rename(program, prefix)
    return program


def runs(
    body: Program, cost: Callable[[Operation], float], times: int = 1
) -> Iterator[tuple[Operation, int, float]]:
    """Yields each operation that runs, how often it runs on a device, and the cost of one run, in order.

    Args:
      body: the program.
      cost: operation → its cost without its bodies. Of a conditional only the costliest branch runs.
      times: how often the program runs. A loop multiplies this by its length, or by 1 if its length is unknown.
    """
    for op in body.operations:
        if op.name == "cond":
            branches = [list(runs(branch, cost, times)) for branch in op.bodies]
            yield from max(branches, key=lambda ops: sum(n * c for _, n, c in ops))
            continue
        yield op, times, cost(op)
        turns = op.params["length"] if op.name == "scan" else 1
        for inner in op.bodies:
            yield from runs(inner, cost, times * turns)


def root(module: nn.Module) -> str:
    """The layer of what a module does itself, outside its submodules."""
    return module.name or type(module).__name__


def check_bits(bits: Any, where: str) -> int:
    """Returns the number of bits.

    Raises:
      UserError: not an integer from 1 to 64.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 64:
        raise UserError(f"{where} = {bits!r} should be an integer from 1 to 64")
    return bits


def _program(jaxpr, env: dict, inputs: Iterable[Value], scope: str, axes: Mapping):
    operations = []
    _flatten(jaxpr, env, scope, axes, operations)
    outputs = [_read(env, v) for v in jaxpr.outvars]
    return Program([v for v in inputs if v.weights is None], operations, outputs)


def _flatten(jaxpr: core.Jaxpr, env: dict, scope: str, axes: Mapping, into: list):
    """Appends the operations of a jaxpr, whose inputs are in `env`, and puts all it makes there too."""
    for v in jaxpr.constvars:
        env[v] = _value(v, ())
    for eqn in jaxpr.eqns:
        layer = _layer(scope, str(eqn.source_info.name_stack))
        inputs = [_read(env, v) for v in eqn.invars]
        inside = _called(eqn)
        if inside is not None:
            given = _shards(eqn, inputs, inside.invars, layer, axes, into)
            inner = dict(zip(inside.invars, given, strict=True))
            _flatten(inside, inner, layer, {**axes, **_axes(eqn.params)}, into)
            made = [_read(inner, v) for v in inside.outvars]
            made = _shards(eqn, made, eqn.outvars, layer, axes, into)
        else:
            names = None
            if all(v.weights is not None for v in inputs):
                names = frozenset().union(*(v.weights for v in inputs))
            made = [_value(v, names) for v in eqn.outvars]
            name = eqn.primitive.name
            bodies = _bodies(eqn, inputs, layer, axes)
            into.append(Operation(name, layer, inputs, made, eqn, bodies, axes))
            if name in ("jit", "pjit"):
                into[-1].name = eqn.params["name"]
            if names == frozenset():
                for value in made:
                    value.source = into[-1]
        env.update(zip(eqn.outvars, made, strict=True))


def _called(eqn) -> core.Jaxpr | None:
    """The jaxpr that runs in the place of a call; None where an equation is an operation."""
    if eqn.primitive.name not in CALLS or eqn.params.get("name", None) in KERNELS:
        return None
    found = core.jaxprs_in_params(eqn.params)
    return next((j for j in found if len(j.invars) == len(eqn.invars)), None)


def _axes(params: Mapping) -> dict[str, int]:
    """The mesh axes that a call makes manual, and how many devices are along each: none but of `jax.shard_map`."""
    if "mesh" not in params:
        return {}
    # Called manual_axes or, since axes can be made manual one after the other, newly_manual_axes.
    axes = next(v for k, v in params.items() if k.endswith("manual_axes"))
    return {axis: params["mesh"].shape[axis] for axis in axes}


def _shards(eqn, values, variables, layer, axes, into) -> list[Value]:
    """The values as they are on the other side of `jax.shard_map`, where a device has a part of each."""
    other = []
    for value, v in zip(values, variables, strict=True):
        if value.shape != tuple(v.aval.shape):
            part = _value(v, value.weights)
            into.append(Operation("shard", layer, [value], [part], eqn, (), axes))
            value = part
        other.append(value)
    return other


def _bodies(eqn, inputs: list[Value], layer: str, axes: Mapping) -> tuple[Program, ...]:
    """The programs inside a loop or a conditional: what is the same in each turn is the value outside."""
    params = eqn.params
    if eqn.primitive.name == "cond":
        return tuple(
            _body(branch.jaxpr, inputs[1:], len(inputs) - 1, layer, axes)
            for branch in params["branches"]
        )
    if eqn.primitive.name == "scan":
        same, carries = scanned(params)
        slices = same + carries
        return (_body(params["jaxpr"].jaxpr, inputs, same, layer, axes, slices),)
    if eqn.primitive.name == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[first + second :]
        given = (inputs[:first], inputs[first : first + second])
        return tuple(
            _body(params[key].jaxpr, [*same, *carry], len(same), layer, axes)
            for key, same in zip(("cond_jaxpr", "body_jaxpr"), given, strict=True)
        )
    return ()


def scanned(params: Mapping) -> tuple[int, int]:
    """How many of a scan's inputs are the same in each turn, and how many are carried from one to the next."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    same, carries, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(list(same)), len(list(carries))


def _body(jaxpr, outside: list[Value], same: int, layer, axes, slices=None) -> Program:
    """A program whose first `same` inputs are values outside, the others new ones: carries, from `slices` on slices."""
    slices = len(outside) if slices is None else slices
    anew = [
        _value(v, outside[i].weights if i >= slices else None)
        for i, v in enumerate(jaxpr.invars[same:], same)
    ]
    env = dict(zip(jaxpr.invars, [*outside[:same], *anew], strict=True))
    return _program(jaxpr, env, anew, layer, axes)


def _rename(program: Program, prefix: str) -> None:
    for operation in program.operations:
        operation.layer = operation.layer.removeprefix(prefix)
        for body in operation.bodies:
            _rename(body, prefix)


def _value(v, weights: Iterable[str] | None) -> Value:
    names = None if weights is None else frozenset(weights)
    aval = v.aval  # a token's abstract value has no shape
    return Value(getattr(aval, "shape", ()), getattr(aval, "dtype", None), names)


def _read(env: Mapping, v) -> Value:
    return _value(v, ()) if isinstance(v, core.Literal) else env[v]


@functools.lru_cache(maxsize=4096)
def _layer(scope: str, stack: str) -> str:
    """The module's name of an equation in a jaxpr whose own is `scope`: `transpose(jvp(Net))/fire2` is Net/fire2."""
    # The backward pass of a rematerialization names the module twice.
    stack = re.sub(r"transpose\(jvp\(([^()]*)\)\)/(?=jvp\(\1\))", "", stack)
    while (plain := re.sub(r"\w+\(([^()]*)\)", r"\1", stack)) != stack:
        stack = plain
    # `jnp.einsum` names its operations by its equation: "bc,cd->bd", or "bc,cd".
    parts = [p for p in stack.split("/") if p and p not in _REMAT]
    parts = [p for p in parts if "->" not in p and "," not in p]
    return "/".join([scope, *parts] if scope else parts)
