"""Numbers as people read them: three significant digits and a unit."""

import math


def count(value: float | None) -> str:
    """`1_244_448` as `1.24 M`, `349e6` as `349 M`, `980` as `980`; None as `-`."""
    return _scaled(value, ("", " k", " M", " G", " T"))


def size(value: float | None) -> str:
    """Bytes, in powers of 1000: `4_800_000` as `4.8 MB`."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def milliseconds(value: float | None) -> str:
    """`0.1523` as `0.152 ms`, `12.34` as `12.3 ms`, `4100` as `4.1 s`."""
    return _scaled(value, (" ms", " s"))


def megabytes(value: float | None) -> str:
    """MB of 10^6 bytes: `51.32` as `51.3 MB`, `0.4` as `400 kB`."""
    return size(None if value is None else value * 1e6)


def percent(value: float | None) -> str:
    """A share as `97.22%`."""
    return "-" if _absent(value) else f"{100 * value:.2f}%"


def score(value: float | None, name: str) -> str:
    """A score by its name: a perplexity as `82.70`, every other score, which is a share, as `97.22%`."""
    if name != "perplexity" or _absent(value):
        return percent(value)
    return f"{value:.2f}"


def _scaled(value, units) -> str:
    if _absent(value):
        return "-"
    value = float(f"{value:.3g}")
    step = 0
    while abs(value) >= 1000 and step + 1 < len(units):
        value, step = float(f"{value / 1000:.3g}"), step + 1
    return f"{value:g}{units[step]}"


def _absent(value) -> bool:
    return value is None or not math.isfinite(value)
