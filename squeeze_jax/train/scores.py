"""The scores of a work directory's checkpoints: which evaluations were done, and which checkpoint is the best.

They stand in one file beside the checkpoints, `scores.json`: a state is saved before it is evaluated, so that a failing
evaluation loses no training.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from squeeze_jax import files

NAME = "scores.json"
# Where work directories of earlier versions have the scores of a checkpoint.
_OLD = ("metrics", "metrics")


class Scores:
    """Scores by step."""

    def __init__(self, directory: Path, best: str, *, lowest: bool):
        """Reads what is on disk; scores of a checkpoint that cannot be read count as not evaluated.

        Args:
          directory: of the checkpoints.
          best: the score whose best value decides.
          lowest: whether the lowest value is the best; else the highest is.
        """
        self._path, self._best = directory / NAME, best
        self._sign = -1.0 if lowest else 1.0
        self._scores = _read(self._path)
        for old in directory.glob("[0-9]*/" + "/".join(_OLD)):
            if not isinstance(_parsed(old), dict):
                # Orbax, which reads it too, would give up.
                warnings.warn(f"{old} is damaged and set aside", stacklevel=2)
                with contextlib.suppress(OSError):
                    old.parent.rename(old.parent.with_name("damaged-metrics"))

    def __contains__(self, step: int) -> bool:
        return self._of(step) is not None

    def record(
        self, step: int, scores: Mapping[str, float], kept: Sequence[int]
    ) -> None:
        """Writes the scores of a step to disk; those of steps that are not kept are dropped.

        Raises:
          UserError: the file cannot be written.
        """
        self._scores = {k: v for k, v in self._scores.items() if k in kept}
        self.remember(step, scores)
        text = {str(k): v for k, v in sorted(self._scores.items())}
        files.write(self._path, json.dumps(text, indent=1) + "\n")

    def remember(self, step: int, scores: Mapping[str, float]) -> None:
        """Keeps the scores of a step in memory alone, as every process but the first does."""
        self._scores[step] = dict(scores)

    def best(self, steps: Sequence[int]) -> int | None:
        """Returns the step with the best score; one that is not finite is never the best. None if none has one."""
        values = {}
        for step in steps:
            value = (self._of(step) or {}).get(self._best)
            if isinstance(value, int | float) and math.isfinite(value):
                values[step] = self._sign * value
        return max(values, key=values.get) if values else None

    def _of(self, step: int) -> Mapping[str, float] | None:
        if step not in self._scores:
            old = self._path.parent.joinpath(str(step), *_OLD)
            found = _parsed(old) if old.is_file() else None
            if found:
                self._scores[step] = found
        return self._scores.get(step)


def _read(path: Path) -> dict[int, Mapping[str, float]]:
    if not path.is_file():
        return {}
    found = _parsed(path)
    try:
        return {int(step): dict(scores) for step, scores in found.items()}
    except (AttributeError, TypeError, ValueError):
        warnings.warn(
            f"{path} is damaged: no checkpoint before the next evaluation counts as the best",
            stacklevel=2,
        )
        return {}


def _parsed(path: Path):
    """Returns the content of a JSON file; None if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
