"""Costs of all networks of a space as sums over their pieces, so that thousands of architectures are priced at once.

A piece depends on few positions of the architecture: its own kernel and expansion, and its stage's depth. These positions
are found by changing each one. So a table per piece holds the costs of all its choices, and an architecture's cost is a sum of
look-ups. Costs that are not sums over pieces, such as peak memory, do not fit this form.

A layer of an encoder has half a million choices, too many for a table. Its cost is a sum of tables of one or two positions, such
as the number of heads and the groups of the queries:

    c(x) = c(0) + sum over i of (c(x_i) - c(0)) + sum over i < j of (c(x_i, x_j) - c(x_i) - c(x_j) + c(0))

where 0 is the largest choice everywhere and c(x_i) has only the choice of position i. Random choices check this equation.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.space import Arch
from squeeze_jax.nn.chain import Chain, Piece

CHECKED = 8  # random networks whose pieces must be those of the tables
MOST_CHOICES = 10_000  # of a piece with one table
TOLERANCE = 1e-6  # of sums of tables, relative to the cost


class Placed(NamedTuple):
    """A piece and the shapes of its inputs; equal ones have equal costs.

    `inputs` is a pair (structure, ((shape, dtype) of each array)).
    """

    piece: Piece
    inputs: Any


class Column(NamedTuple):
    """The choices of one piece.

    Attributes:
      positions: pairs (option, position) that it depends on.
      sizes: number of choices of each of them.
      present: whether networks have the piece, bool; an axis for each position, of size 1 if the position does not matter.
      place: indices of choices → the piece, or None where networks do not have it.
    """

    positions: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    present: np.ndarray
    place: Callable[[tuple[int, ...]], Placed | None]

    @property
    def small(self) -> bool:
        """Returns whether one table holds all choices."""
        return math.prod(self.sizes) <= MOST_CHOICES


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
                    self._placed(_with(space.largest(), name, place, index))
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
                self._outputs[place] = _output(place)
            x = self._outputs[place]
        return placed

    def _column(self, piece, positions):
        space = self._family.space
        sizes = tuple(len(space.choices[name][place]) for name, place in positions)

        @functools.cache
        def place(indices):
            arch = space.largest()
            for (name, position), index in zip(positions, indices, strict=True):
                arch = _with(arch, name, position, index)
            return self._placed(arch).get(piece)

        shape = sizes
        if math.prod(sizes) > MOST_CHOICES:  # presence depends on few positions
            shape = tuple(
                size if any(place(i) is None for i in _single(sizes, axis)) else 1
                for axis, size in enumerate(sizes)
            )
        present = np.zeros(shape, bool)
        for indices in np.ndindex(shape):
            pairs = zip(indices, shape, sizes, strict=True)
            present[indices] = (
                place(tuple(i if n > 1 else size - 1 for i, n, size in pairs))
                is not None
            )
        return Column(positions, sizes, present, place)

    def _check(self):
        """Compares the columns with the pieces of random networks."""
        for key in jax.random.split(jax.random.key(0), CHECKED):
            arch = jax.device_get(spaces.sample(self._family.space, key))
            placed = self._placed(arch)
            for name, column in self.columns.items():
                indices = tuple(int(i) for i in _indices(column, arch))
                if column.place(indices) != placed.get(name) or (
                    _presence(column, indices) != (name in placed)
                ):
                    raise UserError(
                        f"{name} depends on several elastic options at once in a way that a table per piece cannot hold"
                    )

    @property
    def distinct(self) -> list[Placed]:
        """Returns the different pieces of all networks; each has to be measured once.

        Raises:
          UserError: a piece has too many choices.
        """
        pieces = {}
        for name, column in self.columns.items():
            if not column.small:
                raise UserError(
                    f"{name} has {math.prod(column.sizes):,} choices, at most {MOST_CHOICES:,} can be listed: restrict the"
                    " choices of the space"
                )
            pieces |= dict.fromkeys(map(column.place, np.ndindex(column.sizes)))
        return [placed for placed in pieces if placed is not None]

    def tabulate(self, cost: Callable[[Placed], float]) -> Callable[[Arch], jax.Array]:
        """Returns a function from an architecture to the sum of the costs of its pieces, float32 [].

        `jax.vmap` and `jax.jit` apply to the function.

        Args:
          cost: costs of a piece; called once for each different piece that a table needs.

        Raises:
          UserError: a piece has too many choices for one table, and its cost is no sum over pairs of positions.
        """
        cost = functools.lru_cache(maxsize=None)(cost)
        columns = [
            (column, _tables(name, column, cost))
            for name, column in self.columns.items()
        ]

        def total(arch):
            sums = 0.0
            for column, tables in columns:
                indices = _indices(column, arch)
                value = sum(
                    jnp.asarray(table)[tuple(indices[axis] for axis in axes)]
                    for axes, table in tables
                )
                sums += jnp.where(_presence(column, indices), value, 0.0)
            return sums

        return total

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


def macs(placed: Placed) -> int:
    """Returns the multiply-accumulates of a piece."""
    net, inputs = Chain((placed.piece,)), _shapes(placed)
    variables = jax.eval_shape(net.init, jax.random.key(0), inputs)
    return count.macs(net.apply, variables, inputs).total


def _tables(name, column: Column, cost) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Returns pairs (axes of positions, table over their choices) whose sum is the cost of a piece.

    Args:
      name: of the piece.
      column: its choices.
      cost: costs of a piece.
    """
    sizes = column.sizes
    everywhere = tuple(range(len(sizes)))
    largest = tuple(size - 1 for size in sizes)
    if column.small:
        placed = [column.place(indices) for indices in np.ndindex(sizes)]
        costs = [0.0 if p is None else cost(p) for p in placed]
        return [(everywhere, np.reshape(np.asarray(costs, np.float32), sizes))]

    def at(**indices):
        changed = (indices.get(f"_{axis}", last) for axis, last in enumerate(largest))
        return float(cost(column.place(tuple(changed))))

    free = [axis for axis in everywhere if column.present.shape[axis] == 1]
    whole = at()
    singles = {a: [at(**{f"_{a}": i}) - whole for i in range(sizes[a])] for a in free}
    tables = [((), np.asarray(whole))]
    tables += [((axis,), np.asarray(values)) for axis, values in singles.items()]
    for a, b in itertools.combinations(free, 2):

        def both(i, j, a=a, b=b):
            alone = whole + singles[a][i] + singles[b][j]
            return at(**{f"_{a}": i, f"_{b}": j}) - alone

        if abs(both(0, 0)) > TOLERANCE * whole:
            rows = [[both(i, j) for j in range(sizes[b])] for i in range(sizes[a])]
            tables.append(((a, b), np.asarray(rows)))
    rng = np.random.default_rng(0)
    for _ in range(CHECKED):
        indices = {a: int(rng.integers(sizes[a])) for a in free}
        found = sum(table[tuple(indices[a] for a in axes)] for axes, table in tables)
        wanted = at(**{f"_{a}": i for a, i in indices.items()})
        if abs(found - wanted) > TOLERANCE * whole:
            raise UserError(
                f"{name}: with {math.prod(sizes):,} choices its cost is no sum over pairs of options: restrict the choices"
                f" of the space to at most {MOST_CHOICES:,} for this piece"
            )
    return [(axes, table.astype(np.float32)) for axes, table in tables]


def _output(placed: Placed):
    net, inputs = Chain((placed.piece,)), _shapes(placed)
    return jax.eval_shape(net.init_with_output, jax.random.key(0), inputs)[0][0]


def _hashable(x) -> tuple:
    arrays, structure = jax.tree.flatten(x)
    return structure, tuple((tuple(a.shape), np.dtype(a.dtype)) for a in arrays)


def _shapes(placed: Placed):
    """Returns the shapes of the inputs of a piece."""
    structure, arrays = placed.inputs
    return jax.tree.unflatten(
        structure, [jax.ShapeDtypeStruct(*array) for array in arrays]
    )


def _single(sizes, axis):
    """Yields the indices of choices that differ from the largest ones at one position."""
    for index in range(sizes[axis] - 1):
        yield tuple(index if a == axis else n - 1 for a, n in enumerate(sizes))


def _with(arch: Arch, name: str, place: int, index: int) -> Arch:
    field = np.array(getattr(arch, name))
    field[place] = index
    return arch._replace(**{name: field})


def _indices(column: Column, arch: Arch) -> tuple:
    """Returns the indices of an architecture's choices at the positions of a column."""
    return tuple(getattr(arch, name)[place] for name, place in column.positions)


def _presence(column: Column, indices: tuple):
    """Whether the networks with these choices have the piece."""
    pairs = zip(indices, column.present.shape, strict=True)
    return jnp.asarray(column.present)[tuple(i if n > 1 else 0 for i, n in pairs)]


def _decides_presence(column: Column, axis: int) -> bool:
    """Whether the choice of one position decides if networks have the piece."""
    present = column.present
    return bool(np.any(present.all(axis) != present.any(axis)))


def _is_present(column: Column, fixed) -> bool:
    """Whether networks have the piece, given the choices of the positions that decide it."""
    index = tuple(
        fixed.get(position, slice(None)) if size > 1 else 0
        for position, size in zip(column.positions, column.present.shape, strict=True)
    )
    return bool(np.all(column.present[index]))


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
