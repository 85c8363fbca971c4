"""Draws the costs of each layer as one picture: MACs, parameters, live activations and latency side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze_jax.report import canvas, picture, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 0.21  # height of a layer's line, inches
PANEL = 2.7  # width of a chart, inches
NAME = 0.075  # width of a character of a layer's name, inches
MAX_HEIGHT = 60_000  # pixels; Agg draws fewer than 2**16
SMALL = 0.01  # share of all parameters or of the time below which a bar is not visible
NOTE = "#D55E00"  # Okabe and Ito 2008: distinct to colour-blind eyes
# (heading with the total, key of a row, formatter of a value)
PANELS = (
    ("MACs: {} in all", "macs", units.count),
    ("Parameters: {} in all", "parameters", units.count),
    ("Live activations: {} at most", "live_bytes", units.size),
)
# The row of the time outside all layers. It has a number but no bar, which might dwarf the others.
ELSEWHERE = "elsewhere"
LATENCY = ("Latency by layer: {} in all", "latency_ms", units.milliseconds)


def write(
    path: str | Path, rows: Sequence[Mapping[str, Any]], *, title: str, caption: str
) -> Path:
    """Draws the costs as `draw` does and writes the picture as a PNG file, atomically."""
    figure = draw(rows, title=title, caption=caption)
    dpi = min(150, MAX_HEIGHT / figure.get_figheight())
    return canvas.write(path, figure, dpi)


def draw(
    rows: Sequence[Mapping[str, Any]], *, title: str, caption: str = ""
) -> "Figure":
    """Draws one line per layer, the first layer on top.

    Args:
      rows: a row per layer, then the total. Each has layer, macs, share (of all MACs, 0..1), parameters, live_bytes (None if
        unknown) and not_counted (text, empty if everything is counted). With latency_ms and latency_share (of the whole
        time, 0..1) there is one more chart.
      title: one line above the charts.
      caption: smaller lines below the charts. The number of omitted layers, see `visible_layers`, is added to it.

    Returns:
      A figure with its own canvas; pyplot's state does not change.
    """
    *layers, total = rows
    visible = visible_layers(layers)
    panels = [*PANELS, LATENCY] if "latency_ms" in total else PANELS
    if omitted := len(layers) - len(visible):
        left_out = f"{omitted} without MACs that hold no more activations than a layer beside them"
        if "latency_ms" in total:
            left_out += " and take less than 1% of the time"
        caption = " · ".join(filter(None, (caption, f"not drawn: {left_out}")))
    lines = []  # a row per layer, and a text below it for its operations that are not counted
    for row in visible:
        lines += [row, row["not_counted"]] if row["not_counted"] else [row]
    names = 0.2 + NAME * max((len(r["layer"]) for r in visible), default=0)
    width = 0.8 + names + PANEL * len(panels)
    wrapped = textwrap.wrap(caption, int(width * 13))
    above, below = 0.95, 0.3 + 0.2 * len(wrapped)
    inner = ROW * max(len(lines), 1)
    height = above + inner + below
    figure = canvas.figure(width, height)
    title = textwrap.shorten(title, int(width * 8), placeholder=" …")
    figure.text(0.4 / width, 1 - 0.4 / height, title, fontsize=14, weight="bold")
    area = (0.4 / width, below / height, 1 - 0.8 / width, inner / height)
    _draw_names(figure.add_axes(area), lines)
    for i, (panel, color) in enumerate(zip(panels, picture.COLORS, strict=False)):
        left = (0.4 + names + i * PANEL) / width
        area = (left, below / height, (PANEL - 0.15) / width, inner / height)
        _draw_bars(figure.add_axes(area), lines, total, *panel, color=color)
    for i, line in enumerate(reversed(wrapped)):
        position = (0.4 / width, (0.12 + 0.2 * i) / height)
        figure.text(*position, line, fontsize=8, color="#555555")
    return figure


def visible_layers(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the layers that a picture shows, in order.

    These are the layers that have MACs, more than 1% of the parameters or of the time, or operations that are not counted.
    Of the layers between two of them, such as normalisations and concatenations, the picture shows the one with the most live
    activations, if it has more than both.
    """
    parameters = sum(r["parameters"] for r in layers)

    def live(row):
        return row["live_bytes"] or 0

    visible, between, live_before = [], [], 0

    def largest_between(live_after):
        largest = max(between, key=live, default=None)
        if largest and live(largest) > max(live_before, live_after):
            return [largest]
        return []

    for row in layers:
        large = row["parameters"] > SMALL * parameters
        large |= row.get("latency_share", 0) > SMALL
        if not (row["macs"] or large or row["not_counted"]):
            between.append(row)
            continue
        visible += [*largest_between(live(row)), row]
        between, live_before = [], live(row)
    return visible + largest_between(0)


def _draw_names(ax, lines) -> None:
    """Draws the layers' names on stripes that extend below the charts."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(max(len(lines), 1) - 0.5, -0.5))
    for i, line in enumerate(lines):
        if i % 2 == 0:
            ax.axhspan(i - 0.5, i + 0.5, color="#f2f5f8", linewidth=0, zorder=0)
        if isinstance(line, Mapping):
            ax.text(0.005, i, line["layer"], va="center", fontsize=9)


def _draw_bars(ax, lines, total, heading, key, write, *, color) -> None:
    """Draws one bar per layer with its value beside it, the largest value in bold; MACs and time also show the share."""
    values = [r[key] or 0 if isinstance(r, Mapping) else 0 for r in lines]
    bars = [
        0 if isinstance(r, Mapping) and r["layer"] == ELSEWHERE else v
        for r, v in zip(lines, values, strict=True)
    ]
    longest = max(bars, default=0) or 1
    for i, (row, value, bar) in enumerate(zip(lines, values, bars, strict=True)):
        if not isinstance(row, Mapping):
            if (
                key == "macs"
            ):  # the text extends over the other charts, whose lines are empty here
                note = textwrap.shorten(f"not counted: {row}", 90, placeholder=" …")
                ax.text(0.02 * longest, i, note, va="center", fontsize=8.5, color=NOTE)
            continue
        ax.barh(i, bar, height=0.66, color=color)
        text = write(value or None)
        share = {"macs": "share", "latency_ms": "latency_share"}.get(key)
        if share and value:
            text += f" ({100 * row[share]:.1f}%)"
        weight = "bold" if value == longest else "normal"
        x = bar + 0.03 * longest
        ax.text(x, i, text, va="center", fontsize=8.5, weight=weight)
    ax.set(xlim=(0, 1.85 * longest), ylim=(max(len(lines), 1) - 0.5, -0.5))
    ax.set(xticks=[], yticks=[], facecolor="none")
    ax.set_title(heading.format(write(total[key])), fontsize=10.5, loc="left")
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_color("#333333")
