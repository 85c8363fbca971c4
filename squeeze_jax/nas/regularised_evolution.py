"""Regularised evolution: children of the best of a few random members replace the oldest member of the population.

Real, Aggarwal, Huang, Le 2018, arXiv 1802.01548 (aging evolution). Each step draws a tournament from the population, changes
one position of its best architecture, scores the child, adds it to the population and removes the oldest member. A child that was
scored before joins the population again, without a query: only different architectures count. A child that breaks the limits does
not join it.
"""

from typing import Any

import jax
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.queries import Log, Queries
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
    within: Any = None,
    canonical: Any = None,
) -> Queries:
    """Returns the architectures that were scored; `arch` and `score` of the result are the best.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      score: architectures with a leading axis n → array [n], larger is better; n is 1 after the first population.
      queries: number of architectures to score; fewer if the search finds no more.
      population: number of members; the first ones are random.
      tournament: number of members, drawn with repetition, whose best has a child.
      within, canonical: the limits and the form of architectures, see `queries.Log`.

    Raises:
      UserError: the population is larger than the number of queries, all positions have one choice, or no architecture within
        the limits was found.
    """
    if population > queries:
        raise UserError(
            f"regularised_evolution: population = {population}, but queries = {queries}: the first population needs a query each"
        )
    sizes = np.concatenate(list(space.sizes))
    elastic = np.flatnonzero(sizes > 1)
    if not len(elastic):
        raise UserError("regularised_evolution: all positions have one choice")
    first_key, drawn_key, change_key = jax.random.split(key, 3)
    log = Log(space, score, within, canonical)
    first = log.new(first_key, population)
    scores, members = log.score(first), spaces.keys_of(first)
    children = 0
    steps = CHILDREN * queries
    drawn = np.asarray(
        jax.random.randint(drawn_key, (steps, tournament), 0, len(members))
    )
    changes = np.asarray(jax.random.uniform(change_key, (steps, 2)))
    for step in range(steps):
        if len(log) >= queries:
            break
        parent = drawn[step][np.argmax(scores[drawn[step]])]
        child = _neighbour(members[parent], sizes, elastic, *changes[step])
        allowed = log.allowed(log.archs([child]))
        if not allowed:
            continue
        oldest = children % len(members)
        children += 1
        (members[oldest],) = allowed
        scores[oldest] = log.score(log.archs(allowed))[0]
    return log.result()


def _neighbour(arch: tuple, sizes, elastic, place: float, change: float) -> tuple:
    """Returns an architecture in which one position has another choice.

    Args:
      arch: choices of all positions.
      sizes: number of choices of each position.
      elastic: the positions with several choices.
      place, change: random numbers in [0, 1) that decide the position and its new choice.
    """
    position = elastic[int(place * len(elastic))]
    size = int(sizes[position])
    choice = (arch[position] + 1 + int(change * (size - 1))) % size
    return (*arch[:position], choice, *arch[position + 1 :])
