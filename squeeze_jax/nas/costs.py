"""Costs of all networks of a space as sums over their pieces, so that thousands of architectures are priced at once.

A piece depends on few positions of the architecture: its own kernel and expansion, and its stage's depth. These positions
are found by changing each one. So a table per piece holds the costs of all its choices, and an architecture's cost is a sum of
look-ups. The peak of memory is the largest of the pieces' peaks instead of their sum.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.cost import count, memory
from squeeze_jax.cost.latency_table import Table, key_of
from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.space import Arch
from squeeze_jax.nn.chain import Chain, Piece

CHECKED = 8  # random networks whose pieces must be those of the tables


class Placed(NamedTuple):
    """A piece and the shapes of its inputs; equal ones have equal costs.

    `inputs` is a pair: the structure of the inputs, and (shape, dtype) of each array.
    """

    piece: Piece
    inputs: Any

    @property
    def example(self) -> Any:
        """Returns the shapes of the inputs."""
        structure, arrays = self.inputs
        shapes = [jax.ShapeDtypeStruct(*array) for array in arrays]
        return jax.tree.unflatten(structure, shapes)


class Column(NamedTuple):
    """The choices of one piece.

    Attributes:
      positions: pairs (option, position) that it depends on.
      sizes: number of choices of each of them.
      placed: the piece for each combination in row-major order; None where a network does not have it.
    """

    positions: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    placed: tuple[Placed | None, ...]


class Pieces:
    """The pieces of all networks of a space, and on which positions they depend."""

    def __init__(self, family: Family, example: Any):
        """Finds the pieces.

        Args:
          family: the networks.
          example: shapes of the inputs, such as one image.

        Raises:
          UserError: a piece depends on positions together that it does not depend on one by one.
        """
        self._family, self._example, self._outputs = family, example, {}
        space = family.space
        largest = self._placed(space.largest())
        positions = {name: [] for name in largest}
        for name, choices in space.choices.items():
            for place, values in enumerate(choices):
                changed = [
                    self._placed(spaces.changed(space.largest(), name, place, index))
                    for index in range(len(values) - 1)
                ]
                for piece, before in largest.items():
                    if any(pieces.get(piece) != before for pieces in changed):
                        positions[piece].append((name, place))
        self.columns = {
            piece: self._column(piece, tuple(places))
            for piece, places in positions.items()
        }
        self._check()

    def _placed(self, arch: Arch) -> dict[str, Placed]:
        """Returns {name: piece with the shapes of its inputs} of an architecture's network."""
        x, placed = self._example, {}
        for piece in self._family.network(arch).pieces:
            place = Placed(Piece("piece", piece.module), _hashable(x))
            placed[piece.name] = place
            if place not in self._outputs:
                self._outputs[place] = output_of(place)
            x = self._outputs[place]
        return placed

    def _column(self, piece, positions):
        choices = self._family.space.choices
        sizes = tuple(len(choices[name][place]) for name, place in positions)
        placed = []
        for indices in itertools.product(*map(range, sizes)):
            arch = self._family.space.largest()
            for (name, place), index in zip(positions, indices, strict=True):
                arch = spaces.changed(arch, name, place, index)
            placed.append(self._placed(arch).get(piece))
        return Column(positions, sizes, tuple(placed))

    def _check(self):
        """Compares the columns with the pieces of random networks."""
        for key in jax.random.split(jax.random.key(0), CHECKED):
            arch = jax.device_get(spaces.sample(self._family.space, key))
            placed = self._placed(arch)
            for name, column in self.columns.items():
                if column.placed[_index(column, arch)] != placed.get(name):
                    raise UserError(
                        f"{name} depends on several elastic options at once in a way that a table per piece cannot hold"
                    )

    @property
    def distinct(self) -> list[Placed]:
        """Returns the different pieces of all networks; each has to be measured once."""
        return list(
            dict.fromkeys(p for c in self.columns.values() for p in c.placed if p)
        )

    def tabulate(
        self,
        cost: Callable[[Placed], float],
        combine: Callable[[Sequence[Any]], Any] = sum,
    ) -> Callable[[Arch], jax.Array]:
        """Returns a function from an architecture to the sum of the costs of its pieces, float32 [].

        `jax.vmap` and `jax.jit` apply to the function.

        Args:
          cost: costs of a piece, at least 0; called once for each different piece.
          combine: what a network's cost is of its pieces' costs, such as `largest` for the peak of memory.
        """
        costs = {placed: cost(placed) for placed in self.distinct}
        tables = [
            (column, np.asarray([costs.get(p, 0.0) for p in column.placed], np.float32))
            for column in self.columns.values()
        ]

        def total(arch):
            return combine(
                [jnp.asarray(table)[_index(column, arch)] for column, table in tables]
            )

        return total

    def latency(self, table: Table, name: str) -> Callable[[Arch], jax.Array]:
        """Returns a function from an architecture to its predicted latency in ms, float32 [].

        Args:
          table: the latencies of a device.
          name: how errors call the table.

        Raises:
          UserError: the table lacks a piece.
        """
        sums = self.tabulate(measured(table, name))
        counts = self.tabulate(lambda placed: 1)
        return lambda arch: table.predict(sums(arch), counts(arch))

    def number_of_networks(self) -> int:
        """Returns the number of architectures, counting once those that differ only in positions without effect.

        Positions of absent pieces have no effect. Two choices of a position count twice even if rounding makes them equal.
        Positions that share no piece are independent, so the number is a product over groups of positions.
        """
        groups = _connected(column.positions for column in self.columns.values())
        return math.prod(map(self._networks_of, groups))

    def _networks_of(self, group: frozenset) -> int:
        """Returns the number of different combinations of one group of positions."""
        columns = [c for c in self.columns.values() if set(c.positions) & group]
        deciding = sorted(
            {
                position
                for column in columns
                for axis, position in enumerate(column.positions)
                if _decides_presence(column, axis)
            }
        )
        sizes = [self._size(position) for position in deciding]
        networks = 0
        for indices in itertools.product(*map(range, sizes)):
            fixed = dict(zip(deciding, indices, strict=True))
            active = {
                position
                for column in columns
                if _is_present(column, fixed)
                for position in column.positions
            } - set(deciding)
            networks += math.prod(map(self._size, active))
        return networks

    def _size(self, position) -> int:
        name, place = position
        return len(self._family.space.choices[name][place])


def largest(costs: Sequence[Any]) -> jax.Array:
    """Returns the largest of the pieces' costs."""
    return jnp.stack(costs).max(0)


def macs(placed: Placed) -> int:
    """Returns the multiply-accumulates of a piece."""
    net, variables = network_of(placed)
    return count.macs(net.apply, variables, placed.example).total


def parameters(placed: Placed) -> int:
    """Returns the number of parameters of a piece."""
    return tree.size(network_of(placed)[1].get("params", {}))


def peak_bytes(placed: Placed, bits: int = 8) -> int:
    """Returns the most bytes of activations that are live at once in a piece, inputs and outputs included.

    A network's peak is that of one of its pieces, because between two pieces only one piece's outputs are live.

    Args:
      placed: the piece.
      bits: bits of an activation, see `memory.peak`.
    """
    return memory.peak(network_of(placed)[0], placed.example, bits=bits).bytes


def measured(table: Table, name: str) -> Callable[[Placed], float]:
    """Returns a function from a piece to its latency in ms.

    Args:
      table: the latencies of a device.
      name: how errors call the table.
    """

    def latency(placed):
        key = key_of(placed.piece.module, placed.example)
        if key not in table.pieces:
            raise UserError(
                f"{name} has no latency of {key}: it is of another space, image size or version: measure it with"
                " --job=latency_table"
            )
        return table.pieces[key].ms

    return latency


def network_of(placed: Placed) -> tuple[Chain, Any]:
    """Returns a network of a piece alone, and the shapes of its variables."""
    net = Chain((placed.piece,))
    return net, jax.eval_shape(net.init, jax.random.key(0), placed.example)


def output_of(placed: Placed) -> Any:
    """Returns the shapes of a piece's outputs."""
    net = Chain((placed.piece,))
    return jax.eval_shape(net.init_with_output, jax.random.key(0), placed.example)[0][0]


def _hashable(x) -> tuple:
    arrays, structure = jax.tree.flatten(x)
    return structure, tuple((tuple(a.shape), np.dtype(a.dtype)) for a in arrays)


def _index(column: Column, arch: Arch):
    """Returns the place of an architecture's choices in a column."""
    index = 0
    for (name, place), size in zip(column.positions, column.sizes, strict=True):
        index = index * size + getattr(arch, name)[place]
    return index


def _decides_presence(column: Column, axis: int) -> bool:
    """Whether the choice of one position decides if networks have the piece."""
    present = np.reshape([p is not None for p in column.placed], column.sizes or (1,))
    return bool(column.sizes) and bool(np.any(present.all(axis) != present.any(axis)))


def _is_present(column: Column, fixed) -> bool:
    """Whether networks have the piece, given the choices of the positions that decide it."""
    present = np.reshape([p is not None for p in column.placed], column.sizes or (1,))
    index = tuple(fixed.get(position, slice(None)) for position in column.positions)
    return bool(np.all(present[index] if column.sizes else present))


def _connected(sets) -> list[frozenset]:
    """Returns the groups of positions that are connected by pieces that depend on them."""
    groups: list[set] = []
    for positions in map(set, sets):
        if not positions:
            continue
        touching = [g for g in groups if g & positions]
        groups = [g for g in groups if not g & positions]
        groups.append(positions.union(*touching))
    return list(map(frozenset, groups))
