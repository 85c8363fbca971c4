"""Evaluations, one a file: what is measured of each batch, and the scores that come of it."""

from squeeze_jax.train.metrics._metric import Metric

__all__ = ["Metric"]
