"""The report as a table: one row per model or file, one column per property that matters on a device."""

from collections.abc import Mapping, Sequence
from typing import Any

from squeeze_jax.report import units

# (heading, formatter of a row's cell)
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
    **extra: Any,
) -> dict[str, Any]:
    """Returns a row with the results of `export.runtime.measure` and the counts of the network.

    Args:
      model: name of the model or file.
      measured: accuracy (0..1, or another score, see `score`), bytes, latency_ms (a dict with p50 and p90), peak_memory_mb
        and runtime; any of these may be missing.
      parameters: number of parameters.
      macs: multiply-accumulates for one image.
      **extra: other keys, which appear only in the JSON file or replace measured ones.
    """
    results = {k: measured[k] for k in MEASURED if measured and k in measured}
    return {"model": model, "parameters": parameters, "macs": macs} | results | extra


def latency(row: Mapping[str, Any], percentile: str) -> float | None:
    """Returns a percentile of a row's latency in ms, or None."""
    return (row.get("latency_ms") or {}).get(percentile)


def score(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the name of the score that the rows compare: their key "score", such as "f1", or else "accuracy"."""
    return rows[0].get("score", "accuracy") if rows else "accuracy"


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the headings, then the cells of each row as text, without columns that are empty in all rows."""
    lines = [[write(r) for _, write in COLUMNS] for r in rows]
    used = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    headings = [heading for heading, _ in COLUMNS]
    headings[1] = f"test {score(rows)}"
    return [[line[i] for i in used] for line in [headings, *lines]]


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table for a terminal: names left-align, numbers right-align, missing values as `-`."""
    return align(cells(rows))


def align(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines of align cells, the headings first; the first column is left-align, the others right-align."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
