"""Finds ranges of activations for 8-bit integers that balance clipping and rounding errors.

The smallest and largest values of all examples would waste most of the 256 steps on rare outliers, and their averages over
examples would clip large values. Here a range [a, b] minimises the expected squared error of a value x (Nagel et al. 2021,
https://arxiv.org/abs/2106.08295, section 3.1): Δ² / 12 for x inside the range, with the step Δ = (b - a) / 255, and the
squared distance to the range for x outside.
"""

import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

BINS = 2048
STEPS = 255
# Candidate ends of a range, as fractions of the observed extremes.
SHRINK = np.linspace(0.3, 1.0, 36)
PADDING = 1e30  # larger absolute values are padding and not activations: a max pool pads with the lowest float
# The range of masked scores before a softmax starts at least this far below the lower and the upper end of the unmasked scores.
BELOW_LOW, BELOW_HIGH = 4.0, 10.0
MASK = 1000.0  # subtracted from masked scores in the integer file, instead of adding the lowest float
SAMPLED = 65536  # approximate number of values of a tensor and example that enter its histogram


def collect(
    run: Callable[[Any], Mapping[str, np.ndarray]],
    examples: Iterable[Any],
    attending: Mapping[str, Collection[str]] = types.MappingProxyType({}),
) -> dict[str, tuple[float, float]]:
    """Finds the range of every tensor that a network computes on examples.

    Attention adds the lowest float to the scores of masked positions. Such values are excluded from the ranges, but the
    following softmax must still give them almost no weight. So the range of its input extends below the lowest score.

    Args:
      run: function of an example that returns `{name: values}`; called twice for each example.
      examples: the examples; iterated over twice.
      attending: {input tensor of a softmax: the tensors whose sum it is}.

    Returns:
      `{name: (a, b)}` with a ≤ 0 ≤ b, because zero must be exact (it is used for padding).
    """
    extremes: dict[str, tuple[float, float]] = {}
    masked = set()
    for example in examples:
        for name, values in run(example).items():
            if values.min(initial=0) < -PADDING:
                masked.add(name)
            values = values[np.abs(values) < PADDING]
            low, high = extremes.get(name, (0.0, 0.0))
            low = min(low, float(values.min(initial=0)))
            extremes[name] = low, max(high, float(values.max(initial=0)))
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}
    for example in examples:
        for name, values in run(example).items():
            counts[name] += histogram(values, *extremes[name])
    ranges = {name: least_error(counts[name], *extremes[name]) for name in extremes}
    for name, terms in attending.items():
        # A term that is zero apart from padding is a mask, even if it masks nothing in these examples.
        zero_terms = {t for t in terms if extremes.get(t) == (0.0, 0.0)}
        masked |= zero_terms | ({name} if zero_terms else set())
    for name in masked & ranges.keys():
        low, high = ranges[name]
        if name in attending:
            ranges[name] = min(low - BELOW_LOW, high - BELOW_HIGH), high
        elif extremes[name] == (0.0, 0.0):  # the mask itself
            ranges[name] = -MASK, 0.0
    return ranges


def histogram(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns a histogram of values over `BINS` equal parts of [low, high], int [BINS].

    Of a large array only every k-th value is counted. Padding is excluded, and so are zeros: any range represents them
    exactly, and after a ReLU they are many.
    """
    values = values.reshape(-1)[:: max(1, values.size // SAMPLED)]
    values = values[(values != 0) & (np.abs(values) < PADDING)]
    scale = BINS / (high - low) if high > low else 0.0
    bins = ((values - low) * scale).astype(np.int64).clip(0, BINS - 1)
    return np.bincount(bins, minlength=BINS)


def least_error(
    counts: np.ndarray, low: float, high: float, steps: int = STEPS
) -> tuple[float, float]:
    """Returns the range within [low, high] with the least expected squared error.

    Args:
      counts: histogram of the values over equal parts of [low, high].
      low: smallest value, at most 0.
      high: largest value, at least 0.
      steps: number of steps of the integer format, 255 for 8 bits.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    least, best_range = np.inf, (low, high)
    for a in low * SHRINK[::-1] if low < 0 else [0.0]:
        for b in high * SHRINK[::-1] if high > 0 else [0.0]:
            outside = np.maximum(centers - b, 0) + np.maximum(a - centers, 0)
            rounding = ((b - a) / steps) ** 2 / 12
            error = (counts * np.where(outside > 0, outside**2, rounding)).sum()
            if error < least:
                least, best_range = error, (float(a), float(b))
    return best_range
