"""Matches the operators that LiteRT's delegate XNNPACK ran with the operators of the file, to find their layers.

LiteRT passes a graph to the delegate in parts. It goes through the operators again and again, and collects all operators of
one side (the delegate's, or LiteRT's own) whose inputs are available, before it turns to the other side. So the delegate's
operators need not run in the order of the file; here they are first assigned to parts. Within a part, products
(convolutions, fully connected layers, matrix products) are matched with the file's products one by one, if both have the same
number and kinds. An operator between two products is matched with an operator of the same kind between these products in
the file.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# {kind of operator: (names in the file, prefixes of XNNPACK's names)}
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
      kind: name of the operator in the file's format, such as CONV_2D.
      layer: layer of the network that it belongs to, or None.
      inputs, outputs: indices of tensors.
    """

    kind: str
    layer: str | None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def match_layers(
    ran: Sequence[tuple[str, int | None]], file: Sequence[Node]
) -> list[str | None]:
    """Returns the layer of each operator that ran; None if it belongs to no layer or its layer is unknown.

    Args:
      ran: (name, index in the file, or None for an operator of the delegate), in the order in which they ran.
      file: the file's operators.
    """
    layers = [None if index is None else file[index].layer for _, index in ran]
    for positions, nodes in _parts(ran, file):
        part_layers = _match_part([ran[i][0] for i in positions], nodes)
        for i, layer in zip(positions, part_layers, strict=True):
            layers[i] = layer
    return layers


def count_unmatched_products(
    ran: Sequence[tuple[str, int | None]], file: Sequence[Node]
) -> int:
    """Counts the products of the delegate without a counterpart in the file.

    Args:
      ran, file: as for `match_layers`.
    """
    unmatched = {i for i, (_, index) in enumerate(ran) if index is None}
    for positions, nodes in _parts(ran, file):
        kinds = _xnnpack_kinds([ran[i][0] for i in positions])
        if _same_products(kinds, _file_kinds(nodes)):
            unmatched.difference_update(positions)
    return sum(_xnnpack_kind(ran[i][0]) in PRODUCTS for i in unmatched)


def _parts(ran, file) -> Iterator[tuple[list[int], list[Node]]]:
    """Yields (positions in `ran`, the file's operators) for each part that the delegate ran.

    Yields nothing if the number of parts in `ran` differs from the number that LiteRT would make of the file.
    """
    outside = {index for _, index in ran if index is not None}
    groups: list[list[int]] = [[]]
    for i, (_, index) in enumerate(ran):
        if index is None:
            groups[-1].append(i)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    parts = [part for delegated, part in _partition(file, outside) if delegated]
    if len(groups) == len(parts):
        yield from zip(groups, parts, strict=True)


def _partition(file, outside) -> Iterator[tuple[bool, list[Node]]]:
    """Yields the parts into which LiteRT divides a graph: (whether the delegate runs it, its operators).

    Args:
      file: the file's operators.
      outside: indices of the operators that the delegate does not run.
    """
    waiting = list(range(len(file)))
    missing = {t for node in file for t in node.outputs}
    while waiting:
        part, delegated, size = [], None, -1
        while len(part) > size:
            size = len(part)
            for i in list(waiting):
                ready = missing.isdisjoint(file[i].inputs)
                if ready and delegated in (None, i not in outside):
                    delegated = i not in outside
                    part.append(file[i])
                    waiting.remove(i)
                    missing.difference_update(file[i].outputs)
        if not part:  # a graph with a loop
            return
        yield bool(delegated), part


def _match_part(names: Sequence[str], nodes: Sequence[Node]) -> list[str | None]:
    """Returns the layer of each operator of a part, or None.

    An operator without a counterpart of its own has the layer of the previous operator of its kind since the last product.

    Args:
      names: XNNPACK's names of the operators that ran.
      nodes: the file's operators of that part.
    """
    layers: list[str | None] = [None] * len(names)
    kinds, file_kinds = _xnnpack_kinds(names), _file_kinds(nodes)
    if not _same_products(kinds, file_kinds):
        return layers
    for (product, between), (file_product, file_between) in zip(
        _split_at_products(kinds), _split_at_products(file_kinds), strict=True
    ):
        if product is not None:
            layers[product] = nodes[file_product].layer
        candidates, last_layer = list(file_between), {}
        for i in between:
            same_kind = [j for j in candidates if file_kinds[j] == kinds[i]]
            if same_kind:
                last_layer[kinds[i]] = nodes[same_kind[0]].layer
                candidates = [j for j in candidates if j > same_kind[0]]
            layers[i] = last_layer.get(kinds[i])
    return layers


def _split_at_products(
    kinds: Sequence[str | None],
) -> Iterator[tuple[int | None, list[int]]]:
    """Yields (position of a product, positions of other known kinds up to the next one).

    The first pair has None for the product and holds the positions before the first product.
    """
    product, between = None, []
    for i, kind in enumerate(kinds):
        if kind in PRODUCTS:
            yield product, between
            product, between = i, []
        elif kind:
            between.append(i)
    yield product, between


def _same_products(ran: Sequence[str | None], file: Sequence[str | None]) -> bool:
    """Returns whether the products that ran can be the file's, in order.

    XNNPACK may run a pointwise convolution as a fully connected layer.
    """
    ran, file = _products(ran), _products(file)
    return len(ran) == len(file) and all(
        a == b or (a, b) == ("fully connected", "convolution")
        for a, b in zip(ran, file, strict=True)
    )


def _products(kinds: Sequence[str | None]) -> list[str | None]:
    return [kind for kind in kinds if kind in PRODUCTS]


def _xnnpack_kinds(names: Sequence[str]) -> list[str | None]:
    """Returns the kinds of operators with these XNNPACK names, None for unknown ones."""
    return list(map(_xnnpack_kind, names))


def _xnnpack_kind(name: str) -> str | None:
    return next((k for k, (_, begin) in KINDS.items() if name.startswith(begin)), None)


def _file_kinds(nodes: Sequence[Node]) -> list[str | None]:
    """Returns the kinds of a file's operators, None for unknown ones."""
    return [_BUILTIN.get(node.kind) for node in nodes]
