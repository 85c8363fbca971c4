"""A device's latencies of the pieces of networks, as a JSON file, and the latency of a whole network from them.

The latency of a network is nearly the sum of the latencies of its pieces (Cai, Zhu, Han 2019, ProxylessNAS, arXiv
1812.00332). The difference is systematic: each piece's latency includes the start of a network, which a network of n pieces
pays once, and values may stay in a cache from one piece to the next. So some whole networks are measured too. One half of them fits
the two numbers of

    latency = scale · sum over pieces + join_ms · (number of pieces - 1),

and the other half shows the error.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax import files
from squeeze_jax.errors import UserError, shortened

VERSION = 1  # of the file


class Timing(NamedTuple):
    """A measured latency.

    Attributes:
      ms: the median of the fastest round (its mean, where a runtime gives no median): other work only slows a device down.
      spread: (slowest - fastest round) / ms; above 0.2 the device was busy.
      count: runs in all rounds.
    """

    ms: float
    spread: float
    count: int


class Whole(NamedTuple):
    """A measured network.

    Attributes:
      options: its elastic options.
      timing: its measured latency.
      sum_ms: the sum over its pieces.
      pieces: number of its pieces.
      held_out: whether the correction was fitted without it.
    """

    options: Mapping[str, tuple]
    timing: Timing
    sum_ms: float
    pieces: int
    held_out: bool


class Table(NamedTuple):
    """The latencies of a device.

    Attributes:
      about: dict(device, runtime, format, threads, statistic).
      pieces: {key of a piece: its latency}, see `key_of`.
      networks: whole networks.
      scale, join_ms: see the top of this file; `join_ms` is usually negative.
    """

    about: Mapping[str, Any]
    pieces: Mapping[str, Timing]
    networks: Sequence[Whole] = ()
    scale: float = 1.0
    join_ms: float = 0.0

    def predict(self, sums_ms, pieces):
        """Returns the latencies in ms of networks, from the sums over their pieces and the numbers of pieces."""
        return self.scale * sums_ms + self.join_ms * (pieces - 1)

    def error(self) -> dict[str, float]:
        """Returns the errors of the held-out networks, see `errors`; {} if there are none."""
        held_out = [n for n in self.networks if n.held_out]
        if not held_out:
            return {}
        sums, counts = np.asarray([(n.sum_ms, n.pieces) for n in held_out]).T
        return errors(self.predict(sums, counts), [n.timing.ms for n in held_out])

    @property
    def name(self) -> str:
        """Returns a line for the user, such as "tflite on ARM Cortex-A76, 1 thread"."""
        threads = self.about["threads"]
        counted = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        return f"{self.about['format']} on {self.about['device']}{counted}"


def timing(rounds_ms: Sequence[float], count: int) -> Timing:
    """Returns the latency from each round's latency in ms, and the number of runs in all rounds."""
    ms = float(min(rounds_ms))
    return Timing(ms, (max(rounds_ms) - min(rounds_ms)) / ms, count)


def fit(networks: Sequence[Whole]) -> tuple[float, float]:
    """Returns (scale, join_ms) with the least squares of relative errors on networks; (1, 0) without networks.

    `join_ms` is 0 if these networks do not determine it, or if the latency of one of them would not be above 0.
    """
    if not networks:
        return 1.0, 0.0
    rows = [(n.sum_ms / n.timing.ms, (n.pieces - 1) / n.timing.ms) for n in networks]
    shares = np.asarray(rows)
    (scale, join_ms), _, rank, _ = np.linalg.lstsq(shares, np.ones(len(rows)))
    predicted = shares @ (scale, join_ms)  # over the measured
    if rank == 2 and scale > 0 and predicted.min() > 0:
        return float(scale), float(join_ms)
    sums = shares[:, 0]
    return float(sums.sum() / (sums**2).sum()), 0.0


def errors(
    predicted_ms: Sequence[float], measured_ms: Sequence[float]
) -> dict[str, float]:
    """Returns dict(mean: mean |predicted - measured| / measured, largest, rank: Spearman's rank correlation)."""
    predicted, measured = np.asarray(predicted_ms), np.asarray(measured_ms)
    relative = np.abs(predicted - measured) / measured
    return {
        "mean": float(relative.mean()),
        "largest": float(relative.max()),
        "rank": rank_correlation(predicted, measured),
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's rank correlation of two sequences; equal values share the mean of their ranks. NaN if one is constant."""
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    scale = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal - 1) / 2


def key_of(module: Any, inputs: Any) -> str:
    """Returns a text that is the same for equal pieces in each process: the module's fields, and the shapes of its inputs.

    Args:
      module: a Linen module, unbound.
      inputs: pytree of arrays or shapes.
    """
    shapes = jax.tree.map(lambda s: f"{np.dtype(s.dtype).name}{list(s.shape)}", inputs)
    leaves = ", ".join(jax.tree.leaves(shapes))
    return f"{_describe(module)} of {leaves}"


def _describe(value: Any) -> str:
    """Returns a value as a text without addresses of memory."""
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        fields = (f for f in value.__dataclass_fields__ if f not in ("parent", "name"))
        parts = (f"{f}={_describe(getattr(value, f))}" for f in fields)
        return f"{_type_name(type(value))}({', '.join(parts)})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = (
            f"{f}={_describe(v)}" for f, v in zip(value._fields, value, strict=True)
        )
        return f"{_type_name(type(value))}({', '.join(parts)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_describe(v)}' for k, v in value.items())}}}"
    if isinstance(value, functools.partial):
        parts = [*value.args, *value.keywords.items()]
        return f"{_describe(value.func)}({', '.join(map(_describe, parts))})"
    if isinstance(value, type) or callable(value):
        return _type_name(value)
    return str(value)


def _type_name(kind: Any) -> str:
    """Returns the name of a class or function, with its module if it is none of this library or of JAX."""
    name = getattr(kind, "__qualname__", None) or getattr(kind, "__name__", None)
    if name is None:
        return type(kind).__qualname__
    module = getattr(kind, "__module__", "") or ""
    known = module.partition(".")[0] in (
        "squeeze_jax",
        "jax",
        "jaxlib",
        "flax",
        "builtins",
    )
    return name if known else f"{module}.{name}"


def write(path: str | Path, table: Table, provenance: Mapping[str, Any]) -> None:
    """Writes a table with its errors and provenance as JSON."""
    content = {
        "version": VERSION,
        **table.about,
        "scale": table.scale,
        "join_ms": table.join_ms,
        "error": table.error(),
        "pieces": {k: t._asdict() for k, t in table.pieces.items()},
        "networks": [
            {
                "options": dict(n.options),
                **n.timing._asdict(),
                "sum_ms": n.sum_ms,
                "pieces": n.pieces,
                "held_out": n.held_out,
            }
            for n in table.networks
        ],
        "provenance": dict(provenance),
    }
    files.write(path, json.dumps(content, indent=1) + "\n")


ABOUT = ("device", "runtime", "format", "threads", "statistic")


def read(path: str | Path) -> Table:
    """Reads a table.

    Raises:
      UserError: the file cannot be read, is no table, or is of another version.
    """
    path = files.path(path)
    try:
        content = files.read_json(path)
    except OSError as error:
        advice = "move it away" if path.exists() else "--job=latency_table writes one"
        raise UserError(
            f"cannot read the latency table {path}: {error.strerror}: {advice}"
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is no latency table: it is no JSON; delete it, and measure it anew with --job=latency_table"
        ) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION or "pieces" not in content:
        said = shortened(repr(version), 20)
        raise UserError(
            f"{path} is no latency table of version {VERSION}, its version is {said}: delete it, and measure it anew with --job=latency_table"
        )
    try:
        scale, join_ms = _number(content["scale"]), _number(content["join_ms"])
        if not 0 < scale < math.inf or not math.isfinite(join_ms):
            raise ValueError(f"a scale of {scale}, {join_ms} ms for a join")
        return Table(
            _read_about(content),
            {k: _read_timing(v) for k, v in content["pieces"].items()},
            tuple(
                Whole(
                    {k: tuple(v) for k, v in n["options"].items()},
                    _read_timing(n),
                    _number(n["sum_ms"]),
                    _integer(n["pieces"]),
                    bool(n["held_out"]),
                )
                for n in content["networks"]
            ),
            scale,
            join_ms,
        )
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        raise UserError(
            f"{path} is a damaged latency table ({shortened(str(error), 60)}): delete it, and measure it anew with --job=latency_table"
        ) from None


def _read_timing(entry: Mapping[str, Any]) -> Timing:
    ms, spread = _number(entry["ms"]), _number(entry["spread"])
    if not 0 < ms < math.inf:
        raise ValueError(f"a latency of {ms} ms")
    return Timing(ms, spread, _integer(entry["count"]))


def _read_about(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ABOUT; raises a ValueError for one of another type."""
    for field in ABOUT:
        value = content[field]
        if field == "threads":
            if _integer(value) < 0:
                raise ValueError(f"threads = {value}")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{field} = {value!r}")
    return {field: content[field] for field in ABOUT}


def _number(value: Any) -> float:
    """Returns a number of a file; raises a ValueError for anything else."""
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value
