"""The neural predictor in two stages: a classifier rejects bad architectures, and a regressor ranks the others.

Wen, Liu, Li, Chen, Bender, Kindermans 2020, arXiv 1912.00848. Few architectures with very low accuracies determine most of the
squared error, so one regressor ranks the best ones badly. Here a classifier learns whether the score lies above a threshold,
and the regressor learns only from those above it. Both are networks of `predict_graph`. The paper chooses the threshold by
hand from a histogram, 91% on NASBench-101.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nas import ensemble, predict_graph


class TwoStage(NamedTuple):
    """A trained predictor.

    Attributes:
      classifier: its predictions are the logits of a score above the threshold.
      regressor: trained on scores above the threshold.
      threshold: the threshold.
    """

    classifier: predict_graph.Predictor
    regressor: predict_graph.Predictor
    threshold: jax.Array


def fit(
    key: Any, adjacency: Any, nodes: Any, scores: Any, threshold: Any, **options: Any
) -> TwoStage:
    """Returns a predictor; `jax.jit` and `jax.vmap` apply to the function.

    Args:
      key: random key; the same key gives the same predictor.
      adjacency, nodes, scores: as for `predict_graph.fit`.
      threshold: scores above it are good, in the unit of the scores.
      **options: further options of `predict_graph.fit`, for both networks.

    Raises:
      UserError: see `predict_graph.fit`; or fewer than two scores lie above the threshold, or none below.
    """
    place = "predict_two_stage.fit"
    scores = ensemble.check_scores(scores, len(scores), place)
    if taken := {"loss", "weights"} & options.keys():
        raise UserError(f"{place} has no argument {min(taken)!r}")
    good = scores > threshold
    if not isinstance(good, jax.core.Tracer):
        above = np.count_nonzero(good)
        if not 2 <= above < len(scores):
            raise UserError(
                f"{place}: threshold = {threshold:g}, but {above} of {len(scores)} scores lie above it: choose one between"
                f" {np.min(scores):g} and {np.max(scores):g}"
            )
    good = good.astype(jnp.float32)
    classifier_key, regressor_key = jax.random.split(key)
    graphs = adjacency, nodes
    return TwoStage(
        predict_graph.fit(classifier_key, *graphs, good, loss="logistic", **options),
        predict_graph.fit(regressor_key, *graphs, scores, weights=good, **options),
        jnp.asarray(threshold, jnp.float32),
    )


def predict(predictor: TwoStage, adjacency: Any, nodes: Any) -> jax.Array:
    """Returns scores [n] in which each rejected architecture ranks below each accepted one.

    An accepted architecture has the regressor's prediction r where it exceeds the threshold t, and otherwise
    t - s (1 - exp((r - t) / s)), which exceeds t - s; s is the standard deviation of the scores above the threshold. A rejected
    one has t - s (2 - p), with the classifier's probability p of at most 1/2.

    Args:
      predictor: what `fit` returned.
      adjacency, nodes: as for `fit`.

    Raises:
      UserError: the shapes do not fit.
    """
    logits = predict_graph.predict(predictor.classifier, adjacency, nodes)
    regression = predict_graph.predict(predictor.regressor, adjacency, nodes)
    scale, threshold = predictor.regressor.scale, predictor.threshold
    excess = (regression - threshold) / scale
    accepted = threshold + scale * jax.nn.elu(excess)
    rejected = threshold - scale * (2 - jax.nn.sigmoid(logits))
    return jnp.where(logits > 0, accepted, rejected)
