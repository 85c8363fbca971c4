"""Whether a file computes what the live model computes, and where it first does not."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from squeeze_jax.errors import Reported

UNSEEN = 1e30  # beyond this a number stands for what may not be seen
INTEGER_STAGE_ERROR = 0.25  # relative RMS error of a stage beyond what 8 bits explain


class Disagreement(Reported, RuntimeError):
    """An exported file does not compute what the live model computes.

    Attributes:
      difference: largest |file - live| of the outputs.
      output: which has it.
      index: (example, class) of it, or as many numbers as the output has axes.
      agreement: share of examples with the same top class.
      stage: the first diverging output, or None where no stages were given.
    """

    def __init__(self, file: str, verdict: "Verdict", stage: str | None, why: str = ""):
        self.difference, self.index = verdict.difference, verdict.index
        self.output, self.agreement = verdict.output, verdict.agreement
        self.stage = stage
        first = f"; the first diverging output is {stage}{why}" if stage else why
        remedy = (
            "; train longer, with a larger config.steps, or lower config.export.int8_agreement"
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
      difference: |file - live| that is the largest part of what is allowed; infinite where the file gives no number.
      output: name of the output that has it.
      index: position of it.
      live: the live value there.
      found: the file's value there.
      agreement: see `compare`.
      limit: the largest difference allowed, or the least agreement.
      by_agreement: which of the two.
      integer: whether the file is one of integers.
    """

    agrees: bool
    difference: float
    output: str
    index: tuple[int, ...]
    live: float
    found: float
    agreement: float
    limit: float
    by_agreement: bool
    integer: bool

    def __str__(self):
        place = ", ".join(map(str, self.index))
        largest = (
            f"largest difference {self.difference:.3g} at {self.output}[{place}]"
            f" (live {self.live:.4g}, file {self.found:.4g})"
        )
        if self.by_agreement:
            same = f"{self.agreement:.1%} agreement on the check examples"
            return f"{same}, at least {self.limit:.1%} wanted; {largest}"
        return f"{largest}, at most {self.limit:.3g} allowed"


def compare(
    live: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    *,
    integer: bool,
    tolerance: float,
    int8_agreement: float,
    agreement: Callable | None = None,
) -> Verdict:
    """Compares a file's outputs with the live model's.

    Args:
      live: {name: float32 [n, ...]}, finite.
      found: the same from the file.
      integer: judge by the agreement instead of the largest difference.
      tolerance: max |found - live| ≤ tolerance · max |live| of each output; of one that is zero everywhere ≤ tolerance.
      int8_agreement: least mean agreement of the examples, 0..1.
      agreement: (live, found) → float [n], 0..1, of each example; the task's own, which float files have to reach too, or
        None for `same_answers`, which follows from the difference but for ties.
    """
    shapes = [{k: v.shape for k, v in each.items()} for each in (live, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the live outputs are {shapes[0]}, the file's {shapes[1]}")
    finite = all(np.isfinite(v).all() for v in found.values())
    share = float(np.mean((agreement or same_answers)(live, found)))
    worst = []
    for name, values in live.items():
        difference, index = largest_difference(values, found[name])
        worst.append((difference / _limit(values, tolerance), difference, name, index))
    _, difference, name, index = max(worst)
    limit = _limit(live[name], tolerance)
    near = integer or difference <= limit
    alike = share >= int8_agreement or not (integer or agreement)
    by_agreement = integer or (near and not alike)
    return Verdict(
        finite and near and alike,
        *(difference, name, index),
        *(float(live[name][index]), float(found[name][index])),
        *(share, int8_agreement if by_agreement else limit, by_agreement, integer),
    )


def same_answers(
    live: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the agreement of each example [n], 0..1, for outputs that are class scores.

    It is whether the top class, the argmax of the last axis, is the same; of several positions, as of a map of classes, the
    share where it is; of several outputs the product, so that a span agrees where both of its ends do. Of a regression,
    an output [n, 1], it is 1 - RMS(found - live) / RMS(live), at least 0.
    """
    return np.prod([_same(live[k], found[k]) for k in live], axis=0)


def _same(live: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The agreement of each example [n], of one output."""
    if live.shape[1:] in ((), (1,)):
        errors = np.square(found.astype(np.float64) - live), np.square(live)
        wrong, size = (np.sqrt(np.mean(e, dtype=np.float64)) for e in errors)
        right = 1 - wrong / size if wrong else 1.0
        return np.full(len(live), np.nan_to_num(max(right, 0.0)))
    equal = live.argmax(-1) == found.argmax(-1)
    return equal.reshape(len(live), -1).mean(1)


def largest_difference(live: np.ndarray, found: np.ndarray):
    """Returns (max |found - live|, its index); where the file gives no number the difference is infinite."""
    difference = np.abs(found.astype(np.float64) - live)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    index = np.unravel_index(difference.argmax(), difference.shape)
    return float(difference[index]), tuple(map(int, index))


def first_diverging(
    live: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    *,
    integer: bool,
    tolerance: float,
) -> tuple[str, float] | None:
    """Finds the first stage that a file computes differently.

    A float stage diverges beyond the tolerance of `compare`; an integer one when its relative RMS error is above a
    quarter, several times what rounding to 8 bits gives. Where a stage is the lowest float, which stands for what may
    not be seen, any number as low is right.

    Args:
      live: stage outputs by name, first to last.
      found: the file's.
      integer: which of the two limits.
      tolerance: as in `compare`.

    Returns:
      (name, largest difference) of the stage, or None where all agree.
    """
    for name, expected in live.items():
        got = found[name]
        if expected.shape != got.shape:
            return name, float("inf")
        seen = np.abs(expected) < UNSEEN
        expected, got = np.where(seen, expected, 0), np.where(seen, got, 0)
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
    """The largest difference that is allowed: relative to the output's own largest number."""
    return tolerance * (float(np.abs(live).max(initial=0)) or 1.0)
