"""Peak memory of activations at inference: the most bytes that are live at any one time.

While an operation runs, memory holds its inputs, its outputs and every value that a later operation reads. The peak is
the largest such sum over the operations, in the order in which the function runs them. It decides whether a network
fits a microcontroller, whose runtime places all activations in one arena. Weights do not count: they are read from flash.

The count follows TFLite files and the memory planner of TFLite Micro:
  * A fused operation needs no buffer. Bias, batch normalisation and other arithmetic with weights fuse into the
    convolution, matrix product or sum over elements whose result only they read, if they keep its size. ReLU and ReLU6
    fuse into any arithmetic or pooling operation.
  * Any other operation writes a new buffer, and so does an addition of two activations. With `in_place=True` an
    elementwise operation overwrites an input of the same size that no later operation reads, as LiteRT and XLA do where
    they can.
  * Reshapes and conversions between floating-point dtypes share the buffer of their input. So do broadcasts that only
    elementwise operations read.
  * A convolution or pooling whose padding is neither zero nor "SAME" reads a padded copy of its input, because TFLite
    has no other padding.
  * A hard swish is one operation. Other functions count as the several operations that they consist of; for GELU this is
    more than a runtime with a GELU kernel needs.
  * Inputs are live until their last use and results until the end. Operations that no result depends on do not run.
  * The inputs of `jax.shard_map` count as whole arrays; the values inside it and its results count as one device's part.
  * A loop holds its stacked inputs and results and what one iteration needs. A conditional holds what its largest branch
    needs.

A planner rounds buffers up (TFLite Micro to 16 bytes) and may have to leave gaps between them, so no plan of these
buffers needs less than the peak. For int8 files of SqueezeNet, MobileNetV2 and a small MobileNetV3 the arena equals the
peak exactly. For a small EfficientNet, where the buffers of SiLU and of the gates overlap in other ways, the arena is 19%
larger.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax import tree
from squeeze_jax.cost import call, program
from squeeze_jax.cost.program import Operation, Program, Value
from squeeze_jax.nn.conv import lowering

# Primitives whose result shares the buffer of their input.
_ALIASES = {
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
    """The memory of activations at its peak, the moment of a forward pass at which most bytes are live.

    Attributes:
      bytes: number of bytes that are live at the peak.
      operation: name of the operation that runs at the peak, such as "add"; the first one if several need as much. "inputs"
        if no operation needs more than the inputs alone.
      layer: path of that operation's layer, such as "fire2/squeeze1x1"; "" outside all layers.
      shapes: shapes of the values that are live at the peak.
      by_layer: {layer: the most bytes that are live during any of its operations}, in order of use.
    """

    bytes: int
    operation: str
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    by_layer: dict[str, int]


class Compiled(NamedTuple):
    """The memory in bytes that XLA plans for a compiled function.

    Attributes:
      weights: bytes of a module's variables, of the arguments that `weight_argnums` names, or of the arrays that a function
        without array arguments closes over.
      inputs: bytes of the other arguments.
      outputs: bytes of the results.
      temporary: bytes of the buffers that hold intermediate values.
    """

    weights: int
    inputs: int
    outputs: int
    temporary: int


class _Snapshot(NamedTuple):
    """The memory in use at one point of a run; fields as in `Memory`."""

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
    """Returns the peak memory of activations of `fn(*args, **kwargs)`, which is traced but not run.

    The rules by which values count are at the top of this file. Weights do not count.

    Args:
      fn: a Linen or NNX module, or any function that JAX can trace. Of a module, one forward pass counts, with train=True
        too, but no gradients; its variables are weights. If it returns a tuple, only the first element is computed. Arrays
        that a function closes over are weights.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; a batch of one is what a device runs. Arguments
        without any array are static.
      bits: bits of a floating-point activation, 1 to 64, such as 8 for int8 or 32 for float32. None takes the size of
        each activation's dtype. Integers always have the size of their dtype.
      in_place: whether an elementwise operation (arithmetic, a comparison, a function such as tanh, `where`) overwrites
        one of its inputs with its result. It does so if the input has as many bytes as the result, no later operation
        reads the input, and the input is not an input of the function or of a loop's body. Convolutions, matrix
        products, pooling, reductions, padding, concatenation and transposition never overwrite an input.
      weight_argnums: positions of a function's arguments that are weights and do not count.

    Raises:
      UserError: bits out of range, or arguments that do not fit the function.
    """
    if bits is not None:
        program.check_bits(bits, "bits")
    traced = program.trace(
        fn, *args, first_output=True, weight_argnums=weight_argnums, **kwargs
    )
    snapshots = _snapshots(traced, bits, in_place)
    highest = max(snapshots, key=lambda s: s.bytes)  # the first of equals
    by_layer = {}
    for snapshot in snapshots[1:]:
        layer_peak = by_layer.get(snapshot.layer, 0)
        by_layer[snapshot.layer] = max(snapshot.bytes, layer_peak)
    return Memory(*highest, by_layer)


def compiled(
    fn: Callable | nn.Module,
    *args,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> Compiled | None:
    """Compiles `fn(*args, **kwargs)` for the default device and returns the memory that XLA plans for it.

    Values have their own dtypes. Convolutions of `nn/conv.py` are compiled with the lowering "native"; on a CPU `jax.jit(fn)`
    may use other lowerings and need other memory. Neither this number nor `peak` bounds the other: XLA fuses more than TFLite
    and may compute in another order, but it also transposes and packs arrays for its kernels. If no argument is an array, the
    arrays that the function closes over become arguments, because XLA would otherwise compute the result during compilation.

    Args:
      fn, *args, weight_argnums, **kwargs: as for `peak`. But arrays that a function closes over count as weights only if no
        argument is an array and `weight_argnums` is empty.

    Returns:
      The plan, or None if the backend reports none.

    Raises:
      UserError: arguments that do not fit the function, or a function that neither takes nor closes over any array.
    """
    weights, run, args = call.split_for_compilation(fn, args, kwargs, weight_argnums)
    abstract = jax.eval_shape(lambda a: a, args)
    with lowering("native"):
        executable = jax.jit(run, keep_unused=True).lower(weights, abstract).compile()
    plan = executable.memory_analysis()
    if plan is None:
        return None
    return Compiled(
        tree.nbytes(weights),
        plan.argument_size_in_bytes - tree.nbytes(weights),
        plan.output_size_in_bytes,
        plan.temp_size_in_bytes,
    )


def _snapshots(body: Program, bits: int | None, in_place: bool) -> list[_Snapshot]:
    """Returns the memory in use before the first operation of a program and during each operation, in order.

    The live buffers are followed from operation to operation. If an operation fuses or works in place, its output takes over
    the buffer of its input; otherwise its outputs get new buffers. After each operation the buffers that no later operation
    reads are freed.

    The first snapshot holds the program's inputs. Operations whose outputs only share a buffer have no snapshot. Loops,
    conditionals and operations that need a padded copy have several.

    Args:
      body: a function's program, or the body of a loop or conditional. Memory outside the body is not included.
      bits, in_place: as for `peak`.
    """
    operations = _needed_operations(body)
    owners = _buffer_owners(operations, body.outputs)

    def owner(v):
        return owners.get(v, v)

    last_use = {owner(v): i for i, op in enumerate(operations) for v in op.inputs}
    last_use |= {owner(v): len(operations) for v in body.outputs}
    live_bytes = {v: v.nbytes(bits) for v in body.inputs}
    fusable = {}  # value: names of the operations that may fuse into its producer
    snapshots = [_Snapshot(sum(live_bytes.values()), "inputs", "", _shapes(live_bytes))]
    for i, op in enumerate(operations):
        outputs = [v for v in op.outputs if v not in owners]
        read = {owner(v) for v in op.inputs if v.weights is None}
        dying = {v for v in read if last_use[v] == i and v in live_bytes}
        if outputs:
            replaced = _fusion_target(op, read, dying, fusable)
            if replaced is None and in_place and op.name in _ELEMENTWISE:
                size = outputs[0].nbytes(bits)
                candidates = dying - set(body.inputs)
                same_size = (v for v in candidates if live_bytes[v] == size)
                replaced = next(same_size, None)
            output_bytes = {v: v.nbytes(bits) for v in outputs}
            if replaced is not None:
                del live_bytes[replaced]
                snapshots.append(_snapshot(op, live_bytes | output_bytes))
            else:
                snapshots += _operation_snapshots(
                    op, live_bytes, dying, output_bytes, bits, in_place
                )
            live_bytes |= output_bytes
            for v in outputs:
                fusable[v] = _fusable_operations(op, replaced, fusable)
        for v in [v for v in live_bytes if last_use.get(v, -1) <= i]:
            del live_bytes[v]
    return snapshots


def _needed_operations(body: Program) -> list[Operation]:
    """Returns the operations, in order, that compute activations and that a result of the program depends on."""
    needed_values, needed_operations = set(body.outputs), []
    for op in reversed(body.operations):
        is_activation = any(v.weights is None for v in op.outputs)
        if is_activation and not needed_values.isdisjoint(op.outputs):
            needed_operations.append(op)
            needed_values.update(op.inputs)
    return needed_operations[::-1]


def _buffer_owners(
    operations: list[Operation], outputs: list[Value]
) -> dict[Value, Value]:
    """Returns {value: other value}, where the value shares the buffer of the other; values that share none are not keys.

    A value is materialized if some reader needs all its elements in memory. Elementwise operations do not need this; all other
    operations and the caller of the program do. A reshape or broadcast needs its input materialized only if its output is.
    """
    materialized = set(outputs)
    for op in reversed(operations):
        may_alias = op.name in _ALIASES | {"broadcast_in_dim"}
        if op.name not in _ELEMENTWISE and not (
            may_alias and materialized.isdisjoint(op.outputs)
        ):
            materialized.update(op.inputs)
    owners = {}
    for op in operations:
        if _shares_buffer(op, materialized):
            for source, v in zip(op.inputs, op.outputs, strict=False):
                owners[v] = owners.get(source, source)
    return owners


def _shares_buffer(op: Operation, materialized: set[Value]) -> bool:
    """Returns whether an operation's outputs share the buffers of its inputs.

    These operations do: reshapes and other members of `_ALIASES`, conversions between floating-point dtypes, transpositions
    that move only axes of length 1, and broadcasts that repeat nothing or whose output need not be materialized. No
    operation shares the buffer of a weight.
    """
    if op.inputs and op.inputs[0].weights is not None:
        return False
    if op.name == "broadcast_in_dim":
        grows = math.prod(op.outputs[0].shape) > math.prod(op.inputs[0].shape)
        return not grows or op.outputs[0] not in materialized
    if op.name == "convert_element_type":
        dtypes = [v.dtype for v in (*op.inputs, *op.outputs)]
        return all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    if op.name == "transpose":
        shape, order = op.inputs[0].shape, op.params["permutation"]
        long_axes = [axis for axis in order if shape[axis] > 1]
        return long_axes == sorted(long_axes)
    return op.name in _ALIASES


def _fusion_target(op: Operation, read: set, dying: set, fusable: dict) -> Value | None:
    """Returns the input whose operation computes this operation too, without a buffer between; None if none does.

    The operation fuses if that value is the only activation it reads, no later operation reads the value, the output has as
    many elements, and the producer lets this operation fuse. A division of a weight by the value does not fuse.

    Args:
      op: the operation.
      read: the activations that it reads.
      dying: the activations that it is the last to read.
      fusable: {value: names of the operations that may fuse into its producer}.
    """
    if len(read) != 1 or read != dying:
        return None
    (v,) = read
    if op.name == "div" and op.inputs[0].weights is not None:
        return None  # a weight divided by the value is not linear in the value
    same_size = math.prod(v.shape) == math.prod(op.outputs[0].shape)
    return v if same_size and op.name in fusable.get(v, ()) else None


def _fusable_operations(
    op: Operation, replaced: Value | None, fusable: dict
) -> set[str]:
    """Returns the names of the operations that may fuse into an operation.

    Affine arithmetic and clamps (ReLU, ReLU6) may fuse into a convolution, matrix product or sum. If affine arithmetic takes
    over the buffer of an earlier value, the same operations may fuse into it as into that value's producer. Into other
    affine arithmetic, clamps and pooling only clamps may fuse. Nothing fuses into any other operation.

    Args:
      op: the operation.
      replaced: the value whose buffer its output takes over, by fusion or in place; None if the output has a new buffer.
      fusable: {earlier value: names of the operations that may fuse into its producer}.
    """
    if op.name in _SUMS:
        return _AFFINE | _CLAMP
    if replaced in fusable and op.name in _AFFINE:
        return fusable[replaced]
    return _CLAMP if op.name in _AFFINE | _CLAMP | _POOLS else set()


def _operation_snapshots(
    op: Operation,
    live_bytes: dict[Value, int],
    dying: set[Value],
    output_bytes: dict[Value, int],
    bits: int | None,
    in_place: bool,
) -> list[_Snapshot]:
    """Returns the memory in use during an operation that writes new buffers.

    Usually this is one snapshot, with the live values and the outputs. An operation that reads a padded copy of its input
    has two: while the copy is written, and while the outputs are computed from the copy, after dying inputs are freed.
    For loops and conditionals see `_control_flow_snapshots`.

    Args:
      op: the operation.
      live_bytes: {value: bytes} of the values that are live before it, its inputs included.
      dying: the live values that it is the last operation to read.
      output_bytes: {output: bytes}.
      bits, in_place: as for `peak`.
    """
    if op.bodies:
        return _control_flow_snapshots(
            op, live_bytes, dying, output_bytes, bits, in_place
        )
    padded = _padded_copy(op)
    if padded is None:
        return [_snapshot(op, live_bytes | output_bytes)]
    copy_bytes = {padded: padded.nbytes(bits)}
    staying = {v: n for v, n in live_bytes.items() if v not in dying}
    return [
        _snapshot(op, live_bytes | copy_bytes),
        _snapshot(op, staying | copy_bytes | output_bytes),
    ]


def _control_flow_snapshots(
    op: Operation,
    live_bytes: dict[Value, int],
    dying: set[Value],
    output_bytes: dict[Value, int],
    bits: int | None,
    in_place: bool,
) -> list[_Snapshot]:
    """Returns the memory in use during a loop or conditional: its own buffers, then those buffers and each body's.

    While a body runs, the values live before the operation and the stacked results of a scan stay in memory. The initial
    carry of a loop does not stay if nothing else reads it: the body's own carry takes its place.

    Args:
      As for `_operation_snapshots`.
    """
    outside_bytes, stacked_bytes = dict(live_bytes), {}
    if op.name == "scan":
        first, carries = program.scan_input_counts(op.params)
        initial_carry = op.inputs[first : first + carries]
        stacked_bytes = {
            v: output_bytes[v] for v in op.outputs[carries:] if v in output_bytes
        }
    else:
        initial_carry = op.inputs if op.name == "while" else ()
    if op.name in ("scan", "while"):
        for v in dying.intersection(initial_carry):
            if v not in _captured_values(op.bodies):  # an iteration may read it again
                del outside_bytes[v]
    outside_bytes |= stacked_bytes
    base, shapes = sum(outside_bytes.values()), _shapes(outside_bytes)
    snapshots = [_snapshot(op, outside_bytes | output_bytes)]
    for inner in op.bodies:
        snapshots += [
            s._replace(bytes=s.bytes + base, shapes=shapes + s.shapes)
            for s in _snapshots(inner, bits, in_place)[1:]  # without "inputs"
        ]
    return snapshots


def _captured_values(bodies: Iterable[Program]) -> set[Value]:
    """Returns the values from outside that bodies of loops or conditionals read, but neither take as inputs nor compute."""
    read, own = set(), set()
    for inner in bodies:
        own.update(inner.inputs)
        for op in inner.operations:
            read |= {*op.inputs, *_captured_values(op.bodies)}
            own.update(op.outputs)
    return read - own


def _padded_copy(op: Operation) -> Value | None:
    """Returns the padded copy of its input that TFLite makes before a convolution or pooling operation.

    None for every other operation, for padding that is zero or equal to "SAME", and for transposed convolutions, where
    TFLite crops the output instead.
    """
    p = op.params
    if op.name == "conv_general_dilated":
        if math.prod(p["lhs_dilation"]) > 1:  # a transposed convolution
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


def _snapshot(op: Operation, live_bytes: dict[Value, int]) -> _Snapshot:
    """Returns the snapshot of an operation during which these values are live."""
    return _Snapshot(sum(live_bytes.values()), op.name, op.layer, _shapes(live_bytes))


def _shapes(values: Iterable[Value]) -> tuple[tuple[int, ...], ...]:
    """Returns the shape of each value."""
    return tuple(v.shape for v in values)
