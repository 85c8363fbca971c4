"""Fits the latencies of pieces to the latencies of whole networks, for devices on which only whole networks can be timed.

The latency of a network is modelled as a sum over its features, such as the one-hot choices of its blocks. Their weights are
those with the least squares of relative errors, with a little ridge regularisation.
"""

from typing import Any

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.ranges import NonNegative
from squeeze_jax.registry import checked


@checked
def fit(features: Any, measured_ms: Any, ridge: NonNegative = 1e-3) -> np.ndarray:
    """Returns the weights [d] with which `features @ weights` predicts latencies in ms.

    Args:
      features: [n, d], such as `encode.one_hot` of architectures, and a column of ones.
      measured_ms: [n], the latencies of n networks, above 0.
      ridge: regularisation, relative to the mean square of the features.

    Raises:
      UserError: the shapes do not fit, or a latency is not above 0.
    """
    features, measured = np.asarray(features, float), np.asarray(measured_ms, float)
    if features.ndim != 2 or measured.shape != features.shape[:1]:
        raise UserError(
            f"additive.fit: features {list(features.shape)} and latencies {list(measured.shape)}: give [n, d] and [n]"
        )
    if not np.all((measured > 0) & np.isfinite(measured)):
        raise UserError("additive.fit: each latency should be a number above 0")
    shares = features / measured[:, None]
    squares = shares.T @ shares
    squares += ridge * np.trace(squares) / len(squares) * np.eye(len(squares))
    return np.linalg.solve(squares, shares.sum(0))
