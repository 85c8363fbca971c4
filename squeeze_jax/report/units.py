"""Formats numbers for readers: three significant digits and a unit. A missing or not finite number becomes `-`."""

import math


def count(value: float | None) -> str:
    """Formats a count: `1_244_448` as `1.24 M`, `349e6` as `349 M`, `980` as `980`."""
    return _format_scaled(value, ("", " k", " M", " G", " T"))


def size(value: float | None) -> str:
    """Formats bytes in powers of 1000: `4_800_000` as `4.8 MB`."""
    return _format_scaled(value, (" B", " kB", " MB", " GB", " TB"))


def milliseconds(value: float | None) -> str:
    """Formats milliseconds: `0.1523` as `0.152 ms`, `12.34` as `12.3 ms`, `4100` as `4.1 s`."""
    return _format_scaled(value, (" ms", " s"))


def megabytes(value: float | None) -> str:
    """Formats MB of 10^6 bytes: `51.32` as `51.3 MB`, `0.4` as `400 kB`."""
    return size(None if value is None else value * 1e6)


def percent(value: float | None) -> str:
    """Formats a share in 0..1: `0.9722` as `97.22%`."""
    return "-" if _is_missing(value) else f"{100 * value:.2f}%"


def score(value: float | None, name: str) -> str:
    """Formats a score by its name: a perplexity as `82.70`; every other score is a share, as `97.22%`."""
    if name != "perplexity" or _is_missing(value):
        return percent(value)
    return f"{value:.2f}"


def _format_scaled(value, units) -> str:
    if _is_missing(value):
        return "-"
    value = float(f"{value:.3g}")
    step = 0
    while abs(value) >= 1000 and step + 1 < len(units):
        value, step = float(f"{value / 1000:.3g}"), step + 1
    return f"{value:g}{units[step]}"


def _is_missing(value) -> bool:
    return value is None or not math.isfinite(value)
