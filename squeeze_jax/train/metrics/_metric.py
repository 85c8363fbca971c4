"""Defines `Metric`, the value that each file of `metrics/` makes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError, shown

# The log writes these entries of a record itself.
_RESERVED = ("step", "phase")


class Metric(NamedTuple):
    """An evaluation metric; each file of `metrics/` has a function `make(data) → Metric`.

    Attributes:
      measure: (logits, batch) → (sums, rows); runs under jit. `sums` are scalars or arrays, such as a confusion matrix,
        over the examples for which `batch["mask"]` is true; evaluation adds them up over all batches. One of them is
        "examples", the number of these examples. `rows` are arrays [b, ...] that evaluation keeps for every example.
      score: (sums, rows) → {"eval_loss": …, "eval_accuracy": …}; runs in numpy on the host. It gets the total of the sums,
        and the rows of all examples that count, whose numbers are in rows["index"]. Each score is one real number; "eval_loss"
        and the headline are always among the scores.
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


def check_scores(returned: Any, headline: str, name: str) -> dict[str, float]:
    """Returns what the function `score` of a `Metric` returned, with Python floats as values.

    Args:
      returned: {score: number}, such as scalars of Python, numpy or JAX.
      headline: the metric's headline.
      name: the metric's name in the data task, for errors.

    Raises:
      UserError: the scores are no dict of real numbers by name, or "eval_loss" or the headline is missing.
    """
    beginning = f"the metric {name!r} of config.data"
    if not isinstance(returned, Mapping):
        raise UserError(
            f"{beginning} returns {shown(returned)} ({type(returned).__name__}) from its function score: return a dict of"
            f" numbers with 'eval_loss' and {headline!r}"
        )
    scores = {}
    for key, value in returned.items():
        if not isinstance(key, str) or key in _RESERVED:
            wanted = (
                "another name, as the log has its own"
                if key in _RESERVED
                else "a string"
            )
            raise UserError(
                f"{beginning} returns a score named {shown(key)}: its name should be {wanted}, such as {headline!r}"
            )
        if not _is_number(value):
            raise UserError(
                f"{beginning} returns the score {key!r} = {shown(value)} ({type(value).__name__}): return one real number"
            )
        scores[key] = float(value)
    for key in ("eval_loss", headline):
        if key not in scores:
            role = ", its headline" if key == headline else ""
            raise UserError(
                f"{beginning} returns no score {key!r}{role}: its function score should return a number for it beside"
                f" {', '.join(scores) or 'nothing'}"
            )
    return scores


def _is_number(value: Any) -> bool:
    """Returns whether a value is a real number, or an array without axes that holds one."""
    try:
        array = np.asarray(value)
    except ValueError:  # a list of lists of different lengths
        return False
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return array.ndim == 0 and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
