"""One row a model or file, one column a thing that matters on a device."""

from collections.abc import Mapping, Sequence
from typing import Any

from squeeze_jax.report import units

# heading, how a row's cell is written
COLUMNS = (
    ("model", lambda r: str(r["model"])),
    (
        "test accuracy",
        lambda r: units.score(r.get("accuracy"), r.get("score", "accuracy")),
    ),
    ("parameters", lambda r: units.count(r.get("parameters"))),
    ("MACs", lambda r: units.count(r.get("macs"))),
    ("size", lambda r: units.size(r.get("bytes"))),
    ("latency p50", lambda r: units.milliseconds(latency(r, "p50"))),
    ("p90", lambda r: units.milliseconds(latency(r, "p90"))),
    ("peak memory", lambda r: units.megabytes(r.get("peak_memory_mb"))),
)
MEASURED = ("accuracy", "bytes", "latency_ms", "peak_memory_mb", "runtime")


def row(
    model: str,
    measured: Mapping[str, Any] | None = None,
    *,
    parameters: int | None = None,
    macs: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Returns a row: what `export.runtime.measure` found, and counts of the network.

    Args:
      model: name of the model or file.
      measured: accuracy (0..1, or another score, see `score`), bytes, latency_ms (a dict with p50 and p90), peak_memory_mb, runtime; any may be missing.
      parameters: number of parameters.
      macs: multiply-accumulates of one image.
      **more: other keys, for the JSON file only, or to stand in for measured ones.
    """
    found = {k: measured[k] for k in MEASURED if measured and k in measured}
    return {"model": model, "parameters": parameters, "macs": macs} | found | more


def latency(row: Mapping[str, Any], percentile: str) -> float | None:
    """A percentile of a row's latency in ms, or None."""
    return (row.get("latency_ms") or {}).get(percentile)


def score(rows: Sequence[Mapping[str, Any]]) -> str:
    """What networks are compared by: rows may name it under "score", such as "f1"; accuracy otherwise."""
    return rows[0].get("score", "accuracy") if rows else "accuracy"


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The headings and, for each row, its cells as text; a column that no row fills is left out."""
    lines = [[write(r) for _, write in COLUMNS] for r in rows]
    used = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    headings = [heading for heading, _ in COLUMNS]
    headings[1] = f"test {score(rows)}"
    return [[line[i] for i in used] for line in [headings, *lines]]


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal: names to the left, numbers to the right, missing ones as `-`."""
    return aligned(cells(rows))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Headings and rows of cells below each other, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
