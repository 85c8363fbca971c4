"""Regularised evolution: children of the best of a few random members replace the oldest member of the population.

Real, Aggarwal, Huang, Le 2018, arXiv 1802.01548 (aging evolution). Each step draws a tournament from the population, changes
one position of its best architecture, scores the child, adds it to the population and removes the oldest member. A child that was
scored before joins the population again, without a query: only different architectures count.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas.queries import Log, Queries
from squeeze_jax.nas.space import Arch, Space
from squeeze_jax.ranges import Count
from squeeze_jax.registry import checked

CHILDREN = 20  # most children for each query, where most of them were scored before


@checked
def search(
    key: Any,
    space: Any,
    score: Any,
    *,
    queries: Count = 1000,
    population: Count = 100,
    tournament: Count = 10,
) -> Queries:
    """Returns the architectures that were scored; `arch` and `score` of the result are the best.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      score: architectures with a leading axis n → array [n], larger is better; n is 1 after the first population.
      queries: number of architectures to score; fewer if the search finds no more.
      population: number of members; the first ones are random.
      tournament: number of members, drawn with repetition, whose best has a child.

    Raises:
      UserError: the population is larger than the number of queries, or all positions have one choice.
    """
    if population > queries:
        raise UserError(
            f"regularised_evolution: population = {population}, but queries = {queries}: the first population needs a query each"
        )
    first_key, key = jax.random.split(key)
    log = Log(space, score)
    members = log.new(first_key, population)
    scores = log.score(members)
    members = jax.tree.map(np.array, members)
    breed = jax.jit(
        lambda key, members, scores: _child(space, key, members, scores, tournament)
    )
    limit = CHILDREN * queries
    for step in range(limit):
        if len(log) >= queries:
            break
        child = breed(jax.random.fold_in(key, step), members, scores)
        child = jax.tree.map(lambda a: np.asarray(a)[None], child)
        oldest = step % len(scores)
        scores[oldest] = log.score(child)[0]
        for field, values in zip(members, child, strict=True):
            field[oldest] = values[0]
    return log.result()


def neighbour(space: Space, key: jax.Array, arch: Arch) -> Arch:
    """Returns an architecture in which one random position has another random choice.

    Positions with one choice are never drawn. `jax.vmap` and `jax.jit` apply to the function.

    Raises:
      UserError: all positions have one choice.
    """
    sizes = np.concatenate(list(space.sizes))
    elastic = np.flatnonzero(sizes > 1)
    if not len(elastic):
        raise UserError("neighbour: all positions of the space have one choice")
    place_key, choice_key = jax.random.split(key)
    place = jax.random.choice(place_key, elastic)
    size = jnp.asarray(sizes)[place]
    step = jax.random.randint(choice_key, (), 1, size)
    flat = jnp.concatenate([jnp.asarray(field) for field in arch])
    flat = flat.at[place].set((flat[place] + step) % size)
    ends = np.cumsum([len(field) for field in space.sizes])
    return space.arch_type(*jnp.split(flat, ends[:-1]))


def _child(space: Space, key, members: Arch, scores, tournament: int) -> Arch:
    """Returns a neighbour of the best of some random members."""
    tournament_key, change_key = jax.random.split(key)
    drawn = jax.random.randint(tournament_key, (tournament,), 0, len(scores))
    parent = drawn[jnp.argmax(scores[drawn])]
    return neighbour(space, change_key, jax.tree.map(lambda a: a[parent], members))
