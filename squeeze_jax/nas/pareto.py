"""Multi-objective evolution (NSGA-II): the architectures of which no other is better in all objectives.

Deb, Pratap, Agarwal, Meyarivan 2002, IEEE Transactions on Evolutionary Computation 6(2), doi 10.1109/4235.996017. Parents
and children compete together. Those with fewer dominating architectures survive, and among equals those in less crowded parts of
the front. Architectures that break a constraint are dominated by all that break it less (section VI).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.space import Arch, Space
from squeeze_jax.ranges import Count, Share, Whole
from squeeze_jax.registry import checked


class Front(NamedTuple):
    """The result of a search, in ascending order of the first objective.

    Attributes:
      archs: different architectures with a leading axis n.
      values: [n, objectives].
    """

    archs: Arch
    values: np.ndarray


@checked
def pareto(
    key: Any,
    space: Any,
    objectives: Any,
    violation: Any = None,
    *,
    population: Count = 100,
    rate: Share = 0.1,
    generations: Whole = 50,
) -> Front:
    """Returns the best trade-offs between objectives that were found.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      objectives: architectures with a leading axis n → array [n, objectives], smaller is better.
      violation: the same → array [n], 0 for an architecture that is allowed, otherwise by how much it breaks a constraint;
        None if all are allowed.
      population: number of architectures in each generation.
      rate: probability that a mutation draws a position anew.
      generations: number of generations after the first, random one.

    Returns:
      The front; empty if no allowed architecture was found.
    """
    violation = violation or (lambda archs: jnp.zeros(_length(archs)))

    @jax.jit
    def first(key):
        random = jax.vmap(lambda k: spaces.sample(space, k))
        archs = random(jax.random.split(key, population))
        ends = space.smallest(), space.largest()  # the ends of many trade-offs
        return jax.tree.map(
            lambda rows, *end: jnp.concatenate([jnp.stack(end), rows])[:population],
            *(archs, *ends),
        )

    @jax.jit
    def children(key, archs, order):
        return jax.vmap(lambda k: _child(space, k, archs, order, rate))(
            jax.random.split(key, population)
        )

    evaluate = _evaluation(objectives, violation)
    first_key, *keys = jax.random.split(key, generations + 1)
    archs = jax.device_get(first(first_key))
    values, broken = evaluate(archs)
    for generation_key in keys:
        order = jnp.asarray(_order(values, broken))
        new = jax.device_get(children(generation_key, archs, order))
        archs = jax.tree.map(lambda a, b: np.concatenate([a, b]), archs, new)
        pairs = zip((values, broken), evaluate(new), strict=True)
        values, broken = (np.concatenate(pair) for pair in pairs)
        kept = _different(archs)
        kept = kept[_order(values[kept], broken[kept])[:population]]
        archs = jax.tree.map(lambda a, kept=kept: a[kept], archs)
        values, broken = values[kept], broken[kept]
    kept = _different(archs)
    best = kept[(broken[kept] == 0) & (ranks(values[kept], broken[kept]) == 0)]
    best = best[np.argsort(values[best, 0], kind="stable")]
    return Front(jax.tree.map(lambda a: a[best], archs), values[best])


def ranks(values: np.ndarray, violation: np.ndarray) -> np.ndarray:
    """Returns the number of the front that each candidate is on, int [n]: 0 for candidates that none dominates.

    Args:
      values: [n, objectives], smaller is better.
      violation: [n], 0 for allowed candidates.
    """
    better = (values[:, None] <= values[None]).all(-1)
    better &= (values[:, None] < values[None]).any(-1)
    equal = violation[:, None] == violation[None]
    dominates = np.where(equal, better, violation[:, None] < violation[None])
    result, left = np.full(len(values), -1), np.ones(len(values), bool)
    rank = 0
    while left.any():
        front = left & ~(dominates & left[:, None]).any(0)
        result[front], left = rank, left & ~front
        rank += 1
    return result


def crowding(values: np.ndarray) -> np.ndarray:
    """Returns for each candidate of a front the distance between its neighbours, summed over objectives; infinite at the ends.

    Args:
      values: [n, objectives].
    """
    distances = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        extent = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if extent > 0:
            gaps = (column[order[2:]] - column[order[:-2]]) / extent
            distances[order[1:-1]] += gaps
    return distances


def _order(values: np.ndarray, violation: np.ndarray) -> np.ndarray:
    """Returns the candidates' indices, best first: by front, then by crowding."""
    rank = ranks(values, violation)
    distance = np.zeros(len(values))
    for front in range(rank.max() + 1):
        members = np.flatnonzero(rank == front)
        distance[members] = crowding(values[members])
    return np.lexsort((-distance, rank))


def _child(space: Space, key, archs: Arch, order, rate: float) -> Arch:
    """Returns the mutation of a crossover of two parents, each the better of two random ones."""
    parent_key, cross_key, change_key = jax.random.split(key, 3)
    places = jax.random.randint(parent_key, (2, 2), 0, order.shape[0]).min(1)
    first, second = (
        jax.tree.map(lambda a, i=i: a[order[places[i]]], archs) for i in range(2)
    )
    mixed = spaces.crossover(space, cross_key, first, second)
    return spaces.mutate(space, change_key, mixed, rate)


def _evaluation(objectives, violation):
    def evaluate(archs):
        values = np.asarray(objectives(archs), np.float64)
        return values, np.maximum(np.asarray(violation(archs), np.float64), 0)

    return evaluate


def _different(archs: Arch) -> np.ndarray:
    """Returns the indices of the first of each group of equal architectures."""
    rows = np.concatenate([np.asarray(f) for f in archs], axis=1)
    return np.sort(np.unique(rows, axis=0, return_index=True)[1])


def _length(archs: Arch) -> int:
    return jax.tree.leaves(archs)[0].shape[0]
