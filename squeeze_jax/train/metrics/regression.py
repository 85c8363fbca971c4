"""Regression metrics for one number per example: errors and correlations."""

import numpy as np

from squeeze_jax.train.metrics._metric import Metric
from squeeze_jax.train.metrics.glue import measure_regression, pearson, ranks

NAMES = ("eval_rmse", "eval_absolute_error", "eval_pearson", "eval_spearman")


def make(data=None) -> Metric:
    """Returns the metric with the scores "eval_loss" (the mean squared error) and `NAMES`.

    "eval_rmse" is the root of the mean squared error, and "eval_absolute_error" the mean absolute error; both have the unit
    of the labels. A correlation with a constant is 0.
    """
    lower = (*Metric._field_defaults["lower"], "eval_rmse", "eval_absolute_error")
    return Metric(measure_regression, score, "eval_rmse", NAMES, lower=lower)


def score(sums, rows):
    """Returns the scores of `make`; `rows` are "prediction" and "label", float [n]."""
    examples = max(sums["examples"], 1)
    predicted = np.asarray(rows["prediction"], np.float64)
    label = np.asarray(rows["label"], np.float64)
    squared = float(sums["loss"] / examples)
    return {
        "eval_loss": squared,
        "eval_rmse": squared**0.5,
        "eval_absolute_error": float(np.abs(predicted - label).sum() / examples),
        "eval_pearson": pearson(predicted, label),
        "eval_spearman": pearson(ranks(predicted), ranks(label)),
    }
