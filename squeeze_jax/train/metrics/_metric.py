"""Defines `Metric`, the value that each file of `metrics/` makes."""

from collections.abc import Callable
from typing import NamedTuple


class Metric(NamedTuple):
    """An evaluation metric; each file of `metrics/` has a function `make(data) → Metric`.

    Attributes:
      measure: (logits, batch) → (sums, rows); runs under jit. `sums` are scalars or arrays, such as a confusion matrix,
        over the examples for which `batch["mask"]` is true; evaluation adds them up over all batches. One of them is
        "examples", the number of these examples. `rows` are arrays [b, ...] that evaluation keeps for every example.
      score: (sums, rows) → {"eval_loss": …, "eval_accuracy": …}; runs in numpy on the host. It gets the total of the sums,
        and the rows of all examples that count, whose numbers are in rows["index"].
      headline: name of the score by which two networks are compared.
      names: names of the scores by which a best checkpoint may be chosen; () for all scores.
      scale: 100 if the headline score is in percent, else 1.
      lower: names of the scores for which lower is better; for all others higher is better.
      agreement: (live outputs, file outputs) → float [n], 0 to 1: how far the predictions of an exported file agree with
        those of the live network for each example. Outputs are {name: [n, ...]}; see `export/parity.py`. None compares
        the top classes.
    """

    measure: Callable
    score: Callable
    headline: str
    names: tuple[str, ...] = ()
    scale: float = 1.0
    lower: tuple[str, ...] = ("eval_loss", "eval_perplexity")
    agreement: Callable | None = None

    def better(self, score: str) -> Callable:
        """Returns the function that chooses the best of several values of a score: `min` if lower is better, else `max`."""
        return min if score in self.lower else max
