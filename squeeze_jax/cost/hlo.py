"""A compiled program's text (HLO): which layer each of its operations belongs to.

XLA names every operation by where it was traced, as in `jit(f)/Net/fire2/expand3x3/conv_general_dilated`, and weights by
their place in the arguments. A fusion bears the name of its last step, which may be an activation in the layer around a
convolution; here it belongs to the layer with most of the arithmetic in it. An operation without a name, as some that
the compiler rewrote, belongs to the layer of the weight it reads.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

VARIABLES = "variables"  # of the compiled function: the argument with the weights

_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_CONTAINERS = {"while", "conditional", "call"}
_PRODUCTS = {"convolution", "dot", "custom-call"}
# What is no arithmetic: it places, copies or names.
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
# What runs as nothing of its own: another name for memory.
_NAMES = {"bitcast", "get-tuple-element", "tuple"}


class Operation(NamedTuple):
    """An operation of a compiled program.

    Attributes:
      layer: it belongs to, "" outside of all in a function that is no module; None where that is not known.
      container: others run inside it, as in a loop.
      inputs: names of operations that end before it begins.
    """

    layer: str | None = None
    container: bool = False
    inputs: tuple[str, ...] = ()


class _Instruction(NamedTuple):
    opcode: str
    elements: int
    operands: list[str]
    op_name: str
    calls: str | None
    type: str
    attributes: str  # what follows the operands


def operations(
    text: str, layers: Iterable[str], root: str
) -> tuple[str, dict[str, Operation]]:
    """Reads what `compiled.as_text()` returns.

    Args:
      text: the program.
      layers: names of all layers there are, as in `program.trace`.
      root: name of the module, which theirs leave out; "" for a function that is none.

    Returns:
      The program's name, and {operation's name: operation}.
    """
    known = {""}
    for layer in layers:
        parts = layer.split("/")
        known |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    computations = _read(text)
    found = {}
    for inside in computations.values():
        for name, each in inside.items():
            layer = _owner(each, inside, computations, known, root)
            container = each.opcode in _CONTAINERS
            found[name] = Operation(layer, container, tuple(_inputs(each, inside)))
    return re.match(r"HloModule ([\w.-]+)", text).group(1), found


def _read(text: str) -> dict[str, dict[str, _Instruction]]:
    """{computation: {name: instruction}}."""
    computations, current = {}, {}
    for line in text.splitlines():
        plain, _, metadata = line.partition(", metadata=")
        if match := _INSTRUCTION.match(plain):
            sizes = re.findall(r"\[([\d,]*)\]", match["type"])
            size = sizes[0].split(",") if sizes and sizes[0] else []
            op_name, calls = _OP_NAME.search(metadata), _CALLS.search(plain)
            current[match["name"]] = _Instruction(
                match["opcode"],
                math.prod(map(int, size)),
                re.findall(r"%([\w.-]+)", match["operands"]),
                op_name[1] if op_name else "",
                calls[1] if calls else None,
                match["type"],
                f"{plain[match.end() :]} {metadata}",
            )
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[1], {})
    return computations


def _inputs(each: _Instruction, inside: dict[str, _Instruction]) -> Iterator[str]:
    """The operations whose results it reads, by whatever name."""
    for name in each.operands:
        if name in inside and inside[name].opcode in _NAMES:
            yield from _inputs(inside[name], inside)
        else:
            yield name


def _owner(each: _Instruction, inside, computations, known, root) -> str | None:
    """The layer of an instruction."""

    def own(i):
        return _layer(i.op_name, known, root) if i.op_name else None

    work = collections.Counter()
    fused = computations.get(each.calls, {})
    for step in fused.values():
        if step.opcode not in _MOVES and (layer := own(step)) is not None:
            sizes = [fused[name].elements for name in step.operands if name in fused]
            product = 1000 if step.opcode in _PRODUCTS else 1
            work[layer] += product * max([step.elements, *sizes])
    if work:
        most = max(work.values())
        last = own(each)  # decides between equals
        return last if work[last] == most else max(work, key=work.__getitem__)
    if each.op_name:
        return own(each)
    read = [inside[name] for name in each.operands if name in inside]
    weights = [i for i in read if i.op_name.startswith(f"{VARIABLES}[")]
    return own(weights[0]) if weights else None


def _layer(op_name: str, known: set[str], root: str) -> str | None:
    """The layer in `jit(f)/Net/while/body/closed_call/fire2/add` or `variables['params']['fire2']['kernel']`: fire2.

    What lies between layers differs from one version of JAX to the next, so parts that lead to no known one are passed
    over.
    """
    if op_name.startswith(f"{VARIABLES}["):
        parts = re.findall(r"\['([^']+)'\]", op_name.replace("\\", ""))[1:-1]
        return _longest(parts, known) or root or None
    while (plain := re.sub(r"\w+\(([^()]*)\)", r"\1", op_name)) != op_name:
        op_name = plain
    parts = op_name.split("/")[:-1]  # the last one is the primitive
    if not parts or (root and root not in parts):
        return None
    start = parts.index(root) + 1 if root else 0
    return _longest(parts[start:], known) or root


def _longest(parts: Sequence[str], known: set[str]) -> str:
    path = ""
    for part in parts:
        longer = f"{path}/{part}" if path else part
        path = longer if longer in known else path
    return path
