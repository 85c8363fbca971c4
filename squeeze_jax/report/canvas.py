"""Makes figures of matplotlib without a window, and writes them as PNG files.

The first figure imports matplotlib, because that takes longer than what most jobs do before they print.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from squeeze_jax import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """Returns an empty white figure; width and height are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(made)
    return made


def write(path: str | Path, drawn: "Figure", dpi: float = 150) -> Path:
    """Writes a figure as a PNG file, atomically."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    return files.write(path, buffer.getvalue())
