"""Which operator of a LiteRT file an operator of its delegate XNNPACK is.

LiteRT hands a graph over in parts: it goes through the operators again and again, and gathers all that are of one side,
the delegate's or its own, and whose inputs are there, before it turns to the other side. So the delegate's operators need
not be in the file's order, and are put in the order of the parts first. In a part, products (convolutions, fully
connected layers, matrix products) are the file's one by one, if they are as many and of the same kinds; what lies between
two of them is the file's of the same kind there.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# kinds of operators: their names in the file, and how XNNPACK's names of them begin
KINDS = {
    "convolution": (("CONV_2D", "DEPTHWISE_CONV_2D"), ("Convolution",)),
    "fully connected": (("FULLY_CONNECTED",), ("Fully Connected",)),
    "matrix product": (("BATCH_MATMUL",), ("Batch Matrix Multiply",)),
    "add": (("ADD",), ("Add",)),
    "subtract": (("SUB",), ("Subtract",)),
    "multiply": (("MUL",), ("Multiply",)),
    "pool": (("MAX_POOL_2D", "AVERAGE_POOL_2D"), ("Max Pool", "Average Pool")),
    "mean": (("MEAN", "SUM"), ("Mean", "Global Average Pool", "Sum", "Reduce")),
    "concatenate": (("CONCATENATION",), ("Concatenate", "Copy")),
    "pad": (("PAD", "PADV2"), ("Constant Pad",)),
    "swish": (("HARD_SWISH",), ("HardSwish", "Hard Swish", "Hardswish")),
    "sigmoid": (("LOGISTIC",), ("Sigmoid",)),
    "softmax": (("SOFTMAX",), ("Softmax",)),
    "quantize": (("QUANTIZE", "DEQUANTIZE"), ("Convert",)),
    "transpose": (("TRANSPOSE",), ("Transpose",)),
}
_BUILTIN = {name: kind for kind, (names, _) in KINDS.items() for name in names}
PRODUCTS = ("convolution", "fully connected", "matrix product")


class Node(NamedTuple):
    """An operator of a file.

    Attributes:
      kind: its name in the file's format, such as CONV_2D.
      layer: of the network, or None.
      inputs, outputs: numbers of tensors.
    """

    kind: str
    layer: str | None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def matched(
    ran: Sequence[tuple[str, int | None]], file: Sequence[Node]
) -> list[str | None]:
    """Returns the layers of operators that ran; None for those that are of no layer or not to be told.

    Args:
      ran: (name, index in the file or None for the delegate's) in the order they ran.
      file: the file's operators.
    """
    layers = [None if index is None else file[index].layer for _, index in ran]
    for at, nodes in _parts(ran, file):
        for i, layer in zip(at, _within([ran[i][0] for i in at], nodes), strict=True):
            layers[i] = layer
    return layers


def unmatched(ran: Sequence[tuple[str, int | None]], file: Sequence[Node]) -> int:
    """Counts the products of parts whose products are not the file's, see `matched`."""
    left = {i for i, (_, index) in enumerate(ran) if index is None}
    for at, nodes in _parts(ran, file):
        if _alike(_kinds([ran[i][0] for i in at]), _builtin(nodes)):
            left.difference_update(at)
    return sum(_kind(ran[i][0]) in PRODUCTS for i in left)


def _parts(ran, file) -> Iterator[tuple[list[int], list[Node]]]:
    """Yields for each part of the delegate's (places in `ran`, the file's operators); nothing if they do not correspond."""
    outside = {index for _, index in ran if index is not None}
    groups: list[list[int]] = [[]]
    for i, (_, index) in enumerate(ran):
        if index is None:
            groups[-1].append(i)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    parts = [part for mine, part in _schedule(file, outside) if mine]
    if len(groups) == len(parts):
        yield from zip(groups, parts, strict=True)


def _schedule(file, outside) -> Iterator[tuple[bool, list[Node]]]:
    """Yields the parts of a graph as LiteRT makes them: (whether it is the delegate's, its operators)."""
    waiting = list(range(len(file)))
    missing = {t for node in file for t in node.outputs}
    while waiting:
        part, mine, size = [], None, -1
        while len(part) > size:
            size = len(part)
            for i in list(waiting):
                ready = missing.isdisjoint(file[i].inputs)
                if ready and mine in (None, i not in outside):
                    mine = i not in outside
                    part.append(file[i])
                    waiting.remove(i)
                    missing.difference_update(file[i].outputs)
        if not part:  # a graph with a loop
            return
        yield bool(mine), part


def _within(names: Sequence[str], nodes: Sequence[Node]) -> list[str | None]:
    """The layers of a part's operators."""
    layers: list[str | None] = [None] * len(names)
    kinds, others = _kinds(names), _builtin(nodes)
    if not _alike(kinds, others):
        return layers
    for (at, between), (other, choices) in zip(
        _gaps(kinds), _gaps(others), strict=True
    ):
        if at is not None:
            layers[at] = nodes[other].layer
        left, last = list(choices), {}
        for i in between:
            same = [j for j in left if others[j] == kinds[i]]
            if same:
                last[kinds[i]] = nodes[same[0]].layer
                left = [j for j in left if j > same[0]]
            layers[i] = last.get(kinds[i])
    return layers


def _gaps(
    kinds: Sequence[str | None],
) -> Iterator[tuple[int | None, list[int]]]:
    """Yields (place of a product, places up to the next one); the first is of none."""
    at, between = None, []
    for i, kind in enumerate(kinds):
        if kind in PRODUCTS:
            yield at, between
            at, between = i, []
        elif kind:
            between.append(i)
    yield at, between


def _alike(ran: Sequence[str | None], file: Sequence[str | None]) -> bool:
    """Whether the products that ran may be the file's: XNNPACK makes a fully connected layer of a pointwise convolution."""
    ran, file = _products(ran), _products(file)
    return len(ran) == len(file) and all(
        a == b or (a, b) == ("fully connected", "convolution")
        for a, b in zip(ran, file, strict=True)
    )


def _products(kinds: Sequence[str | None]) -> list[str | None]:
    return [kind for kind in kinds if kind in PRODUCTS]


def _kinds(names: Sequence[str]) -> list[str | None]:
    """The kinds of XNNPACK's operators."""
    return list(map(_kind, names))


def _kind(name: str) -> str | None:
    return next((k for k, (_, begin) in KINDS.items() if name.startswith(begin)), None)


def _builtin(nodes: Sequence[Node]) -> list[str | None]:
    """The kinds of the file's operators."""
    return [_BUILTIN.get(node.kind) for node in nodes]
