"""What an evaluation is."""

from collections.abc import Callable
from typing import NamedTuple


class Metric(NamedTuple):
    """An evaluation; a file of `metrics/` has `make(data) -> Metric`.

    Attributes:
      measure: (logits, batch) → (sums, rows), jnp under jit. Sums are scalars or arrays, such as a confusion
        matrix, to be added up over batches, over the examples that `batch["mask"]` counts, and have "examples", how many
        these are; rows are arrays [b, ...] that are kept for every example.
      score: (sums, rows) → {"eval_loss": …, "eval_accuracy": …}, numpy on the host; rows are those of all examples that
        count, and "index" says which each is.
      headline: the score that says which of two networks is better.
      names: of the scores by which a best checkpoint may be chosen; () for all that `score` gives.
      scale: what the headline is of: 1, or 100 for percent.
      lower: scores that are better where they are lower; all others are better where they are higher.
      agreement: (live, file's) → float [n], 0..1: how far an exported file's outputs for each example, {name: [n, ...]},
        tell the same as the live model's; see `export/parity.py`. None compares the top classes.
    """

    measure: Callable
    score: Callable
    headline: str
    names: tuple[str, ...] = ()
    scale: float = 1.0
    lower: tuple[str, ...] = ("eval_loss", "eval_perplexity")
    agreement: Callable | None = None

    def better(self, score: str) -> Callable:
        """Returns `max` or `min`, the function that chooses the best of several values of a score."""
        return min if score in self.lower else max
