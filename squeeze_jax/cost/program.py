"""Traces a function into a flat list of operations in execution order, from which costs are computed.

A jaxpr is flattened: the operations of calls (jit, remat, custom derivatives, composites, `jax.shard_map`) replace the
call, so that each value is one object from its producer to its last use. Loops and conditionals stay one operation each,
with a program for each body. Values made only of weights and constants, which a device has before it starts, are
distinguished from activations, which depend on the inputs.
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
from jax.interpreters import partial_eval

from squeeze_jax import tree
from squeeze_jax.cost import call
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import lowering

# Jitted functions of jax.nn that TFLite computes in one operation, here HARD_SWISH.
KERNELS = {"hard_silu", "hard_swish"}

# Primitives that run the jaxpr in their parameters once; shard_map runs it once on each device.
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
    """An array of a program; two values are equal only if they are the same object.

    Attributes:
      shape, dtype: shape and dtype of the array.
      weights: names of the weights that the array is computed from, empty for a constant; None for an activation, which
        depends on the inputs.
      source: for a constant that the program itself computes, the operation that produces it; otherwise None.
    """

    shape: tuple[int, ...]
    dtype: Any
    weights: frozenset[str] | None = None
    source: "Operation | None" = None

    def nbytes(self, bits: int | None) -> int:
        """Returns the array's bytes at `bits` per floating-point number.

        Integers always count in their own dtype, and with `bits=None` every dtype does.
        """
        if bits is None or not jnp.issubdtype(self.dtype, jnp.floating):
            return math.prod(self.shape) * self.dtype.itemsize
        return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(eq=False, slots=True)
class Operation:
    """One primitive, or one of KERNELS.

    Attributes:
      name: name of the primitive or kernel; "shard" where an array is split among devices or assembled from them.
      layer: path of the Linen module that it belongs to.
      inputs, outputs: values that it reads and produces.
      eqn: its equation in the jaxpr.
      bodies: programs of the bodies of a loop or conditional; empty for other operations.
      axes: {mesh axis: devices along it} of every `jax.shard_map` around the operation.
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
        """The parameters of the operation's equation."""
        return self.eqn.params

    @property
    def devices(self) -> int:
        """The number of devices that run the operation."""
        return math.prod(self.axes.values())


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """Operations in the order in which they run.

    Attributes:
      inputs: activations that are arguments of the function, or that each iteration of a loop receives anew. Values that a
        body reads from outside are not included.
      operations: the operations, in order.
      outputs: the results.
    """

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def trace(
    fn: Callable | nn.Module,
    *args,
    first_output: bool = False,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> Program:
    """Returns the program of `fn(*args, **kwargs)` with native convolutions, without running it.

    Args:
      fn: any function that JAX can trace. Its arguments are inputs, and arrays that it closes over are constants. For a
        Linen module the forward pass is traced: its variables are weights, named such as `params/fire2/squeeze1x1/kernel`,
        and layer names omit the module's own name. The state of an NNX module is weights; its layers have no names.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module the arguments after the variables. An
        argument without any array, such as a string, a number or a tuple of numbers, is static and passed on unchanged.
      first_output: if a module returns a tuple, keep only the first element: networks return (result, endpoints).
      weight_argnums: positions of a function's arguments that are weights; positions name them, as in `0/kernel`.
    """
    weights, run, args = call.split(fn, args, kwargs, first_output, weight_argnums)
    prefix = f"{root(fn)}/" if isinstance(fn, nn.Module) else ""
    with lowering("native"):
        jaxpr = jax.make_jaxpr(run)(weights, args).jaxpr
    # XLA leaves out what no output needs.
    needed = [True] * len(jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, needed, instantiate=True)
    names = [*tree.flatten(weights), *[None] * len(jax.tree.leaves(args))]
    inputs = [
        _make_value(v, None if name is None else {name})
        for v, name in zip(jaxpr.invars, names, strict=True)
    ]
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    program = _program(jaxpr, env, inputs, "", {})
    _remove_layer_prefix(program, prefix)
    return program


def executions(
    body: Program, cost: Callable[[Operation], float], times: int = 1
) -> Iterator[tuple[Operation, int, float]]:
    """Yields each operation that runs, how often it runs on a device, and the cost of one run, in order.

    Args:
      body: the program.
      cost: function of an operation that returns its cost without its bodies. It selects the branch of a conditional:
        only the costliest branch counts as run.
      times: how often the program runs. A loop multiplies this by its length, or by 1 if its length is unknown.
    """
    for op in body.operations:
        if op.name == "cond":
            branches = [list(executions(branch, cost, times)) for branch in op.bodies]
            yield from max(branches, key=lambda ops: sum(n * c for _, n, c in ops))
            continue
        yield op, times, cost(op)
        turns = op.params["length"] if op.name == "scan" else 1
        for inner in op.bodies:
            yield from executions(inner, cost, times * turns)


def root(module: nn.Module) -> str:
    """Returns the layer name of the operations in a module itself, outside its submodules."""
    return module.name or type(module).__name__


def check_bits(bits: Any, where: str) -> int:
    """Returns `bits` if it is a valid number of bits.

    Args:
      bits: the value to check.
      where: name of the setting, for the error message.

    Raises:
      UserError: `bits` is not an integer from 1 to 64.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 64:
        raise UserError(f"{where} = {bits!r} should be an integer from 1 to 64")
    return bits


def _program(jaxpr, env: dict, inputs: Iterable[Value], scope: str, axes: Mapping):
    """Returns the program of a jaxpr, whose inputs are in `env`: {jaxpr variable: value}."""
    operations = []
    _flatten(jaxpr, env, scope, axes, operations)
    outputs = [_lookup(env, v) for v in jaxpr.outvars]
    return Program([v for v in inputs if v.weights is None], operations, outputs)


def _flatten(jaxpr: core.Jaxpr, env: dict, scope: str, axes: Mapping, into: list):
    """Appends the operations of a jaxpr to `into`, and adds every value that they produce to `env`.

    Args:
      jaxpr: the jaxpr.
      env: {jaxpr variable: value}, which already holds the jaxpr's inputs.
      scope: layer of the jaxpr itself; the names of its layers start with it.
      axes: {mesh axis: devices along it} of every `jax.shard_map` around the jaxpr.
      into: list of the operations so far.
    """
    for v in jaxpr.constvars:
        env[v] = _make_value(v, ())
    for eqn in jaxpr.eqns:
        layer = _layer_name(scope, str(eqn.source_info.name_stack))
        inputs = [_lookup(env, v) for v in eqn.invars]
        callee = _called_jaxpr(eqn)
        if callee is not None:
            callee_inputs = _cross_shard_map(
                eqn, inputs, callee.invars, layer, axes, into
            )
            callee_env = dict(zip(callee.invars, callee_inputs, strict=True))
            _flatten(
                callee, callee_env, layer, {**axes, **_manual_axes(eqn.params)}, into
            )
            outputs = [_lookup(callee_env, v) for v in callee.outvars]
            outputs = _cross_shard_map(eqn, outputs, eqn.outvars, layer, axes, into)
        else:
            weights = None
            if all(v.weights is not None for v in inputs):
                weights = frozenset().union(*(v.weights for v in inputs))
            outputs = [_make_value(v, weights) for v in eqn.outvars]
            name = eqn.primitive.name
            bodies = _body_programs(eqn, inputs, layer, axes)
            into.append(Operation(name, layer, inputs, outputs, eqn, bodies, axes))
            if name in ("jit", "pjit"):
                into[-1].name = eqn.params["name"]
            if weights == frozenset():
                for value in outputs:
                    value.source = into[-1]
        env.update(zip(eqn.outvars, outputs, strict=True))


def _called_jaxpr(eqn) -> core.Jaxpr | None:
    """Returns the jaxpr that replaces a call; None if the equation is an operation and not a call."""
    if eqn.primitive.name not in CALLS or eqn.params.get("name", None) in KERNELS:
        return None
    jaxprs = core.jaxprs_in_params(eqn.params)
    return next((j for j in jaxprs if len(j.invars) == len(eqn.invars)), None)


def _manual_axes(params: Mapping) -> dict[str, int]:
    """Returns {mesh axis: devices along it} of the axes that `jax.shard_map` makes manual; empty for any other call."""
    if "mesh" not in params:
        return {}
    # manual_axes; newly_manual_axes in JAX versions where nested calls can make axes manual one after the other.
    axes = next(v for k, v in params.items() if k.endswith("manual_axes"))
    return {axis: params["mesh"].shape[axis] for axis in axes}


def _cross_shard_map(eqn, values, variables, layer, axes, into) -> list[Value]:
    """Returns values as they are on the other side of a `jax.shard_map` boundary, and appends a "shard" operation for each.

    Outside, a value is the whole array; inside, it is the part that one device holds. Values that keep their shape are
    returned unchanged.

    Args:
      eqn: the equation of the call.
      values: values on this side.
      variables: jaxpr variables on the other side, with their shapes.
      layer, axes, into: as for `_flatten`.
    """
    resharded = []
    for value, v in zip(values, variables, strict=True):
        if value.shape != tuple(v.aval.shape):
            part = _make_value(v, value.weights)
            into.append(Operation("shard", layer, [value], [part], eqn, (), axes))
            value = part
        resharded.append(value)
    return resharded


def _body_programs(
    eqn, inputs: list[Value], layer: str, axes: Mapping
) -> tuple[Program, ...]:
    """Returns the programs inside a loop or conditional; empty for any other operation.

    Inputs that are the same in each iteration are the values outside; carries and slices are new values.
    """
    params = eqn.params
    if eqn.primitive.name == "cond":
        return tuple(
            _body_program(branch.jaxpr, inputs[1:], len(inputs) - 1, layer, axes)
            for branch in params["branches"]
        )
    if eqn.primitive.name == "scan":
        constants, carries = scan_input_counts(params)
        slices = constants + carries
        jaxpr = params["jaxpr"].jaxpr
        return (_body_program(jaxpr, inputs, constants, layer, axes, slices),)
    if eqn.primitive.name == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[first + second :]
        constants = {
            "cond_jaxpr": inputs[:first],
            "body_jaxpr": inputs[first : first + second],
        }
        return tuple(
            _body_program(params[key].jaxpr, [*c, *carry], len(c), layer, axes)
            for key, c in constants.items()
        )
    return ()


def scan_input_counts(params: Mapping) -> tuple[int, int]:
    """Returns how many of a scan's first inputs are constants, and how many of the next ones are carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(list(constants)), len(list(carries))


def _body_program(
    jaxpr, outside: list[Value], constants: int, layer, axes, slices=None
) -> Program:
    """Returns the program of a loop's or conditional's body.

    Args:
      jaxpr: the body.
      outside: the operation's inputs, in the order of the body's inputs: constants, carries, slices.
      constants: how many of them the body reads unchanged. The other inputs of the body are new values.
      layer, axes: as for `_flatten`.
      slices: position of the first input that is a slice; None if there are no slices. A slice of a weight is a weight,
        and a carry is always an activation.
    """
    slices = len(outside) if slices is None else slices
    new_values = [
        _make_value(v, outside[i].weights if i >= slices else None)
        for i, v in enumerate(jaxpr.invars[constants:], constants)
    ]
    env = dict(zip(jaxpr.invars, [*outside[:constants], *new_values], strict=True))
    return _program(jaxpr, env, new_values, layer, axes)


def _remove_layer_prefix(program: Program, prefix: str) -> None:
    for operation in program.operations:
        operation.layer = operation.layer.removeprefix(prefix)
        for body in operation.bodies:
            _remove_layer_prefix(body, prefix)


def _make_value(v, weights: Iterable[str] | None) -> Value:
    names = None if weights is None else frozenset(weights)
    aval = v.aval  # the abstract value of a token has no shape
    return Value(getattr(aval, "shape", ()), getattr(aval, "dtype", None), names)


def _lookup(env: Mapping, v) -> Value:
    return _make_value(v, ()) if isinstance(v, core.Literal) else env[v]


@functools.lru_cache(maxsize=4096)
def _layer_name(scope: str, stack: str) -> str:
    """Returns the layer of an equation from its name stack, such as Net/fire2 for `transpose(jvp(Net))/fire2`.

    Args:
      scope: layer of the jaxpr around the equation; "" for the outermost.
      stack: the equation's name stack inside that jaxpr.
    """
    # The backward pass of a rematerialization names the module twice.
    stack = re.sub(r"transpose\(jvp\(([^()]*)\)\)/(?=jvp\(\1\))", "", stack)
    while (plain := re.sub(r"\w+\(([^()]*)\)", r"\1", stack)) != stack:
        stack = plain
    # `jnp.einsum` uses its equation as a name scope: "bc,cd->bd", or "bc,cd".
    parts = [p for p in stack.split("/") if p and p not in _REMAT]
    parts = [p for p in parts if "->" not in p and "," not in p]
    return "/".join([scope, *parts] if scope else parts)
