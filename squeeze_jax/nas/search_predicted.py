"""Search with a predictor: random architectures train it, and the architectures that it ranks best are scored.

Wen, Liu, Li, Chen, Bender, Kindermans 2020, arXiv 1912.00848: score N random architectures, fit a predictor to them, predict
the scores of many other architectures, and score the K best of these.
"""

import itertools
import math
from typing import Any

import jax
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas.queries import Log, Queries
from squeeze_jax.ranges import Count
from squeeze_jax.registry import checked


@checked
def search(
    key: Any,
    space: Any,
    score: Any,
    fit: Any,
    *,
    queries: Count = 1000,
    samples: Count = 500,
    candidates: Count = 100_000,
) -> Queries:
    """Returns the architectures that were scored; `arch` and `score` of the result are the best.

    Args:
      key: random key; the same key gives the same result.
      space: the space.
      score: architectures with a leading axis n → array [n], larger is better; called twice.
      fit: (key, architectures with a leading axis n, scores [n]) → a function from architectures to predicted scores, such as
        one of `predict_mlp.fit` and `predict_mlp.predict`.
      queries: number of architectures to score in all.
      samples: how many of them are random and train the predictor; the others are those that it ranks best.
      candidates: number of architectures whose scores are predicted: random ones, or all of the space if it has no more.

    Raises:
      UserError: `samples` is larger than `queries`, or the predictions have another shape.
    """
    if samples > queries:
        raise UserError(
            f"search_predicted: samples = {samples}, but queries = {queries}: samples should be at most that"
        )
    sample_key, fit_key, candidate_key = jax.random.split(key, 3)
    log = Log(space, score)
    archs = log.new(sample_key, samples)
    predict = fit(fit_key, archs, log.score(archs))
    if math.prod(np.concatenate(list(space.sizes)).tolist()) <= candidates:
        choices = (range(n) for n in np.concatenate(list(space.sizes)))
        others = log.archs([r for r in itertools.product(*choices) if r not in log])
    else:
        others = log.new(candidate_key, candidates)
    count = len(others[0])
    if count and queries > samples:
        predicted = np.asarray(predict(others))
        if predicted.shape != (count,):
            raise UserError(
                f"search_predicted: the predictor returns the shape {list(predicted.shape)} for {count} architectures"
            )
        chosen = np.argsort(-predicted, kind="stable")[: queries - samples]
        log.score(jax.tree.map(lambda a: a[chosen], others))
    return log.result()
