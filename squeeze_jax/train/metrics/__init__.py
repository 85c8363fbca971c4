"""Evaluation metrics, one per file: what to measure on each batch, and how to compute scores from it."""

from squeeze_jax import registry
from squeeze_jax.train.metrics._metric import Metric, check_scores

__all__ = ["Metric", "check_scores", *registry.names(__name__)]
__getattr__ = registry.late(__name__, {name: f"{name}:." for name in __all__})
