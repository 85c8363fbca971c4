"""Evolutionary search for the best architecture within a budget.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.4; Real, Aggarwal, Huang, Le 2018, arXiv 1802.01548. Each
generation keeps the best architectures as parents. Half of their children are mutations of one parent, half are crossovers of two.
All architectures of a generation are scored together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.space import Arch, Space
from squeeze_jax.ranges import Count, Positive, Share, Whole
from squeeze_jax.registry import checked

ROUNDS = 100  # tries to fill a generation with architectures within the budget


class Found(NamedTuple):
    """The result of a search.

    Attributes:
      arch: the best architecture.
      score, cost: its score and cost.
      queries: number of different architectures that were scored.
      history: [generations + 1] best score after each generation.
      archs: the best architectures, best first, at most `population` of them, with a leading axis.
    """

    arch: Arch
    score: float
    cost: float
    queries: int
    history: np.ndarray
    archs: Arch


@checked
def evolve(
    key: Any,
    space: Any,
    score: Any,
    cost: Any,
    budget: Positive,
    *,
    population: Count = 100,
    parents: Share = 0.25,
    rate: Positive = 0.1,
    generations: Whole = 30,
    canonical: Any = None,
) -> Found:
    """Returns the architecture with the largest score among those that were found within the budget.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      score: architectures with a leading axis n → array [n], larger is better.
      cost: the same → array [n], such as latencies in ms.
      budget: largest cost, in the unit of `cost`.
      population: number of architectures in each generation.
      parents: share of the population that has children, in (0, 1].
      rate: probability that a mutation draws a position anew.
      generations: number of generations after the first, random one.
      canonical: architectures with a leading axis → their canonical forms, see `encode.canonical`. Without it, copies of
        one network fill a generation where positions without effect differ.

    Raises:
      UserError: no architecture within the budget was found; the message has the smallest cost.
    """
    search = _Search(space, score, cost, budget, population, canonical)
    first_key, *keys = jax.random.split(key, generations + 1)
    archs = search.within_budget(first_key, _vectorised(space, _random))
    history = [search.add(archs)]
    child = _vectorised(space, functools.partial(_child, rate=rate))
    for generation_key in keys:
        elite = search.best(max(2, round(parents * population)))
        archs = search.within_budget(generation_key, child, elite)
        history.append(search.add(archs))
    arch, best, price = search.winner()
    queries, best_archs = len(search.scores), search.best(population)
    return Found(arch, best, price, queries, np.asarray(history), best_archs)


def _vectorised(space: Space, draw: Callable) -> Callable:
    """Returns (keys [n], nearness [], *others) → architectures with a leading axis.

    Args:
      space: the space.
      draw: (space, key, *others) → architecture. With nearness 1, each position of it becomes the smallest with a random
        probability, for budgets that most architectures exceed.
    """

    def draw_near(key, nearness, *others):
        key, rate_key, mask_key = jax.random.split(key, 3)
        arch = draw(space, key, *others)
        rate = nearness * jax.random.uniform(rate_key)
        keys = jax.random.split(mask_key, len(arch))
        pairs = zip(keys, arch, strict=True)
        smaller = (
            jnp.where(jax.random.uniform(k, f.shape) < rate, 0, f) for k, f in pairs
        )
        return space.arch_type(*smaller)

    @jax.jit
    def vectorised(keys, nearness, *others):
        return jax.vmap(lambda key: draw_near(key, nearness, *others))(keys)

    return vectorised


def _random(space: Space, key) -> Arch:
    return spaces.sample(space, key)


def _child(space: Space, key, elite: Arch, rate: float) -> Arch:
    """Returns a mutation of one parent or a crossover of two, with the same probability."""
    kind_key, parent_key, change_key = jax.random.split(key, 3)
    count = jax.tree.leaves(elite)[0].shape[0]
    first, second = jax.random.randint(parent_key, (2,), 0, count)
    one, other = (
        jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], elite) for i in (first, second)
    )
    mutated = spaces.mutate(space, change_key, one, rate)
    mixed = spaces.crossover(space, change_key, one, other)
    choice = jax.random.bernoulli(kind_key)
    return jax.tree.map(lambda a, b: jnp.where(choice, a, b), mutated, mixed)


class _Search:
    """All architectures that were scored."""

    def __init__(self, space, score, cost, budget, population, canonical):
        self._space, self._score, self._cost = space, score, cost
        self._budget, self._population = budget, population
        self._canonical = canonical or (lambda archs: archs)
        self.scores: dict[tuple, tuple[float, float, Arch]] = {}

    def within_budget(self, key, draw: Callable, *others) -> list[Arch]:
        """Returns a generation of architectures within the budget.

        Args:
          key: random key.
          draw: function of `_vectorised`.
          *others: its further arguments.

        Raises:
          UserError: none was found.
        """
        kept, lowest, nearness = [], np.inf, 0.0
        for round_key in jax.random.split(key, ROUNDS):
            keys = jax.random.split(round_key, self._population)
            archs = self._canonical(draw(keys, nearness, *others))
            costs = np.asarray(self._cost(archs))
            lowest = min(lowest, costs.min())
            rows = spaces.unstack(archs)
            kept += [rows[i] for i in np.flatnonzero(costs <= self._budget)]
            if len(kept) >= self._population:
                return kept[: self._population]
            if not kept:
                nearness = 1.0
                smallest = self._space.smallest()
                (price,) = self._cost(spaces.stack([smallest]))
                lowest = min(lowest, price)
                if price <= self._budget:
                    kept.append(smallest)
        if kept:
            return kept
        raise UserError(
            f"evolve: no architecture costs at most {self._budget:g}: the lowest cost found is {lowest:g}; raise the budget"
        )

    def add(self, archs: list[Arch]) -> float:
        """Scores architectures, and returns the best score so far."""
        new = {
            spaces.key_of(arch): arch
            for arch in archs
            if spaces.key_of(arch) not in self.scores
        }
        if new:
            together = spaces.stack(list(new.values()))
            scores = np.asarray(self._score(together), np.float64)
            costs = np.asarray(self._cost(together), np.float64)
            for (key, arch), s, c in zip(new.items(), scores, costs, strict=True):
                self.scores[key] = float(s), float(c), arch
        return max(score for score, _, _ in self.scores.values())

    def best(self, count: int) -> Arch:
        """Returns the best architectures, best first, with a leading axis."""
        ranked = sorted(self.scores.values(), key=lambda row: -row[0])[:count]
        return spaces.stack([row[2] for row in ranked])

    def winner(self) -> tuple[Arch, float, float]:
        """Returns the best architecture, its score and its cost."""
        score, cost, arch = max(self.scores.values(), key=lambda row: row[0])
        return arch, score, cost
