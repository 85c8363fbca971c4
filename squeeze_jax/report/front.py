"""Draws what a search has found: the trade-off between a network's score and its cost, and the choices of the best network."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from squeeze_jax.report import canvas
from squeeze_jax.report.picture import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.34  # width and height of a choice, inches


class Series(NamedTuple):
    """Networks in the plane of a cost and a score.

    Attributes:
      name: for the legend.
      costs, scores: [n].
    """

    name: str
    costs: Sequence[float]
    scores: Sequence[float]


class Choices(NamedTuple):
    """The choices of a network for one elastic option.

    Attributes:
      option: name of the option.
      values: for each position the value; None where the position has no effect.
      all: for each position the values that it may have, ascending.
    """

    option: str
    values: Sequence[Any]
    all: Sequence[Sequence[Any]]


def write(path: str | Path, *args: Any, **options: Any) -> Path:
    """Draws a search as `draw` does and writes the picture as a PNG file, atomically."""
    return canvas.write(path, draw(*args, **options))


def draw(
    front: Series,
    measured: Sequence[Series],
    limit: float | None,
    winner: tuple[float, float],
    choices: Sequence[Choices],
    *,
    title: str,
    labels: Mapping[str, str],
    lower_is_better: bool = False,
    caption: str = "",
) -> "Figure":
    """Draws the front above the choices of the best network.

    Args:
      front: predicted scores of the best trade-offs.
      measured: networks whose scores were measured.
      limit: largest allowed cost; None for no limit.
      winner: cost and measured score of the best network.
      choices: of the best network.
      title: one line above the picture.
      labels: {"cost", "score"}: the names of the two axes.
      lower_is_better: whether the better scores are the lower ones; they are at the top in any case.
      caption: smaller lines at the bottom.

    Returns:
      A figure with its own canvas; pyplot's state does not change.
    """
    longest = max(len(c.values) for c in choices)
    name_width = 0.1 * max(len(c.option) for c in choices) + 0.3
    width = max(8.0, longest * CELL + name_width + 0.4)
    rows = len(choices) * (CELL + 0.12) + 0.5
    lines = textwrap.wrap(caption, int(width * 15))
    foot = 0.16 * len(lines) + 0.1
    height = 4.2 + rows + foot
    figure = canvas.figure(width, height)
    plane = figure.add_axes(
        (0.75 / width, (rows + foot + 0.55) / height, 1 - 0.95 / width, 3.2 / height)
    )
    for series, color in zip(measured, COLORS[4:], strict=False):
        plane.scatter(series.costs, series.scores, s=12, color=color, label=series.name)
    plane.plot(
        front.costs, front.scores, color=COLORS[0], marker=".", label=front.name, lw=1
    )
    plane.scatter(*winner, s=130, marker="*", color=COLORS[5], label="found", zorder=3)
    if limit is not None:
        plane.axvline(limit, color=COLORS[6], ls="--", lw=1, label="limit")
    plane.set_xlabel(labels["cost"])
    plane.set_ylabel(labels["score"])
    if lower_is_better:
        plane.invert_yaxis()
    plane.spines[["top", "right"]].set_visible(False)
    plane.legend(frameon=False, fontsize=8, loc="lower right")
    figure.text(0.15 / width, 1 - 0.25 / height, title, fontsize=11, va="center")
    grid = figure.add_axes((0, foot / height, 1, rows / height))
    _draw_choices(grid, choices, name_width, width, rows)
    for number, line in enumerate(reversed(lines)):
        place = (0.08 + 0.16 * number) / height
        figure.text(0.15 / width, place, line, fontsize=7, color="#555555")
    return figure


def _draw_choices(axes, choices, name_width: float, width: float, height: float):
    """Draws a row of cells for each option: the darker a cell, the larger the choice; a position without effect is empty."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for row, choice in enumerate(choices):
        top = 0.35 + row * (CELL + 0.12)
        axes.text(0.15, top + CELL / 2, choice.option, fontsize=9, va="center")
        for place, (value, allowed) in enumerate(
            zip(choice.values, choice.all, strict=True)
        ):
            left = name_width + place * CELL
            share = 0.0
            if value is not None:
                share = (list(allowed).index(value) + 1) / len(allowed)
            axes.add_patch(
                _cell(left, top, share) if value is not None else _empty(left, top)
            )
            if value is not None:
                axes.text(
                    *(left + CELL / 2 - 0.02, top + CELL / 2, f"{value:g}"),
                    fontsize=8,
                    ha="center",
                    va="center",
                    color="white" if share > 0.6 else "black",
                )


def _cell(left: float, top: float, share: float):
    from matplotlib.patches import Rectangle

    size = CELL - 0.04
    color = tuple(1 - share * (1 - c) for c in (0.0, 0.447, 0.698))
    return Rectangle((left, top), size, size, color=color)


def _empty(left: float, top: float):
    from matplotlib.patches import Rectangle

    size = CELL - 0.04
    return Rectangle((left, top), size, size, fill=False, color="#CCCCCC", lw=0.7)
