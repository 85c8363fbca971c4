"""What each layer costs as one picture: MACs, parameters, live activations and time side by side, from input to output."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from squeeze_jax import files
from squeeze_jax.report import picture, units

ROW = 0.21  # inches of a layer's line
PANEL = 2.7  # inches of each chart
NAME = 0.075  # inches of a name's character
TALLEST = 60_000  # pixels; Agg draws below 2**16
SMALL = 0.01  # of all parameters, or of the time: less is no bar that can be seen
NOTE = "#D55E00"  # Okabe and Ito 2008: distinct to colour-blind eyes
# heading of the sum, key, how a value is written
PANELS = (
    ("MACs: {} in all", "macs", units.count),
    ("Parameters: {} in all", "parameters", units.count),
    ("Live activations: {} at most", "live_bytes", units.size),
)
ELSEWHERE = "elsewhere"  # the row of the time that no layer took: a number without a bar, which might dwarf the others
LATENCY = ("Latency by layer: {} in all", "latency_ms", units.milliseconds)


def write(
    path: str | Path, rows: Sequence[Mapping[str, Any]], *, title: str, caption: str
) -> Path:
    """Draws the costs and writes them as PNG, atomically; see `draw`."""
    figure = draw(rows, title=title, caption=caption)
    dpi = min(150, TALLEST / figure.get_figheight())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return files.write(path, buffer.getvalue())


def draw(rows: Sequence[Mapping[str, Any]], *, title: str, caption: str = "") -> Figure:
    """Draws a line a layer, the first on top.

    Args:
      rows: a row a layer and last the total, each with layer, macs, share (of all MACs, 0..1), parameters, live_bytes
        (None where there are none) and not_counted (text, empty where all is); with latency_ms and latency_share (of
        the whole, 0..1) there is one more chart.
      title: one line above.
      caption: smaller lines below; what was left out, see `shown`, is added to it.

    Returns:
      A figure with a canvas of its own; pyplot's state is not touched.
    """
    *layers, total = rows
    kept = shown(layers)
    panels = [*PANELS, LATENCY] if "latency_ms" in total else PANELS
    if rest := len(layers) - len(kept):
        left_out = f"{rest} without MACs that hold no more activations than a layer beside them"
        if "latency_ms" in total:
            left_out += " and take less than 1% of the time"
        caption = " · ".join(filter(None, (caption, f"not drawn: {left_out}")))
    lines = []  # a layer's, and one below it for what is not counted
    for row in kept:
        lines += [row, row["not_counted"]] if row["not_counted"] else [row]
    names = 0.2 + NAME * max((len(r["layer"]) for r in kept), default=0)
    width = 0.8 + names + PANEL * len(panels)
    wrapped = textwrap.wrap(caption, int(width * 13))
    above, below = 0.95, 0.3 + 0.2 * len(wrapped)
    inner = ROW * max(len(lines), 1)
    height = above + inner + below
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    title = textwrap.shorten(title, int(width * 8), placeholder=" …")
    figure.text(0.4 / width, 1 - 0.4 / height, title, fontsize=14, weight="bold")
    area = (0.4 / width, below / height, 1 - 0.8 / width, inner / height)
    _names(figure.add_axes(area), lines)
    for i, (panel, color) in enumerate(zip(panels, picture.COLORS, strict=False)):
        left = (0.4 + names + i * PANEL) / width
        area = (left, below / height, (PANEL - 0.15) / width, inner / height)
        _bars(figure.add_axes(area), lines, total, *panel, color=color)
    for i, line in enumerate(reversed(wrapped)):
        place = (0.4 / width, (0.12 + 0.2 * i) / height)
        figure.text(*place, line, fontsize=8, color="#555555")
    return figure


def shown(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers that a picture needs.

    All that have MACs, 1% of the parameters or of the time, or something not counted; of those between two of them, such
    as normalisations and concatenations, the one with the most live activations, if it has more than both.
    """
    parameters = sum(r["parameters"] for r in layers)

    def live(r):
        return r["live_bytes"] or 0

    kept, between, before = [], [], 0

    def most(after):
        found = max(between, key=live, default=None)
        return [found] if found and live(found) > max(before, after) else []

    for row in layers:
        large = row["parameters"] > SMALL * parameters
        large |= row.get("latency_share", 0) > SMALL
        if not (row["macs"] or large or row["not_counted"]):
            between.append(row)
            continue
        kept += [*most(live(row)), row]
        between, before = [], live(row)
    return kept + most(0)


def _names(ax, lines) -> None:
    """The layers' names, on stripes that reach below the charts."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(max(len(lines), 1) - 0.5, -0.5))
    for i, line in enumerate(lines):
        if i % 2 == 0:
            ax.axhspan(i - 0.5, i + 0.5, color="#f2f5f8", linewidth=0, zorder=0)
        if isinstance(line, Mapping):
            ax.text(0.005, i, line["layer"], va="center", fontsize=9)


def _bars(ax, lines, total, heading, key, write, *, color) -> None:
    """One bar a layer, its value beside it, of MACs and time the share; the largest in bold."""
    values = [r[key] or 0 if isinstance(r, Mapping) else 0 for r in lines]
    bars = [
        0 if isinstance(r, Mapping) and r["layer"] == ELSEWHERE else v
        for r, v in zip(lines, values, strict=True)
    ]
    most = max(bars, default=0) or 1
    for i, (row, value, bar) in enumerate(zip(lines, values, bars, strict=True)):
        if not isinstance(row, Mapping):
            if key == "macs":  # runs on over the other charts, which are empty here
                note = textwrap.shorten(f"not counted: {row}", 90, placeholder=" …")
                ax.text(0.02 * most, i, note, va="center", fontsize=8.5, color=NOTE)
            continue
        ax.barh(i, bar, height=0.66, color=color)
        text = write(value or None)
        share = {"macs": "share", "latency_ms": "latency_share"}.get(key)
        if share and value:
            text += f" ({100 * row[share]:.1f}%)"
        weight = "bold" if value == most else "normal"
        place = bar + 0.03 * most
        ax.text(place, i, text, va="center", fontsize=8.5, weight=weight)
    ax.set(xlim=(0, 1.85 * most), ylim=(max(len(lines), 1) - 0.5, -0.5))
    ax.set(xticks=[], yticks=[], facecolor="none")
    ax.set_title(heading.format(write(total[key])), fontsize=10.5, loc="left")
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_color("#333333")
