"""Compares the outputs of an exported file with those of the live model, and finds the first stage that diverges."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from squeeze_jax.errors import Reported

MASKED = 1e30  # larger absolute values mark masked positions
INTEGER_STAGE_ERROR = (
    0.25  # relative RMS error of a stage that rounding to 8 bits cannot explain
)


class Disagreement(Reported, RuntimeError):
    """Raised when the outputs of an exported file differ from the live model's.

    Attributes:
      difference: largest |file output - live output|.
      output: name of the output with that difference.
      index: position of the difference, (example, class) or one number for each axis of the output.
      agreement: share of examples with the same top class.
      stage: the first diverging stage, or None if no stages were compared.
    """

    def __init__(
        self, file: str, verdict: "Verdict", stage: str | None, detail: str = ""
    ):
        self.difference, self.index = verdict.difference, verdict.index
        self.output, self.agreement = verdict.output, verdict.agreement
        self.stage = stage
        first = f"; the first diverging output is {stage}{detail}" if stage else detail
        remedy = (
            "; train longer, with a larger config.steps, or lower config.export.int8_agreement"
            if verdict.integer
            else ""
        )
        super().__init__(
            f"{file} disagrees with the live model: {verdict}{first}; kept as {file}.rejected{remedy}"
        )


class Verdict(NamedTuple):
    """The result of a comparison; its `str` is the sentence for an error message.

    Attributes:
      agrees: whether the file is within the limits.
      difference: the |file output - live output| that is largest relative to its allowed difference; infinite if the file
        gives NaN or infinity.
      output: name of the output with that difference.
      index: position of the difference in the output.
      model_value: the live model's value at that position.
      file_value: the file's value at that position.
      agreement: mean agreement of the examples, see `compare`.
      limit: the least agreement if `by_agreement` is set, otherwise the largest allowed difference.
      by_agreement: whether the agreement decided, and not the largest difference.
      integer: whether the file is in an integer format.
    """

    agrees: bool
    difference: float
    output: str
    index: tuple[int, ...]
    model_value: float
    file_value: float
    agreement: float
    limit: float
    by_agreement: bool
    integer: bool

    def __str__(self):
        place = ", ".join(map(str, self.index))
        largest = (
            f"largest difference {self.difference:.3g} at {self.output}[{place}]"
            f" (live {self.model_value:.4g}, file {self.file_value:.4g})"
        )
        if self.by_agreement:
            same = f"{self.agreement:.1%} agreement on the check examples"
            return f"{same}, at least {self.limit:.1%} wanted; {largest}"
        return f"{largest}, at most {self.limit:.3g} allowed"


def compare(
    model_outputs: Mapping[str, np.ndarray],
    file_outputs: Mapping[str, np.ndarray],
    *,
    integer: bool,
    tolerance: float,
    int8_agreement: float,
    agreement: Callable | None = None,
) -> Verdict:
    """Compares a file's outputs with the live model's.

    Args:
      model_outputs: {name: float32 [n, ...]} of the live model, finite.
      file_outputs: the same outputs from the file.
      integer: whether the agreement decides instead of the largest difference.
      tolerance: limit of max |file - live| / max |live| for each output; for an output that is zero everywhere, limit of
        max |file|.
      int8_agreement: least mean agreement of the examples, 0..1.
      agreement: (model_outputs, file_outputs) → float [n], the agreement 0..1 of each example. A task's own function, which
        float files have to satisfy too; or None for `same_answers`, which for float files follows from a small difference,
        except for ties.

    Raises:
      ValueError: the outputs have other names or shapes.
    """
    model_shapes, file_shapes = (
        {name: array.shape for name, array in outputs.items()}
        for outputs in (model_outputs, file_outputs)
    )
    if model_shapes != file_shapes:
        raise ValueError(
            f"the live outputs are {model_shapes}, the file's {file_shapes}"
        )
    finite = all(np.isfinite(v).all() for v in file_outputs.values())
    share = float(np.mean((agreement or same_answers)(model_outputs, file_outputs)))
    differences = []
    for name, values in model_outputs.items():
        difference, index = largest_difference(values, file_outputs[name])
        relative = difference / _limit(values, tolerance)
        differences.append((relative, difference, name, index))
    _, difference, name, index = max(differences)
    limit = _limit(model_outputs[name], tolerance)
    is_close = integer or difference <= limit
    same_enough = share >= int8_agreement or not (integer or agreement)
    by_agreement = integer or (is_close and not same_enough)
    return Verdict(
        agrees=finite and is_close and same_enough,
        difference=difference,
        output=name,
        index=index,
        model_value=float(model_outputs[name][index]),
        file_value=float(file_outputs[name][index]),
        agreement=share,
        limit=int8_agreement if by_agreement else limit,
        by_agreement=by_agreement,
        integer=integer,
    )


def same_answers(
    model_outputs: Mapping[str, np.ndarray], file_outputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the agreement of each example, float [n] in 0..1, for outputs that are class scores.

    The agreement is 1 if the top class, the argmax of the last axis, is the same, else 0. For outputs with several positions,
    such as a map of classes, it is the share of positions with the same top class. For several outputs it is the product of
    their agreements, so that a text span agrees only if both of its ends do. For a regression, an output [n, 1] or [n], it is
    1 - RMS(file - live) / RMS(live), at least 0, and the same for all examples.
    """
    agreements = [
        _same_output(model_outputs[k], file_outputs[k]) for k in model_outputs
    ]
    return np.prod(agreements, axis=0)


def _same_output(model_output: np.ndarray, file_output: np.ndarray) -> np.ndarray:
    """Returns the agreement of each example, float [n], for one output; see `same_answers`."""
    n = len(model_output)
    if model_output.shape[1:] in ((), (1,)):
        squares = (
            np.square(file_output.astype(np.float64) - model_output),
            np.square(model_output),
        )
        rms_error, rms = (np.sqrt(np.mean(s, dtype=np.float64)) for s in squares)
        agreement = 1 - rms_error / rms if rms_error else 1.0
        return np.full(n, np.nan_to_num(max(agreement, 0.0)))
    equal = model_output.argmax(-1) == file_output.argmax(-1)
    return equal.reshape(n, -1).mean(1)


def largest_difference(model_output: np.ndarray, file_output: np.ndarray):
    """Returns (max |file - live|, its index); the difference is infinite where the file gives NaN or infinity."""
    difference = np.abs(file_output.astype(np.float64) - model_output)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    index = np.unravel_index(difference.argmax(), difference.shape)
    return float(difference[index]), tuple(map(int, index))


def first_diverging(
    model_outputs: Mapping[str, np.ndarray],
    file_outputs: Mapping[str, np.ndarray],
    *,
    integer: bool,
    tolerance: float,
) -> tuple[str, float] | None:
    """Finds the first stage whose outputs differ between the file and the live model.

    A float stage diverges if it exceeds the tolerance of `compare`. An integer stage diverges if its relative RMS error is
    above a quarter, several times the error of rounding to 8 bits. Positions where the live model has the lowest float, which
    marks masked positions, are not compared.

    Args:
      model_outputs: {stage: outputs} of the live model, first to last.
      file_outputs: {stage: outputs} of the file.
      integer: whether the limit for integer stages applies.
      tolerance: as in `compare`.

    Returns:
      (name, largest difference) of the stage, or None if all stages agree.
    """
    for name, expected in model_outputs.items():
        actual = file_outputs[name]
        if expected.shape != actual.shape:
            return name, float("inf")
        visible = np.abs(expected) < MASKED
        expected, actual = np.where(visible, expected, 0), np.where(visible, actual, 0)
        difference, _ = largest_difference(expected, actual)
        if integer:
            error = np.sqrt(np.mean((actual.astype(np.float64) - expected) ** 2))
            scale = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
            diverges = not error <= INTEGER_STAGE_ERROR * scale
        else:
            diverges = difference > _limit(expected, tolerance)
        if diverges:
            return name, difference
    return None


def _limit(model_output: np.ndarray, tolerance: float) -> float:
    """Returns the largest allowed difference: the tolerance times the output's largest absolute value."""
    return tolerance * (float(np.abs(model_output).max(initial=0)) or 1.0)
