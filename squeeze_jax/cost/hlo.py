"""Parses a compiled program's text (HLO) to find the layer that each operation belongs to.

XLA names every operation after the place where it was traced, as in `jit(f)/Net/fire2/expand3x3/conv_general_dilated`, and
weights after their position in the arguments. A fusion carries the name of its last operation, which may be an activation
in the layer around a convolution; here the fusion belongs to the layer with most of its arithmetic. An operation without a
name, such as one that the compiler rewrote, belongs to the layer of the weight that it reads.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# Name of the compiled function's argument that holds the weights.
VARIABLES = "variables"

_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_CONTAINERS = {"while", "conditional", "call"}
_PRODUCTS = {"convolution", "dot", "custom-call"}
# Instructions without arithmetic: they place, copy or rename data.
_MOVES = {
    "bitcast",
    "bitcast-convert",
    "broadcast",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "get-tuple-element",
    "iota",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "select",
    "slice",
    "transpose",
    "tuple",
}
# Instructions that run nothing: they give memory another name.
_ALIASES = {"bitcast", "get-tuple-element", "tuple"}


class Operation(NamedTuple):
    """An operation of a compiled program.

    Attributes:
      layer: layer that the operation belongs to: "" for operations outside all modules of a plain function, None if
        unknown.
      container: whether other operations run inside it, as in a loop.
      inputs: names of the operations whose results it reads, so that they end before it begins.
    """

    layer: str | None = None
    container: bool = False
    inputs: tuple[str, ...] = ()


class Instruction(NamedTuple):
    """One instruction of a computation, as its line in the text gives it.

    Attributes:
      opcode: the instruction's kind, such as "convolution".
      elements: number of elements of its result, of the first array if the result is a tuple.
      operands: names of the instructions whose results it reads.
      op_name: name scope where JAX traced it, "" if the text has none.
      calls: name of the fused computation that it runs, None if it runs none.
      type: its result's type, such as "f32[8,16]{1,0}".
      attributes: the text after the operands.
    """

    opcode: str
    elements: int
    operands: list[str]
    op_name: str
    calls: str | None
    type: str
    attributes: str


def operations(
    text: str, layers: Iterable[str], root: str
) -> tuple[str, dict[str, Operation]]:
    """Parses the text that `compiled.as_text()` returns.

    Args:
      text: the program.
      layers: names of all layers, as `program.trace` gives them.
      root: name of the module, which the layer names omit; "" for a plain function.

    Returns:
      (program name, {operation name: operation}).
    """
    known = {""}
    for layer in layers:
        parts = layer.split("/")
        known |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    program = computations(text)
    parsed = {}
    for instructions in program.values():
        for name, instruction in instructions.items():
            layer = _instruction_layer(instruction, instructions, program, known, root)
            container = instruction.opcode in _CONTAINERS
            inputs = tuple(_operand_names(instruction, instructions))
            parsed[name] = Operation(layer, container, inputs)
    return re.match(r"HloModule ([\w.-]+)", text).group(1), parsed


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Parses a program's text into {computation: {instruction name: instruction}}."""
    parsed, current = {}, {}
    for line in text.splitlines():
        plain, _, metadata = line.partition(", metadata=")
        if match := _INSTRUCTION.match(plain):
            sizes = re.findall(r"\[([\d,]*)\]", match["type"])
            size = sizes[0].split(",") if sizes and sizes[0] else []
            op_name, calls = _OP_NAME.search(metadata), _CALLS.search(plain)
            current[match["name"]] = Instruction(
                match["opcode"],
                math.prod(map(int, size)),
                re.findall(r"%([\w.-]+)", match["operands"]),
                op_name[1] if op_name else "",
                calls[1] if calls else None,
                match["type"],
                f"{plain[match.end() :]} {metadata}",
            )
        elif match := _COMPUTATION.match(line):
            current = parsed.setdefault(match[1], {})
    return parsed


def _operand_names(
    instruction: Instruction, instructions: dict[str, Instruction]
) -> Iterator[str]:
    """Yields the names of the instructions whose results an instruction reads, skipping instructions that only rename memory.

    Args:
      instruction: the instruction.
      instructions: {name: instruction} of the computation around it.
    """
    for name in instruction.operands:
        if name in instructions and instructions[name].opcode in _ALIASES:
            yield from _operand_names(instructions[name], instructions)
        else:
            yield name


def _instruction_layer(
    instruction: Instruction, instructions, program, known, root
) -> str | None:
    """Returns the layer of an instruction, None if it is unknown.

    A fusion belongs to the layer with most of its arithmetic, where products count 1000 times as much per element.

    Args:
      instruction: the instruction.
      instructions: {name: instruction} of the computation around it.
      program: {computation: {name: instruction}}.
      known: names of all layers and of the modules around them.
      root: as for `operations`.
    """

    def traced_layer(i):
        return _layer_of_name(i.op_name, known, root) if i.op_name else None

    work = collections.Counter()
    fused = program.get(instruction.calls, {})
    for step in fused.values():
        if step.opcode not in _MOVES and (layer := traced_layer(step)) is not None:
            sizes = [fused[name].elements for name in step.operands if name in fused]
            product = 1000 if step.opcode in _PRODUCTS else 1
            work[layer] += product * max([step.elements, *sizes])
    if work:
        most = max(work.values())
        last = traced_layer(instruction)  # breaks ties
        return last if work[last] == most else max(work, key=work.__getitem__)
    if instruction.op_name:
        return traced_layer(instruction)
    operands = [instructions[n] for n in instruction.operands if n in instructions]
    weights = [i for i in operands if i.op_name.startswith(f"{VARIABLES}[")]
    return traced_layer(weights[0]) if weights else None


def _layer_of_name(op_name: str, known: set[str], root: str) -> str | None:
    """Returns the layer in an operation's name, None if the name is outside the module `root`.

    It is fire2 for `jit(f)/Net/while/body/closed_call/fire2/add` and for `variables['params']['fire2']['kernel']`. The parts
    between layer names differ among versions of JAX, so parts that lead to no known layer are skipped.
    """
    if op_name.startswith(f"{VARIABLES}["):
        parts = re.findall(r"\['([^']+)'\]", op_name.replace("\\", ""))[1:-1]
        return _longest_known_path(parts, known) or root or None
    while (plain := re.sub(r"\w+\(([^()]*)\)", r"\1", op_name)) != op_name:
        op_name = plain
    parts = op_name.split("/")[:-1]  # the last one is the primitive
    if not parts or (root and root not in parts):
        return None
    start = parts.index(root) + 1 if root else 0
    return _longest_known_path(parts[start:], known) or root


def _longest_known_path(parts: Sequence[str], known: set[str]) -> str:
    """Returns the longest known layer path from these parts in order, skipping parts that do not extend it."""
    path = ""
    for part in parts:
        longer = f"{path}/{part}" if path else part
        path = longer if longer in known else path
    return path
