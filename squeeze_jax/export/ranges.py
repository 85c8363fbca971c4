"""Ranges of activations for 8-bit integers: as wide as the values need, as narrow as the rounding error wants.

The least and greatest values ever seen waste most of the 256 steps on rare outliers, and their averages over images cut
large values off. Here a range [a, b] minimises the expected squared error of a value x (Nagel et al. 2021,
https://arxiv.org/abs/2106.08295, section 3.1): Δ² / 12 inside, with the step Δ = (b - a) / 255, and the squared distance to
the range outside.
"""

import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

BINS = 2048
STEPS = 255
SHRINK = np.linspace(
    0.3, 1.0, 36
)  # candidate ends of a range, as shares of the seen ones
PADDING = 1e30  # a maximum is padded with the least float, which is no activation
# Where a softmax reads masked scores, a range reaches this far below the lowest and the highest one seen.
BELOW_LOW, BELOW_HIGH = 4.0, 10.0
MASK = 1000.0  # what is added to a masked score, instead of the lowest float
SAMPLED = 65536  # values of one tensor and example that enter its histogram, about


def collect(
    run: Callable[[Any], Mapping[str, np.ndarray]],
    examples: Iterable[Any],
    attending: Mapping[str, Collection[str]] = types.MappingProxyType({}),
) -> dict[str, tuple[float, float]]:
    """Finds the range of every tensor that a network computes on examples.

    Attention adds the lowest float to the scores of what may not be seen. Such numbers enter no range, but the softmax
    that follows must still make nearly nothing of them: the ranges of what it reads go on below the lowest score.

    Args:
      run: an example → `{name: values}`; called twice for each example.
      examples: may be iterated over twice.
      attending: {tensor that a softmax reads: those that it is the sum of}.

    Returns:
      `{name: (a, b)}` with a ≤ 0 ≤ b, because zero has to be exact (it pads).
    """
    seen: dict[str, tuple[float, float]] = {}
    masked = set()
    for example in examples:
        for name, values in run(example).items():
            if values.min(initial=0) < -PADDING:
                masked.add(name)
            values = values[np.abs(values) < PADDING]
            low, high = seen.get(name, (0.0, 0.0))
            ends = float(values.min(initial=0)), float(values.max(initial=0))
            seen[name] = min(low, ends[0]), max(high, ends[1])
    counts = {name: np.zeros(BINS, np.int64) for name in seen}
    for example in examples:
        for name, values in run(example).items():
            counts[name] += histogram(values, *seen[name])
    found = {name: least_error(counts[name], *seen[name]) for name in seen}
    for name, terms in attending.items():
        hiding = {t for t in terms if seen.get(t) == (0.0, 0.0)}
        masked |= hiding | ({name} if hiding else set())  # also where all was seen
    for name in masked & found.keys():
        low, high = found[name]
        if name in attending:
            found[name] = min(low - BELOW_LOW, high - BELOW_HIGH), high
        elif seen[name] == (0.0, 0.0):  # what is added
            found[name] = -MASK, 0.0
    return found


def histogram(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Counts values in `BINS` equal parts of [low, high]; of a large array only every k-th one.

    Zeros are left out: any range represents them exactly, and after a ReLU they are many. So is padding.
    """
    values = values.reshape(-1)[:: max(1, values.size // SAMPLED)]
    values = values[(values != 0) & (np.abs(values) < PADDING)]
    scale = BINS / (high - low) if high > low else 0.0
    bins = ((values - low) * scale).astype(np.int64).clip(0, BINS - 1)
    return np.bincount(bins, minlength=BINS)


def least_error(
    counts: np.ndarray, low: float, high: float, steps: int = STEPS
) -> tuple[float, float]:
    """Returns the range in [low, high] of least expected squared error.

    Args:
      counts: histogram of the values over equal parts of [low, high].
      low: least value, at most 0.
      high: greatest value, at least 0.
      steps: number of steps of the integer format, 255 for 8 bits.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    best, found = np.inf, (low, high)
    for a in low * SHRINK[::-1] if low < 0 else [0.0]:
        for b in high * SHRINK[::-1] if high > 0 else [0.0]:
            outside = np.maximum(centers - b, 0) + np.maximum(a - centers, 0)
            rounding = ((b - a) / steps) ** 2 / 12
            error = (counts * np.where(outside > 0, outside**2, rounding)).sum()
            if error < best:
                best, found = error, (float(a), float(b))
    return found
