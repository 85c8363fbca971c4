"""Bytes on the wire: what each device sends in one call of a function, by collective and dtype.

Two numbers describe a collective among n devices. The payload, which no algorithm changes, is the size of the array that
the collective works on. The bytes sent are counted for ring algorithms; for large arrays no algorithm sends fewer
(Patarasuk and Yuan 2009, JPDC 69):

    collective        payload                                 bytes that each device sends
    all-reduce        the array                               2 (n - 1) / n · payload
    all-gather        the gathered array                      (n - 1) / n · payload
    reduce-scatter    the array before the scatter            (n - 1) / n · payload
    all-to-all        the array of one device                 (n - 1) / n · payload
    permute           the array of one device                 payload
    broadcast         the array                               (n - 1) / n · payload, the mean over the devices

`wire` reads the collectives that a function calls inside `jax.shard_map`. `compiled_wire` reads the collectives of a
compiled program, which include those that the compiler inserts for `NamedSharding`s. The compiler may also merge, widen
or drop collectives: XLA's CPU compiler reduces bfloat16 in float32.

Loops count each iteration, a conditional its costliest branch. What cannot be counted is named in `Wire.unknown`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from squeeze_jax.cost import call, hlo, program
from squeeze_jax.cost.program import Operation

# Primitives, without the "_start" of asynchronous ones. Primitives that change replication (pvary, pcast) send nothing.
_KINDS = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "permute",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "unreduced_psum": "all-reduce",
    "unreduced_reduce_scatter": "reduce-scatter",
}
_UNKNOWN = {"precv", "psend", "ragged_all_to_all"}

# Operations of a compiled program, without the "-start" of asynchronous ones.
_COMPILED = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-broadcast": "broadcast",
    "collective-permute": "permute",
    "reduce-scatter": "reduce-scatter",
}
_COMPILED_UNKNOWN = {"ragged-all-to-all", "recv", "send"}

_DTYPES = {"pred": "bool", "bf": "bfloat", "c": "complex", "f": "float", "s": "int"}
_DTYPES |= {"u": "uint"}
_BRANCHES = re.compile(r"(?:branch|true|false)_computations?=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Wire(NamedTuple):
    """The traffic of one call, as one device sees it. Keys are (collective, dtype), such as ("all-gather", "int8").

    Attributes:
      sent: bytes that each device sends with ring algorithms.
      payload: bytes of the arrays that the collectives work on.
      unknown: descriptions of what was not counted.
    """

    sent: dict[tuple[str, str], float]
    payload: dict[tuple[str, str], int]
    unknown: tuple[str, ...]

    @property
    def total(self) -> float:
        """Bytes that each device sends."""
        return sum(self.sent.values())

    def by_kind(self) -> dict[str, float]:
        """Returns {collective: bytes that each device sends}."""
        return _sum_by_key((kind, sent) for (kind, _), sent in self.sent.items())

    def by_dtype(self) -> dict[str, float]:
        """Returns {dtype: bytes that each device sends}."""
        return _sum_by_key((dtype, sent) for (_, dtype), sent in self.sent.items())


class _CollectiveArray(NamedTuple):
    """One array of a collective: its payload in bytes and the number of devices that take part."""

    kind: str
    dtype: str
    payload: int
    devices: int

    @property
    def sent(self) -> float:
        if self.kind == "permute":
            return float(self.payload)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (self.devices - 1) * self.payload / self.devices


def wire(fn: Callable, *args, **kwargs) -> Wire:
    """Counts the bytes that each device sends in `fn(*args, **kwargs)`, without running it.

    Args:
      fn: any function that JAX can trace. Collectives inside `jax.shard_map` count, on a mesh of real, simulated or
        abstract devices. The compiler inserts further collectives, which only `compiled_wire` counts.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s.
    """
    traced = program.trace(*call.bind_static(fn, args, kwargs))
    arrays, unknown = [], {}

    def cost(op):
        return sum(array.sent for array in _collective_arrays(op))

    for op, times, _ in program.executions(traced, cost):
        where = f"in {op.layer or 'the function itself'}"
        if op.name == "while" and any(_sends_bytes(body, cost) for body in op.bodies):
            unknown[f"while loop, counted as one iteration, {where}"] = None
        if _base_name(op) in _UNKNOWN:
            unknown[f"{op.name} {where}"] = None
        arrays += [(array, times) for array in _collective_arrays(op)]
    return _sum_traffic(arrays, unknown)


def compiled_wire(compiled) -> Wire:
    """Counts the bytes that each device sends in one run of a compiled program.

    Args:
      compiled: the result of `jax.jit(fn).lower(...).compile()`, or its text in XLA's format (HLO).
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    header = text.partition("\n")[0]
    devices = math.prod(
        int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    )
    computations = hlo.computations(text)
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)[1]
    unknown = {}
    arrays = list(_compiled_arrays(entry, computations, devices, unknown))
    return _sum_traffic(arrays, unknown)


def describe(traffic: Wire) -> str:
    """Returns one line, such as "wire 1.2 MB a step and device: all-gather int8 1.1 MB, all-reduce float32 92 kB"."""
    unknown = f"; not counted: {', '.join(traffic.unknown)}" if traffic.unknown else ""
    if not traffic.sent:
        return f"wire nothing is sent{unknown}"
    ranked = sorted(traffic.sent.items(), key=lambda item: -item[1])
    parts = [f"{kind} {dtype} {_size(sent)}" for (kind, dtype), sent in ranked]
    whole = _size(traffic.total)
    return f"wire {whole} a step and device: {', '.join(parts)}{unknown}"


def _sum_traffic(arrays: list[tuple[_CollectiveArray, int]], unknown: Mapping) -> Wire:
    """Returns the traffic of (array, how often it is sent)."""
    sent = _sum_by_key(((a.kind, a.dtype), times * a.sent) for a, times in arrays)
    payload = _sum_by_key(((a.kind, a.dtype), times * a.payload) for a, times in arrays)
    return Wire(sent, payload, tuple(unknown))


def _sum_by_key(items) -> dict:
    sums = {}
    for key, value in items:
        sums[key] = sums.get(key, 0) + value
    return sums


def _sends_bytes(body: program.Program, cost) -> bool:
    return any(sent for _, _, sent in program.executions(body, cost))


def _base_name(op: Operation) -> str:
    return op.name.removesuffix("_start")


def _collective_arrays(op: Operation) -> list[_CollectiveArray]:
    """Returns the arrays that an operation sends; none if it is not a collective or runs on one device."""
    name = _base_name(op)
    # In some versions of JAX `pbroadcast` only changes replication; it then has no source.
    kind = "broadcast" if name == "pbroadcast" and "source" in op.params else None
    kind = _KINDS.get(name, kind)
    if kind is None:
        return []
    devices = _group_size(op)
    if devices == 1 or (
        kind == "permute" and all(a == b for a, b in op.params["perm"])
    ):
        return []
    gathered = devices if kind == "all-gather" else 1
    return [
        _CollectiveArray(kind, str(v.dtype), gathered * _nbytes(v), devices)
        for v in op.inputs
        if v.dtype is not None
    ]


def _group_size(op: Operation) -> int:
    """Returns the number of devices that take part in a collective."""
    if groups := op.params.get("axis_index_groups"):
        return len(groups[0])
    names = op.params.get("axes", op.params.get("axis_name"))
    names = names if isinstance(names, tuple | list | frozenset) else (names,)
    # Integers are axes of the array, which each device reduces by itself.
    return math.prod(op.axes[name] for name in names if not isinstance(name, int))


def _nbytes(v: program.Value) -> int:
    """Returns the bytes of an array; numbers with fewer than 8 bits are packed."""
    for kind, info in (jnp.integer, jnp.iinfo), (jnp.floating, jnp.finfo):
        if jnp.issubdtype(v.dtype, kind):
            return -(-math.prod(v.shape) * info(v.dtype).bits // 8)
    return math.prod(v.shape) * v.dtype.itemsize


def _compiled_arrays(
    name: str, computations: Mapping, devices: int, unknown: dict, times: int = 1
) -> Iterator[tuple[_CollectiveArray, int]]:
    """Yields (array, how often it is sent) for the collectives of a computation and of the computations that it runs."""
    instructions = computations.get(name, {})
    for instruction in instructions.values():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in _COMPILED_UNKNOWN:
            unknown[opcode] = None
        elif opcode in _COMPILED:
            for array in _instruction_arrays(
                _COMPILED[opcode], instruction, instructions, devices, unknown
            ):
                yield array, times
        elif opcode == "while":
            body, trips = re.search(r"body=%?([\w.-]+)", instruction.attributes)[1], 1
            if known := _TRIPS.search(instruction.attributes):
                trips = int(known[1])
            arrays = list(
                _compiled_arrays(body, computations, devices, unknown, times * trips)
            )
            if arrays and not known:
                unknown["while loop, counted as one iteration"] = None
            yield from arrays
        elif opcode == "conditional":
            names = " ".join(_BRANCHES.findall(instruction.attributes))
            branches = [
                list(_compiled_arrays(n, computations, devices, unknown, times))
                for n in re.findall(r"[\w.-]+", names)
            ]
            yield from max(
                branches, key=lambda arrays: sum(n * a.sent for a, n in arrays)
            )
        elif called := _called_computation(instruction):
            yield from _compiled_arrays(called, computations, devices, unknown, times)


def _called_computation(instruction) -> str | None:
    """Returns the computation that an instruction runs, except the function that a reduction applies; None if none."""
    if instruction.opcode == "call":
        return re.search(r"to_apply=%?([\w.-]+)", instruction.attributes)[1]
    return instruction.calls


def _instruction_arrays(
    kind, instruction, instructions, devices, unknown
) -> Iterator[_CollectiveArray]:
    """Yields the arrays that an instruction sends."""
    pairs = re.search(
        r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes
    )
    if kind == "permute":
        moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else "")
        group = devices if any(a != b for a, b in moved) else 1
    else:
        group = _compiled_group_size(instruction.attributes, devices)
    if group is None:
        unknown[f"{instruction.opcode} among unknown devices"] = None
        return
    gathered = group if kind == "all-gather" else 1
    for name in instruction.operands:
        for dtype, bits in _typed_sizes(
            instructions[name].type if name in instructions else ""
        ):
            if group > 1:
                yield _CollectiveArray(kind, dtype, gathered * -(-bits // 8), group)


def _compiled_group_size(attributes: str, devices: int) -> int | None:
    """Returns the number of devices that take part in a collective; None for any notation other than these.

    replica_groups={{0,1},{2,3}}                         lists; {} is all devices
    replica_groups=[2,4]<=[8]                            2 groups of 4
    replica_groups=mesh['x'=2,'y'=4] {'y'}               a mesh's axes, or parts of them: 'y':(1)2
    """
    if lists := re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", attributes):
        return len(lists[1].split(",")) if lists[1] else devices
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(shape[1])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes
    ):
        sizes = {n: int(size) for n, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[n] for n, part in axes)
    return None if "replica_groups=" in attributes else devices


def _typed_sizes(text: str) -> Iterator[tuple[str, int]]:
    """Yields (dtype, bits) of each array in a type such as `(f32[8,16]{1,0}, s8[4]{0})`."""
    for name, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        letters, bits, suffix = re.fullmatch(r"([a-z]+)(\d*)(\w*)", name).groups()
        dtype = _DTYPES.get(letters, letters) + bits + (f"_{suffix}" if suffix else "")
        size = math.prod(int(n) for n in shape.split(",") if n)
        yield dtype, size * int(bits or 8)


def _size(value: float) -> str:
    """Formats bytes with three significant digits, in units of powers of 1000."""
    value, units = float(f"{value:.3g}"), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = float(f"{value / 1000:.3g}"), units[1:]
    return f"{value:g} {units[0]}"
