"""Draws a run's report as one picture: the table, charts that compare the costs of the files, and the training curves."""

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze_jax.report import canvas, curves, table, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito 2008: distinct to colour-blind eyes
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
LINE = 0.3  # height of a table's line, inches
CHARACTER = 0.092  # width of a table's character at 10 points, inches
SCORE = "Test accuracy"
# (title, value of a row, formatter of a value)
PANELS = (
    (SCORE, lambda r: r.get("accuracy"), units.percent),
    ("Size", lambda r: r.get("bytes"), units.size),
    ("Latency p50 to p90", lambda r: table.latency(r, "p50"), units.milliseconds),
    ("Peak memory", lambda r: r.get("peak_memory_mb"), units.megabytes),
)


def write(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    caption: str = "",
    metrics: list[Mapping[str, Any]] | None = None,
) -> Path:
    """Draws the report as `draw` does and writes it as a PNG file, atomically."""
    figure = draw(rows, title=title, caption=caption, metrics=metrics)
    return canvas.write(path, figure)


def draw(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    caption: str = "",
    metrics: list[Mapping[str, Any]] | None = None,
) -> "Figure":
    """Draws the table, a bar chart for each cost, and the training curves.

    Args:
      rows: rows from `table.row`, at least one.
      title: one line above the table.
      caption: smaller lines at the bottom, such as machine and revision.
      metrics: records from `curves.read`, or None for no curves.

    Returns:
      A figure with its own canvas; pyplot's state does not change.
    """
    cells, score = table.cells(rows), table.score(rows)
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    panels = [p for p in PANELS if any(p[1](r) is not None for r in rows)]
    width = max(11.0, CHARACTER * sum(widths) + 1)
    heights = [LINE * len(cells), 0.75 + 0.36 * len(rows) if panels else 0.01]
    heights += [2.4] if metrics else []
    lines = textwrap.wrap(caption, int(width * 13))
    above, gap = 0.65, 0.65
    below = (0.7 if metrics else 0.25) + 0.2 * len(lines)
    height = sum(heights) + gap * (len(heights) - 1) + above + below
    figure = canvas.figure(width, height)
    left, inner = 0.4 / width, 1 - 0.8 / width

    def bottom(row):  # of a row of panels, inches
        return height - above - sum(heights[: row + 1]) - gap * row

    title = textwrap.shorten(title, int(width * 8), placeholder=" …")
    figure.text(left, 1 - 0.4 / height, title, fontsize=14, weight="bold")
    area = (left, bottom(0) / height, inner, heights[0] / height)
    _draw_table(figure.add_axes(area), cells, widths)
    names = 0.8 * CHARACTER * max(len(str(r["model"])) for r in rows) / width
    panel_width = (inner - names) / max(len(panels), 1)
    for i, panel in enumerate(panels):
        x = left + names + i * panel_width + 0.1 / width
        y = bottom(1) / height
        area = (x, y, panel_width - 0.3 / width, heights[1] / height)
        title, value, write = panel
        if title == SCORE:
            title = title.replace("accuracy", score)
            write = functools.partial(units.score, name=score)
        _draw_bars(figure.add_axes(area), rows, title, value, write, labelled=i == 0)
    if metrics:
        axes = []
        for i in range(2):
            x = left + 0.35 / width + i * inner / 2
            area = (x, bottom(2) / height, inner / 2 - 0.6 / width, 2.4 / height)
            axes.append(figure.add_axes(area))
        curves.plot(axes, metrics, score)
    for i, line in enumerate(reversed(lines)):
        figure.text(left, (0.12 + 0.2 * i) / height, line, fontsize=8, color="#555555")
    return figure


def _draw_table(ax, cells, widths) -> None:
    """Draws cells in columns as wide as their longest text, the first column left-aligned, the others right-aligned."""
    ax.set_axis_off()
    total = sum(widths)
    ax.set(xlim=(0, total), ylim=(len(cells), 0))
    for i, line in enumerate(cells):
        for j, cell in enumerate(line):
            x = 0.5 if j == 0 else sum(widths[: j + 1]) - 0.5
            weight = "bold" if i == 0 else "normal"
            side = "left" if j == 0 else "right"
            ax.text(x, i + 0.5, cell, ha=side, va="center", fontsize=10, weight=weight)
        if i % 2:
            ax.axhspan(i, i + 1, color="#f2f5f8", zorder=0)
    ax.axhline(1, color="#333333", linewidth=1)


def _draw_bars(ax, rows, title, value, write, *, labelled) -> None:
    """Draws one bar per row with its value beside it; in the latency chart a thin line extends to p90."""
    values = [value(r) for r in rows]
    largest = max(v for v in values if v is not None) or 1
    for i, (row, v) in enumerate(zip(rows, values, strict=True)):
        ax.barh(i, v or 0, height=0.62, color=COLORS[i % len(COLORS)])
        end = v or 0
        if title.startswith("Latency") and (high := table.latency(row, "p90")):
            high = min(high, 1.15 * largest)
            if high - v > 0.02 * largest:  # a shorter line would look like a minus sign
                end = high
                ax.plot([v, end], [i, i], "|-", color="#333333", linewidth=1.2)
        ax.text(end + 0.04 * largest, i, write(v), va="center", fontsize=9)
    ax.set(xlim=(0, 1.6 * largest), ylim=(len(rows) - 0.4, -0.6), xticks=[])
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_yticks(range(len(rows)), [str(r["model"]) for r in rows] if labelled else [])
    ax.tick_params(length=0, labelsize=9)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
