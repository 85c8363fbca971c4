"""Peak memory of activations at inference: the most bytes alive at once, operation by operation.

An operation needs its inputs and its outputs at once, and whatever a later operation still reads. The peak over the
order in which a function runs decides whether a network fits a microcontroller, whose runtime plans all activations
into one arena; weights are read from flash and do not count. The rules are those of TFLite's files and of TFLite
Micro's planner:
  * Bias, batch normalisation and other arithmetic with weights, of the same shape, join the convolution, matrix product
    or sum whose result they alone read; ReLU and ReLU6 join any arithmetic or pooling. Joined, they need no buffer.
  * Any other operation, also an addition of two activations, writes a buffer of its own. `in_place=True`: an
    elementwise operation writes to an input of the same size that nothing reads later, as LiteRT and XLA do where they
    can.
  * Reshapes and conversions of floats are names for the same buffer; so are broadcasts that elementwise operations
    read.
  * A convolution or pooling whose padding is neither none nor that of "SAME" reads a padded copy: TFLite has no other.
  * A hard swish is one operation; other functions of several steps count as these, which for GELU is more than a
    runtime with a kernel for it needs.
  * Inputs stay until their last use, results to the end, and what does not lead to a result is not computed.
  * `jax.shard_map` works on parts of arrays that lie whole outside it, and its results are held in parts.
  * A loop holds its stacked inputs and results and what one turn needs; a conditional what its largest branch needs.
A planner rounds buffers up (TFLite Micro to 16 bytes) and may have to leave gaps: the peak is what no plan of these
buffers can undercut. For int8 files of SqueezeNet, MobileNetV2 and a small V3 the arena is exactly the peak; for a
small EfficientNet, whose SiLU and gates overlap in other ways, 19% more.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax import tree
from squeeze_jax.cost import call, program
from squeeze_jax.cost.program import Operation, Program, Value
from squeeze_jax.nn.conv import lowering

# What renames a buffer.
_RENAMES = {
    "bitcast_convert_type",
    "copy",
    "copy_p",
    "expand_dims",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reshape",
    "shard",
    "squeeze",
    "stop_gradient",
}

_AFFINE = {"add", "div", "mul", "neg", "sub"}
_CLAMP = {"clamp", "max", "min"}
_SUMS = {"conv_general_dilated", "dot_general", "reduce_sum", "reduce_window_sum"}
_POOLS = {"reduce_window", "reduce_window_max", "reduce_window_min"}

_ELEMENTWISE = _AFFINE | _CLAMP
_ELEMENTWISE |= {
    *("abs", "acos", "acosh", "add_any", "and", "asin", "asinh", "atan", "atan2"),
    *("atanh", "cbrt", "ceil", "convert_element_type", "cos", "cosh", "eq", "erf"),
    *("erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "ne", "nextafter"),
    *("not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh"),
    *("sqrt", "square", "tan", "tanh", "xor", *program.KERNELS),
}


class Memory(NamedTuple):
    """Peak memory of activations.

    Attributes:
      bytes: alive at the peak.
      operation: where it occurs first, such as "add"; "inputs" where the inputs alone are the most.
      layer: the layer of that operation.
      shapes: of the values alive there.
      by_layer: {layer: the most bytes alive during any of its operations}, in order of use.
    """

    bytes: int
    operation: str
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    by_layer: dict[str, int]


class Compiled(NamedTuple):
    """What XLA plans for a compiled function, bytes.

    Attributes:
      weights: of the arguments, those that are a module's variables or that `weight_argnums` names.
      inputs: the other arguments.
      outputs: results.
      temporary: between them.
    """

    weights: int
    inputs: int
    outputs: int
    temporary: int


class _Moment(NamedTuple):
    bytes: int
    operation: str
    layer: str
    shapes: tuple[tuple[int, ...], ...]


def peak(
    fn: Callable | nn.Module,
    *args,
    bits: int | None = 8,
    in_place: bool = False,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> Memory:
    """Finds the peak memory of activations of `fn(*args, **kwargs)` without running it.

    Args:
      fn: any function that JAX can trace; what it closes over are weights. Of a Linen or NNX module it is the forward
        pass to its result, or to the first of the results if they are a tuple, and its variables are weights.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; a batch of one is what a device runs. Arguments
        without any array are static. Of a module in training mode it is its forward pass, without its gradients.
      bits: of a floating-point activation, 1 to 64: 8 for int8, 32 for float32; None: those of its dtype, as integers
        have always.
      in_place: whether an elementwise operation (arithmetic, a comparison, a function such as tanh, `where`) writes its
        result over one of its inputs. It does if the input has as many bytes as the result, no later operation reads
        it, and it is no input of the function or of a loop's body. Convolutions, products, pooling, reductions,
        padding, concatenation and transposition never do.
      weight_argnums: positions of the arguments of a function that are weights and do not count.

    Raises:
      UserError: bits out of range, or arguments that do not fit the function.
    """
    if bits is not None:
        program.check_bits(bits, "bits")
    traced = program.trace(
        fn, *args, first=True, weight_argnums=weight_argnums, **kwargs
    )
    moments = _moments(traced, bits, in_place)
    top = max(moments, key=lambda m: m.bytes)  # the first of equals
    by_layer = {}
    for m in moments[1:]:
        by_layer[m.layer] = max(m.bytes, by_layer.get(m.layer, 0))
    return Memory(*top, by_layer)


def compiled(
    fn: Callable | nn.Module,
    *args,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> Compiled | None:
    """What XLA needs for `fn(*args, **kwargs)`, compiled for the default device in its own dtypes.

    Args as for `peak`. Takes as long as compiling does. XLA fuses more than TFLite and may compute in another order,
    but also transposes and packs for its kernels: neither number bounds the other. If no argument is an array, what the
    function closes over become its weights, or XLA would compute the result while it compiles.

    Returns:
      Its plan; None where the backend tells none.

    Raises:
      UserError: arguments that do not fit the function, or a function of no arrays at all.
    """
    weights, run, args = call.measured(fn, args, kwargs, weight_argnums)
    abstract = jax.eval_shape(lambda a: a, args)
    with lowering("native"):
        built = jax.jit(run, keep_unused=True).lower(weights, abstract).compile()
    plan = built.memory_analysis()
    if plan is None:
        return None
    return Compiled(
        tree.nbytes(weights),
        plan.argument_size_in_bytes - tree.nbytes(weights),
        plan.output_size_in_bytes,
        plan.temp_size_in_bytes,
    )


def _moments(body: Program, bits, in_place) -> list[_Moment]:
    """The bytes alive before the first operation and during each one."""
    operations = _needed(body)
    original = _originals(operations, body.outputs)

    def own(v):
        return original.get(v, v)

    last = {own(v): i for i, op in enumerate(operations) for v in op.inputs}
    last |= {own(v): len(operations) for v in body.outputs}
    alive = {v: v.nbytes(bits) for v in body.inputs}
    joins = {}  # value: what may join the operation that made it
    moments = [_Moment(sum(alive.values()), "inputs", "", _shapes(alive))]
    for i, op in enumerate(operations):
        outputs = [v for v in op.outputs if v not in original]
        read = {own(v) for v in op.inputs if v.weights is None}
        dying = {v for v in read if last[v] == i and v in alive}
        if outputs:
            target = _joined(op, read, dying, joins)
            if target is None and in_place and op.name in _ELEMENTWISE:
                spare = dying - set(body.inputs)
                same = (v for v in spare if alive[v] == outputs[0].nbytes(bits))
                target = next(same, None)
            made = {v: v.nbytes(bits) for v in outputs}
            if target is not None:
                del alive[target]
                moments.append(_moment(op, alive | made))
            else:
                moments += _during(op, alive, dying, made, bits, in_place)
            alive |= made
            for v in outputs:
                joins[v] = _may_join(op, target, joins)
        for v in [v for v in alive if last.get(v, -1) <= i]:
            del alive[v]
    return moments


def _needed(body: Program) -> list[Operation]:
    """The operations that results depend on and that work on activations."""
    wanted, kept = set(body.outputs), []
    for op in reversed(body.operations):
        activation = any(v.weights is None for v in op.outputs)
        if activation and not wanted.isdisjoint(op.outputs):
            kept.append(op)
            wanted.update(op.inputs)
    return kept[::-1]


def _originals(operations: list[Operation], outputs: list[Value]) -> dict[Value, Value]:
    """{value: the value whose buffer it is another name for}."""
    whole = set(outputs)  # whose readers want all elements in memory
    for op in reversed(operations):
        passes = op.name in _RENAMES | {"broadcast_in_dim"}
        if op.name not in _ELEMENTWISE and not (
            passes and whole.isdisjoint(op.outputs)
        ):
            whole.update(op.inputs)
    original = {}
    for op in operations:
        if _renames(op, whole):
            for source, v in zip(op.inputs, op.outputs, strict=False):
                original[v] = original.get(source, source)
    return original


def _renames(op: Operation, whole: set[Value]) -> bool:
    if op.inputs and op.inputs[0].weights is not None:
        return False
    if op.name == "broadcast_in_dim":
        grows = math.prod(op.outputs[0].shape) > math.prod(op.inputs[0].shape)
        return not grows or op.outputs[0] not in whole
    if op.name == "convert_element_type":
        kinds = [v.dtype for v in (*op.inputs, *op.outputs)]
        return all(jnp.issubdtype(kind, jnp.floating) for kind in kinds)
    if op.name == "transpose":  # only axes of one position move
        shape, order = op.inputs[0].shape, op.params["permutation"]
        long = [axis for axis in order if shape[axis] > 1]
        return long == sorted(long)
    return op.name in _RENAMES


def _joined(op: Operation, read: set, dying: set, joins: dict) -> Value | None:
    """The value whose operation this one joins."""
    if len(read) != 1 or read != dying:
        return None
    (v,) = read
    if op.name == "div" and op.inputs[0].weights is not None:
        return None  # a weight divided by it is not linear in it
    same = math.prod(v.shape) == math.prod(op.outputs[0].shape)
    return v if same and op.name in joins.get(v, ()) else None


def _may_join(op: Operation, target: Value | None, joins: dict) -> set[str]:
    """Names of the operations that may join that of its result."""
    if op.name in _SUMS:
        return _AFFINE | _CLAMP
    if target in joins and op.name in _AFFINE:
        return joins[target]
    return _CLAMP if op.name in _AFFINE | _CLAMP | _POOLS else set()


def _during(op: Operation, alive, dying, made, bits, in_place) -> list[_Moment]:
    """The moments of an operation with buffers of its own."""
    if op.bodies:
        return _turns(op, alive, dying, made, bits, in_place)
    padded = _padded(op)
    if padded is None:
        return [_moment(op, alive | made)]
    copy = {padded: padded.nbytes(bits)}
    rest = {v: n for v, n in alive.items() if v not in dying}
    return [_moment(op, alive | copy), _moment(op, rest | copy | made)]


def _turns(op: Operation, alive, dying, made, bits, in_place) -> list[_Moment]:
    outside, results = dict(alive), {}
    if op.name == "scan":
        first, carries = program.scanned(op.params)
        start = op.inputs[first : first + carries]
        results = {v: made[v] for v in op.outputs[carries:] if v in made}
    else:
        start = op.inputs if op.name == "while" else ()
    if op.name in ("scan", "while"):  # the turn's own carry stands for what began it
        for v in dying.intersection(start):
            # What the turns read from outside as well stays.
            if v not in _outside(op.bodies):
                del outside[v]
    outside |= results
    base, shapes = sum(outside.values()), _shapes(outside)
    moments = [_moment(op, outside | made)]
    for inner in op.bodies:
        moments += [
            m._replace(bytes=m.bytes + base, shapes=shapes + m.shapes)
            for m in _moments(inner, bits, in_place)[1:]  # after the turn's inputs
        ]
    return moments


def _outside(bodies) -> set[Value]:
    """What bodies read that they neither make nor are given anew."""
    read, made = set(), set()
    for inner in bodies:
        made.update(inner.inputs)
        for op in inner.operations:
            read |= {*op.inputs, *_outside(op.bodies)}
            made.update(op.outputs)
    return read - made


def _padded(op: Operation) -> Value | None:
    """The padded copy of its input that TFLite makes for an operation."""
    p = op.params
    if op.name == "conv_general_dilated":
        if math.prod(p["lhs_dilation"]) > 1:  # transposed: cuts its output instead
            return None
        spec, kernel = p["dimension_numbers"], op.inputs[1].shape
        axes = spec.lhs_spec[2:]
        window = [kernel[i] for i in spec.rhs_spec[2:]]
        dilation = p["rhs_dilation"]
    elif op.name in _POOLS | {"reduce_window_sum"}:
        axes = range(len(op.inputs[0].shape))
        window, dilation = p["window_dimensions"], p["window_dilation"]
    else:
        return None
    v, pads = op.inputs[0], [tuple(pair) for pair in p["padding"]]
    size = [v.shape[axis] for axis in axes]
    extent = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    same = lax.padtype_to_pads(size, extent, p["window_strides"], "SAME")
    if not any(map(any, pads)) or pads == list(map(tuple, same)):
        return None
    shape = list(v.shape)
    for axis, pair in zip(axes, pads, strict=True):
        shape[axis] += sum(pair)
    return Value(tuple(shape), v.dtype)


def _moment(op: Operation, alive: dict[Value, int]) -> _Moment:
    return _Moment(sum(alive.values()), op.name, op.layer, _shapes(alive))


def _shapes(alive) -> tuple[tuple[int, ...], ...]:
    return tuple(v.shape for v in alive)
