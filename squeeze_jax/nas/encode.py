"""Encodes architectures as inputs of accuracy predictors: one-hot choices, or graphs.

A position has no effect on an architecture if only absent pieces depend on it, such as the kernel of a block that the stage's
depth leaves out. Architectures that differ in such positions alone are the same network, so their encodings are equal.
Each function here returns a function of one architecture, to which `jax.vmap` and `jax.jit` apply.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.costs import Column
from squeeze_jax.nas.space import Arch, Space


def effects(space: Space, columns: Mapping[str, Column]) -> Callable[[Arch], Arch]:
    """Returns a function from an architecture to booleans of the same form: whether a position has an effect.

    Args:
      space: the space.
      columns: `costs.Pieces.columns`, which has the pieces and the positions on which they depend.
    """
    users = {}  # position → the presence of each piece that depends on it
    for column in columns.values():
        present = _presence(column)
        for axis, position in enumerate(column.positions):
            # A choice that decides whether a piece is present has an effect on every network.
            decides = np.any(present.all(axis) != present.any(axis))
            entry = column.positions, present | decides
            users.setdefault(position, []).append(entry)

    def effective(arch):
        def at(name, place):
            looked_up = [
                jnp.asarray(table)[_choices(arch, positions)]
                for positions, table in users.get((name, place), [])
            ]
            return jnp.any(jnp.asarray([False, *looked_up]))

        fields = (
            jnp.stack([at(name, place) for place in range(len(positions))])
            for name, positions in space.choices.items()
        )
        return space.arch_type(*fields)

    return effective


def canonical(space: Space, columns: Mapping[str, Column]) -> Callable[[Arch], Arch]:
    """Returns a function from an architecture to the one with 0 in all positions without effect.

    So equal networks have equal architectures.

    Args:
      space: the space.
      columns: `costs.Pieces.columns`.
    """
    effective = effects(space, columns)
    return lambda arch: jax.tree.map(
        lambda index, active: jnp.where(active, index, 0), arch, effective(arch)
    )


def one_hot(space: Space, columns: Mapping[str, Column]) -> Callable[[Arch], jax.Array]:
    """Returns a function from an architecture to float32 [total number of choices].

    The result is `space.one_hot` with zeros for the positions that have no effect.

    Args:
      space: the space.
      columns: `costs.Pieces.columns`.
    """
    effective = effects(space, columns)
    sizes = np.concatenate(list(space.sizes))

    def encode(arch):
        mask = jnp.concatenate(list(effective(arch)))
        return jnp.repeat(
            mask, sizes, total_repeat_length=sizes.sum()
        ) * spaces.one_hot(space, arch)

    return encode


def chain_of_positions(space: Space) -> Callable[[Arch], tuple[jax.Array, jax.Array]]:
    """Returns a function from an architecture to a chain with a node for each position.

    Args:
      space: the space.

    Returns:
      A function from an architecture to (adjacency [v, v], nodes [v, k]), as `predict_graph` takes them. The features of a
      node are the one-hot place in the chain and the one-hot value of the position.
    """
    positions = [
        ((name, place),)
        for name, choices in space.choices.items()
        for place in range(len(choices))
    ]
    return _chain(space, positions, lambda arch: jnp.ones(len(positions), bool))


def chain_of_pieces(
    space: Space, columns: Mapping[str, Column]
) -> Callable[[Arch], tuple[jax.Array, jax.Array]]:
    """Returns a function from an architecture to a chain of the pieces that the network has.

    Args:
      space: the space.
      columns: `costs.Pieces.columns`. Pieces that are equal in all networks get no node.

    Returns:
      A function from an architecture to (adjacency [v, v], nodes [v, k]), as `predict_graph` takes them. The features of a
      node are the one-hot place of the piece in the largest network, and for each option the one-hot values of the positions
      on which it depends. An absent piece has no features, and the chain leaves it out.
    """
    elastic = [column for column in columns.values() if column.positions]
    tables = [(column.positions, _presence(column)) for column in elastic]

    def present(arch):
        return jnp.stack(
            [jnp.asarray(table)[_choices(arch, places)] for places, table in tables]
        )

    return _chain(space, [column.positions for column in elastic], present)


def _presence(column: Column) -> np.ndarray:
    """Returns whether networks have the piece, with an axis for each position on which it depends."""
    return np.reshape([placed is not None for placed in column.placed], column.sizes)


def _choices(arch: Arch, positions) -> tuple:
    return tuple(jnp.asarray(getattr(arch, name))[place] for name, place in positions)


def _chain(space: Space, positions: list, present: Callable[[Arch], Any]) -> Callable:
    """Returns a function from an architecture to its chain.

    Args:
      space: the space.
      positions: for each node the positions that its features show.
      present: architecture → bool [v], the nodes that it has.
    """
    columns = {}  # (option, value) → its feature
    for name, choices in space.choices.items():
        for value in sorted({v for values in choices for v in values}):
            columns[name, value] = len(columns)
    features = {  # position → the features of its choices
        (name, place): np.asarray([columns[name, value] for value in values])
        for name, choices in space.choices.items()
        for place, values in enumerate(choices)
    }

    def chain(arch):
        def shown(position):
            (choice,) = _choices(arch, [position])
            return jax.nn.one_hot(jnp.asarray(features[position])[choice], len(columns))

        values = jnp.stack([sum(shown(p) for p in node) for node in positions])
        mask = present(arch)
        nodes = jnp.concatenate([jnp.eye(len(positions)), values], -1) * mask[:, None]
        order = jnp.cumsum(mask)
        follows = order[None, :] == order[:, None] + 1
        return (follows & mask[:, None] & mask).astype(jnp.float32), nodes

    return chain
