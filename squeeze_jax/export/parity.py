"""Whether a file computes what the live model computes, and where it first does not."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from squeeze_jax.errors import Reported

INTEGER_STAGE_ERROR = 0.25  # relative RMS error of a stage beyond what 8 bits explain


class Disagreement(Reported, RuntimeError):
    """An exported file does not compute what the live model computes.

    Attributes:
      difference: largest |file - live| of the logits.
      index: (image, class) of it.
      agreement: share of images with the same top class.
      stage: the first diverging output, or None where no stages were given.
    """

    def __init__(self, file: str, verdict: "Verdict", stage: str | None, why: str = ""):
        self.difference, self.index = verdict.difference, verdict.index
        self.agreement, self.stage = verdict.agreement, stage
        first = f"; first diverging output: {stage or 'logits'}{why}"
        remedy = (
            "; train longer, or lower config.export.int8_agreement"
            if verdict.integer
            else ""
        )
        super().__init__(
            f"{file} disagrees with the live model: {verdict}{first}; kept as {file}.rejected{remedy}"
        )


class Verdict(NamedTuple):
    """What a comparison found; `str` of it is the sentence for an error.

    Attributes:
      agrees: within the limit.
      difference: largest |file - live|; infinite where the file gives no number.
      index: position of it.
      live: the live value there.
      found: the file's value there.
      agreement: share of images with the same top class.
      limit: the largest difference allowed, or for integer files the least agreement.
      integer: which of the two.
    """

    agrees: bool
    difference: float
    index: tuple[int, ...]
    live: float
    found: float
    agreement: float
    limit: float
    integer: bool

    def __str__(self):
        place = ", ".join(map(str, self.index))
        largest = (
            f"largest difference {self.difference:.3g} at [image, class] = [{place}]"
            f" (live {self.live:.4g}, file {self.found:.4g})"
        )
        if self.integer:
            same = f"same top class on {self.agreement:.1%} of the check images"
            return f"{same}, at least {self.limit:.1%} wanted; {largest}"
        return f"{largest}, at most {self.limit:.3g} allowed"


def compare(
    live: np.ndarray,
    found: np.ndarray,
    *,
    integer: bool,
    tolerance: float,
    int8_agreement: float,
) -> Verdict:
    """Compares a file's logits with the live model's.

    Args:
      live: float32 [n, classes], finite.
      found: the same from the file.
      integer: judge by the top class instead of the largest difference.
      tolerance: max |found - live| ≤ tolerance · max(1, max |live|).
      int8_agreement: least share of equal top classes, 0..1.
    """
    if live.shape != found.shape:
        raise ValueError(f"live logits are {live.shape}, the file's {found.shape}")
    difference, index = largest_difference(live, found)
    agreement = float(np.mean(live.argmax(-1) == found.argmax(-1)))
    finite = bool(np.isfinite(found).all())
    if integer:
        limit = int8_agreement
        agrees = finite and agreement >= limit
    else:
        limit = _limit(live, tolerance)
        agrees = finite and difference <= limit
    at = (float(live[index]), float(found[index]))
    return Verdict(agrees, difference, index, *at, agreement, limit, integer)


def largest_difference(live: np.ndarray, found: np.ndarray):
    """Returns (max |found - live|, its index); where the file gives no number the difference is infinite."""
    difference = np.abs(found.astype(np.float64) - live)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    index = np.unravel_index(difference.argmax(), difference.shape)
    return float(difference[index]), tuple(map(int, index))


def first_diverging(
    live: Mapping[str, np.ndarray],
    found: tuple[np.ndarray, ...],
    *,
    integer: bool,
    tolerance: float,
) -> tuple[str, float] | None:
    """Finds the first stage that a file computes differently.

    A float stage diverges beyond the tolerance of `compare`; an integer one when its relative RMS error is above a
    quarter, several times what rounding to 8 bits gives.

    Args:
      live: stage outputs by name, first to last.
      found: the file's, in the same order.
      integer: which of the two limits.
      tolerance: as in `compare`.

    Returns:
      (name, largest difference) of the stage, or None where all agree.
    """
    for (name, expected), got in zip(live.items(), found, strict=True):
        if expected.shape != got.shape:
            return name, float("inf")
        difference, _ = largest_difference(expected, got)
        if integer:
            error = np.sqrt(np.mean((got.astype(np.float64) - expected) ** 2))
            scale = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
            diverges = not error <= INTEGER_STAGE_ERROR * scale
        else:
            diverges = difference > _limit(expected, tolerance)
        if diverges:
            return name, difference
    return None


def _limit(live: np.ndarray, tolerance: float) -> float:
    return tolerance * max(1.0, float(np.abs(live).max()))
