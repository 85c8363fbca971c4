"""Records the evaluation scores of a work directory's checkpoints, and finds the best checkpoint.

All scores stand in one file beside the checkpoints, `scores.json`. They cannot be part of a checkpoint, because a state is
saved before it is evaluated, so that a failing evaluation loses no training.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from squeeze_jax import files

NAME = "scores.json"
# Earlier versions wrote the scores of a step to the file STEP/metrics/metrics.
_OLD_PLACE = ("metrics", "metrics")


class Scores:
    """The evaluation scores of each step; `step in scores` tells whether a step was evaluated."""

    def __init__(self, directory: Path, best: str, *, lowest: bool):
        """Reads the scores on disk, and warns of damaged files; a step whose scores cannot be read counts as not evaluated.

        Args:
          directory: the directory of the checkpoints.
          best: name of the score that decides which step is the best.
          lowest: whether the lowest value is the best; otherwise the highest is.
        """
        self._path, self._best = directory / NAME, best
        self._sign = -1.0 if lowest else 1.0
        self._scores = _read(self._path)
        for old in directory.glob("[0-9]*/" + "/".join(_OLD_PLACE)):
            if not isinstance(_parse(old), dict):
                step = old.parents[1].name
                warnings.warn(
                    f"{old} is damaged: step {step} counts as not evaluated",
                    stacklevel=2,
                )

    def __contains__(self, step: int) -> bool:
        return self._scores_of(step) is not None

    def record(
        self, step: int, scores: Mapping[str, float], kept: Sequence[int]
    ) -> None:
        """Writes the scores of a step to disk.

        Args:
          step: the evaluated step.
          scores: the scores by name.
          kept: the steps that have a checkpoint; scores of other steps are dropped.

        Raises:
          UserError: the file cannot be written.
        """
        self._scores = {k: v for k, v in self._scores.items() if k in kept}
        self.remember(step, scores)
        text = {str(k): v for k, v in sorted(self._scores.items())}
        files.write(self._path, json.dumps(text, indent=1) + "\n")

    def remember(self, step: int, scores: Mapping[str, float]) -> None:
        """Keeps the scores of a step in memory only; in a run of several processes only the first one writes them."""
        self._scores[step] = dict(scores)

    def best(self, steps: Sequence[int]) -> int | None:
        """Returns the step whose score is the best, ignoring scores that are not finite; None if there is no such step."""
        values = {}
        for step in steps:
            value = (self._scores_of(step) or {}).get(self._best)
            if isinstance(value, int | float) and math.isfinite(value):
                values[step] = self._sign * value
        return max(values, key=values.get) if values else None

    def _scores_of(self, step: int) -> Mapping[str, float] | None:
        """Returns the scores of a step, also from a file of an earlier version; None if it has none."""
        if step not in self._scores:
            old = self._path.parent.joinpath(str(step), *_OLD_PLACE)
            scores = _parse(old) if old.is_file() else None
            if isinstance(scores, dict) and scores:
                self._scores[step] = scores
        return self._scores.get(step)


def _read(path: Path) -> dict[int, Mapping[str, float]]:
    """Reads `scores.json`; returns {} without a file, and warns and returns {} for a damaged one."""
    if not path.is_file():
        return {}
    content = _parse(path)
    try:
        return {int(step): dict(scores) for step, scores in content.items()}
    except (AttributeError, TypeError, ValueError):
        warnings.warn(
            f"{path} is damaged: no checkpoint before the next evaluation counts as the best",
            stacklevel=2,
        )
        return {}


def _parse(path: Path):
    """Returns the content of a JSON file; None if it is damaged."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None
