"""The log of a search: the architectures that were scored, in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.space import Arch, Space

ROUNDS = 100  # tries to find architectures that were not scored yet


class Queries(NamedTuple):
    """The result of a search.

    Attributes:
      archs: the different architectures that were scored, in order, with a leading axis.
      scores: their scores, float64 [queries].
    """

    archs: Arch
    scores: np.ndarray

    @property
    def best(self) -> int:
        """Returns the place of the largest score."""
        return int(np.argmax(self.scores))

    @property
    def arch(self) -> Arch:
        """Returns the architecture with the largest score."""
        return jax.tree.map(lambda a: a[self.best], self.archs)

    @property
    def score(self) -> float:
        """Returns the largest score."""
        return float(self.scores[self.best])

    @property
    def history(self) -> np.ndarray:
        """Returns the largest score after each query, [queries]."""
        return np.maximum.accumulate(self.scores)


class Log:
    """Scores architectures, each only once."""

    def __init__(
        self,
        space: Space,
        score: Callable[[Arch], Any],
        within: Callable[[Arch], Any] | None = None,
        canonical: Callable[[Arch], Arch] | None = None,
    ):
        """Starts an empty log.

        Args:
          space: the space.
          score: architectures with a leading axis n → array [n].
          within: architectures with a leading axis n → bool [n]: whether they meet the limits; None if all do.
          canonical: architectures with a leading axis → their canonical forms, see `encode.canonical`; None if no two
            architectures are the same network.
        """
        self._space, self._score, self._within = space, score, within
        self._canonical = canonical or (lambda archs: archs)
        self._scores: dict[tuple, float] = {}

    def __len__(self) -> int:
        """Returns the number of architectures that were scored."""
        return len(self._scores)

    def __contains__(self, row: tuple) -> bool:
        """Whether an architecture, as `space.key_of` writes it, was scored."""
        return row in self._scores

    def score(self, archs: Arch) -> np.ndarray:
        """Returns the scores [n] of architectures with a leading axis; only new ones are computed.

        Raises:
          UserError: the scores have another shape.
        """
        keys = spaces.keys_of(archs)
        new = list(dict.fromkeys(k for k in keys if k not in self._scores))
        if new:
            scores = np.asarray(self._score(self.archs(new)), np.float64)
            if scores.shape != (len(new),):
                raise UserError(
                    f"score returns the shape {list(scores.shape)} for {len(new)} architectures: it should be [{len(new)}]"
                )
            self._scores.update(zip(new, scores.tolist(), strict=True))
        return np.asarray([self._scores[k] for k in keys])

    def allowed(self, archs: Arch) -> list[tuple]:
        """Returns the keys of the architectures that meet the limits, see `space.key_of`; each key is of the canonical form."""
        archs = jax.device_get(self._canonical(archs))
        keys = spaces.keys_of(archs)
        if self._within is None:
            return keys
        met = np.asarray(self._within(archs))
        return [key for key, meets in zip(keys, met, strict=True) if meets]

    def archs(self, keys: list[tuple]) -> Arch:
        """Returns architectures with a leading axis, from their keys, see `space.key_of`."""
        ends = np.cumsum([len(sizes) for sizes in self._space.sizes])
        flat = np.asarray(keys, np.int32).reshape(len(keys), ends[-1])
        fields = np.split(flat, ends[:-1], axis=1)
        return self._space.arch_type(*fields)

    def new(self, key: jax.Array, count: int) -> Arch:
        """Returns different random architectures within the limits that were not scored, with a leading axis.

        They are fewer than `count` if no more are found.

        Raises:
          UserError: none that was drawn meets the limits.
        """
        draw = jax.vmap(lambda k: spaces.sample(self._space, k))
        found = {}
        for round_key in jax.random.split(key, ROUNDS):
            keys = self.allowed(draw(jax.random.split(round_key, count)))
            found.update(dict.fromkeys(k for k in keys if k not in self))
            if len(found) >= count:
                break
        if self._within and not found and not self._scores:
            raise UserError(
                f"none of {ROUNDS * count:,} random architectures meets the limits: choose the method 'evolution', which goes on from"
                " the smallest one"
            )
        return self.archs(list(found)[:count])

    def result(self) -> Queries:
        """Returns all architectures and their scores."""
        scores = np.asarray(list(self._scores.values()))
        return Queries(self.archs(list(self._scores)), scores)
