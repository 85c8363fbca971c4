"""Random search: scores different random architectures, and returns all of them."""

from typing import Any

from squeeze_jax.nas.queries import Log, Queries
from squeeze_jax.ranges import Count
from squeeze_jax.registry import checked


@checked
def search(
    key: Any,
    space: Any,
    score: Any,
    *,
    queries: Count = 1000,
    within: Any = None,
    canonical: Any = None,
) -> Queries:
    """Returns the architectures that were scored; `arch` and `score` of the result are the best.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      score: architectures with a leading axis n → array [n], larger is better.
      queries: number of architectures to score; fewer if the space has no more.
      within, canonical: the limits and the form of architectures, see `queries.Log`.

    Raises:
      UserError: no architecture within the limits was found.
    """
    log = Log(space, score, within, canonical)
    log.score(log.new(key, queries))
    return log.result()
