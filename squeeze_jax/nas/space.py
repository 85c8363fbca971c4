"""A space of networks: the elastic options of a network, and random architectures in it.

An architecture is a NamedTuple with one field per elastic option. A field holds int32 indices into the choices of
each position, in ascending order of size: 0 is the smallest. `sample`, `mutate`, `crossover` and `one_hot` are pure
functions of arrays: `jax.vmap` and `jax.jit` apply to them.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.elastic import one_per_position

Arch = Any  # a NamedTuple of int32 arrays, of the type `Space.arch_type`


class Space(NamedTuple):
    """Elastic options and their choices.

    Attributes:
      choices: {option: for each position the values in ascending order}.
      arch_type: the NamedTuple type of its architectures.
    """

    choices: Mapping[str, tuple[tuple[Any, ...], ...]]
    arch_type: type

    @property
    def sizes(self) -> Arch:
        """Returns the number of choices of each position, as an architecture."""
        return self.arch_type(
            *(
                np.asarray([len(c) for c in choices], np.int32)
                for choices in self.choices.values()
            )
        )

    def describe(self) -> str:
        """Returns the options with their numbers of positions, such as "kernel x 20, depth x 5"."""
        return ", ".join(f"{name} x {len(c)}" for name, c in self.choices.items())

    def smallest(self) -> Arch:
        """Returns the architecture with the first choice everywhere."""
        return jax.tree.map(np.zeros_like, self.sizes)

    def largest(self) -> Arch:
        """Returns the architecture with the last choice everywhere."""
        return jax.tree.map(lambda n: n - 1, self.sizes)

    def options(self, arch: Arch) -> dict[str, tuple]:
        """Returns an architecture as options of `models.make`, such as {"depth": (4, 3)}."""
        options = {}
        for name, indices in zip(self.choices, arch, strict=True):
            pairs = zip(self.choices[name], np.asarray(indices).tolist(), strict=True)
            options[name] = tuple(values[index] for values, index in pairs)
        return options

    def arch(self, options: Mapping[str, Any]) -> Arch:
        """Returns the architecture that has the values of options; options that are absent have their largest values.

        Args:
          options: {option: one value, or one for each position}.

        Raises:
          UserError: an option is not elastic, has the wrong number of values, or has a value outside its choices.
        """
        for name in options:
            if name not in self.choices:
                raise UserError(
                    f"{name} is not an option of the space{nearest(name, self.choices)}"
                )
        values = one_per_position(self.choices, options)
        fields = (
            [c.index(v) for v, c in zip(values[name], choices, strict=True)]
            for name, choices in self.choices.items()
        )
        return self.arch_type(*(np.asarray(f, np.int32) for f in fields))


def from_choices(
    elastic: Mapping[str, tuple[tuple[Any, ...], ...]],
    limits: Mapping[str, Any] | None = None,
) -> Space:
    """Builds a space.

    Args:
      elastic: {option: choices of each position}, as the network's file gives them.
      limits: {option: the values that are allowed, at every position, or one value}; None for all. A position that has none of them
        keeps its choices.

    Raises:
      UserError: a limit names another option, or allows no value of any position.
    """
    limits = {
        name: tuple(allowed) if isinstance(allowed, tuple | list) else (allowed,)
        for name, allowed in dict(limits or {}).items()
    }
    for name, allowed in limits.items():
        if name not in elastic:
            raise UserError(
                f"choices: {name} is not an elastic option of the network{nearest(name, elastic)}"
            )
        known = sorted({value for choices in elastic[name] for value in choices})
        if not allowed:
            raise UserError(
                f"choices: {name} allows no value: choose among {', '.join(map(str, known))}"
            )
        for value in allowed:
            if value not in known:
                raise UserError(
                    f"choices: {name} = {value} is not in the space: choose among {', '.join(map(str, known))}"
                )
    limited = {}
    for name, positions in elastic.items():
        allowed = limits.get(name)
        limited[name] = tuple(
            tuple(v for v in choices if allowed is None or v in allowed) or choices
            for choices in positions
        )
    return Space(limited, collections.namedtuple("Arch", limited))


def changed(arch: Arch, name: str, place: int, index: int) -> Arch:
    """Returns an architecture with another choice at one position of an option; on host arrays."""
    field = np.array(getattr(arch, name))
    field[place] = index
    return arch._replace(**{name: field})


def sample(space: Space, key: jax.Array) -> Arch:
    """Returns a random architecture; each position has each of its choices with the same probability."""
    sizes = space.sizes
    keys = jax.random.split(key, len(sizes))
    return space.arch_type(
        *(
            jax.random.randint(k, n.shape, 0, n)
            for k, n in zip(keys, sizes, strict=True)
        )
    )


def spread_networks(space: Space, count: int, key: jax.Array) -> list[Arch]:
    """Returns random architectures from the smallest to the largest.

    In each one, positions take their smallest or their largest choice with a probability of its own, and a random choice
    otherwise. The first is the smallest network, the last the largest.

    Args:
      space: the space.
      count: number of architectures, 0 or at least 2.
      key: random key; the same key gives the same architectures.
    """
    archs = []
    for number, arch_key in enumerate(jax.random.split(key, count)):
        position = 2 * number / (count - 1) - 1  # from -1 to 1
        extreme = space.smallest() if position < 0 else space.largest()
        share = 1.0 if abs(position) == 1 else 0.7 * abs(position)
        mask_key, draw_key = jax.random.split(arch_key)
        masks = jax.random.split(mask_key, len(extreme))
        fields = zip(masks, extreme, sample(space, draw_key), strict=True)
        archs.append(
            space.arch_type(
                *(
                    np.where(jax.random.uniform(k, end.shape) < share, end, random)
                    for k, end, random in fields
                )
            )
        )
    return archs


def mutate(space: Space, key: jax.Array, arch: Arch, rate: float) -> Arch:
    """Returns an architecture in which each position is drawn anew with the probability `rate`."""
    key, fresh_key = jax.random.split(key)
    keys = jax.random.split(key, len(arch))
    return space.arch_type(
        *(
            jnp.where(jax.random.uniform(k, old.shape) < rate, new, old)
            for k, old, new in zip(keys, arch, sample(space, fresh_key), strict=True)
        )
    )


def crossover(space: Space, key: jax.Array, first: Arch, second: Arch) -> Arch:
    """Returns an architecture that has each position of one of two, with the same probability."""
    keys = jax.random.split(key, len(first))
    return space.arch_type(
        *(
            jnp.where(jax.random.bernoulli(k, shape=a.shape), a, b)
            for k, a, b in zip(keys, first, second, strict=True)
        )
    )


def one_hot(space: Space, arch: Arch) -> jax.Array:
    """Returns float32 [total number of choices]: a one for the choice of each position."""
    parts = []
    for indices, choices in zip(arch, space.choices.values(), strict=True):
        parts += [
            jax.nn.one_hot(indices[place], len(values))
            for place, values in enumerate(choices)
        ]
    return jnp.concatenate(parts)


def stack(archs: Sequence[Arch]) -> Arch:
    """Returns architectures with a leading axis, as numpy arrays."""
    return jax.tree.map(lambda *fields: np.stack(fields), *archs)


def unstack(archs: Arch) -> list[Arch]:
    """Returns the architectures along a leading axis."""
    archs = jax.device_get(archs)
    count = len(jax.tree.leaves(archs)[0])
    return [jax.tree.map(lambda a, i=i: np.asarray(a[i]), archs) for i in range(count)]


def key_of(arch: Arch) -> tuple[int, ...]:
    """Returns an architecture as a tuple, which can be a key of a dict."""
    return tuple(np.concatenate([np.ravel(field) for field in arch]).tolist())


def keys_of(archs: Arch) -> list[tuple[int, ...]]:
    """Returns architectures with a leading axis as tuples, see `key_of`."""
    return list(map(tuple, np.concatenate([np.asarray(f) for f in archs], 1).tolist()))
