"""Plots loss and accuracy over the steps of a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax import files
from squeeze_jax.errors import UserError
from squeeze_jax.train import log

TRAIN, TEST = "#0072B2", "#D55E00"  # Okabe and Ito 2008: distinct to colour-blind eyes


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a run's `metrics.jsonl`.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        return log.read(files.path(path))
    except OSError as error:
        raise UserError(f"cannot read metrics {path}: {error.strerror}") from None


def series(
    records: Iterable[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps whose records have a key, ascending, and its values there.

    If a step was recorded twice, the last record counts.

    Args:
      records: dicts with "step".
      key: key of a record, such as "loss" or "eval_accuracy".

    Returns:
      (steps int [n], values float [n]).
    """
    numbers = (r for r in records if isinstance(r.get(key), int | float))
    by_step = {r["step"]: r[key] for r in numbers}
    steps = sorted(by_step)
    return np.array(steps, int), np.array([by_step[s] for s in steps], float)


def plot(axes, records: list[Mapping[str, Any]], score: str = "accuracy") -> None:
    """Draws loss on the first of two matplotlib axes and a score on the second."""
    for ax, title in zip(axes, ("loss", score), strict=True):
        for key, label, color, style in (
            (title, "train", TRAIN, dict(linewidth=1.5)),
            (
                f"eval_{title}",
                "test",
                TEST,
                dict(linewidth=1.5, marker="o", markersize=4),
            ),
        ):
            steps, values = series(records, key)
            if len(steps):
                ax.plot(steps, values, color=color, label=label, **style)
        ax.set_title(title.capitalize(), fontsize=11, loc="left")
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=9)
        ax.grid(axis="y", color="#dddddd", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.lines:
            ax.legend(fontsize=9, frameon=False)
        else:
            ax.text(0.5, 0.5, "no records", ha="center", transform=ax.transAxes)
    if score != "perplexity":
        axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
