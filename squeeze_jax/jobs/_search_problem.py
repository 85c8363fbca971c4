"""What a search looks for: a space of networks, their costs, and limits on these costs."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from squeeze_jax import files
from squeeze_jax.cost import latency_table
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _settings, _space
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nas import encode, limits
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.limits import Cost, Limits
from squeeze_jax.nas.space import Arch
from squeeze_jax.ranges import Bits, Part, Positive


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """The keys of an entry of `config.search.front`.

    Attributes:
      cost: "latency" in ms, "macs", "parameters", "bytes" of the weights, or "memory": the peak bytes of activations.
      table: for "latency": a file of --job=latency_table, or its name in the work directory's `latency` folder, such as
        "tflite_1".
      bits: for "bytes" and "memory": bits of a weight or of an activation.
    """

    cost: Literal[limits.KINDS]
    table: str | None = None
    bits: Bits = 8


@dataclasses.dataclass(frozen=True)
class LimitSettings(CostSettings):
    """The keys of an entry of `config.search.limits`; see also `CostSettings`.

    Attributes:
      at_most: the largest allowed value: milliseconds, a number or bytes.
      share: the largest allowed value as a share of the largest network's cost, in (0, 1]; set this key or `at_most`.
    """

    at_most: Positive | None = None
    share: Part | None = None


def check_costs(
    limited: Sequence[Mapping[str, Any]], traded: Sequence[Mapping[str, Any]]
) -> None:
    """Raises a UserError for a limit or a cost with a wrong key or value; see `Problem` for the arguments."""
    for key, sections, kind in (
        ("limits", limited, LimitSettings),
        ("front", traded, CostSettings),
    ):
        for number, section in enumerate(sections):
            where = f"config.search.{key}[{number}]"
            entry = _settings.build_settings(kind, section, where)
            if entry.cost == "latency" and not entry.table:
                raise UserError(
                    f'{where}: a latency needs a table, such as table="tflite_1"; --job=latency_table writes it'
                )
            if entry.cost != "latency" and entry.table:
                raise UserError(f"{where}: {entry.cost} needs no table: leave it out")
            if kind is LimitSettings and (entry.at_most is None) == (
                entry.share is None
            ):
                raise UserError(
                    f"{where} needs one of the keys at_most and share, such as at_most=8.0"
                )


def table_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a latency table: a name in the work directory's folder `latency`, or else a path."""
    path = workdir / "latency" / f"{name}.json"
    return path if path.exists() else files.path(name)


class Problem:
    """What a search looks for: the space, its costs, and the limits on them.

    Attributes:
      built, workdir: the experiment in the phase of the trained network, and its work directory.
      trained: the networks, and how they were trained.
      space, pieces: the space, and the pieces of its networks.
      limits: the limits.
      traded: the costs that are traded off against the score.
      macs: the MACs of networks.
    """

    def __init__(
        self,
        built: Built,
        workdir: pathlib.Path,
        limited: Sequence[Mapping[str, Any]],
        traded: Sequence[Mapping[str, Any]],
    ):
        """Reads the latency tables, and checks that the limits can be met.

        Args:
          built, workdir: see `Problem`.
          limited: `config.search.limits`.
          traded: `config.search.front`.

        Raises:
          UserError: a table is missing or of another space, or no network meets the limits.
        """
        self.built, self.workdir = built, workdir
        self.trained = _space.trained(built, workdir)
        self.space = self.trained.networks.space
        self.pieces = _space.pieces(built, self.trained.networks)
        entries = [LimitSettings(**section) for section in limited]
        costs = [self._cost(e) for e in entries]
        self.limits = _limits(self.space, entries, costs)
        self.macs = limits.cost("macs", self.pieces)
        named = [self._cost(CostSettings(**section)) for section in traded]
        self.traded = named or costs or [self.macs]
        self._canonical, self._active = (
            jax.jit(jax.vmap(make(self.space, self.pieces.columns)))
            for make in (encode.canonical, encode.effects)
        )
        _check_limits(self.space, self.limits)

    def _cost(self, entry: CostSettings) -> Cost:
        if entry.cost != "latency":
            return limits.cost(entry.cost, self.pieces, bits=entry.bits)
        path = table_path(self.workdir, entry.table)
        table = latency_table.read(path)
        cost = limits.cost("latency", self.pieces, table=table, path=str(path))
        ends = spaces.stack([self.space.smallest(), self.space.largest()])
        if (least := float(cost.of(ends).min())) <= 0:
            raise UserError(
                f"{path} predicts a latency of {least:.3g} ms for a network of the space: delete it, and measure it anew with"
                " --job=latency_table and more config.latency_table.rounds"
            )
        return cost

    def canonical(self, archs: Arch) -> Arch:
        """Returns architectures with 0 in positions without effect, as numpy arrays."""
        return jax.device_get(self._canonical(archs))

    def active(self, arch: Arch) -> Arch:
        """Returns for each position of an architecture whether it has an effect."""
        return spaces.unstack(self._active(spaces.stack([arch])))[0]


def check_counted(built: Built, limited: Sequence[Mapping[str, Any]]) -> None:
    """Raises a UserError if no network of an experiment's space meets the limits on counted costs, such as MACs.

    Args:
      built: the experiment, which need not be trained.
      limited: see `Problem`; limits on measured latencies are left out.
    """
    entries = [LimitSettings(**s) for s in limited if s["cost"] != "latency"]
    if not entries:
        return
    networks = _space.family(built)
    pieces = _space.pieces(built, networks)
    costs = [limits.cost(e.cost, pieces, bits=e.bits) for e in entries]
    _check_limits(networks.space, _limits(networks.space, entries, costs))


def _limits(space, entries: Sequence[LimitSettings], costs: Sequence[Cost]) -> Limits:
    """Returns limits on the costs of a space's networks."""
    largest = spaces.stack([space.largest()])
    at_most = [
        e.at_most or e.share * float(c.of(largest)[0])
        for e, c in zip(entries, costs, strict=True)
    ]
    return Limits(costs, at_most)


def _check_limits(space, limited: Limits) -> None:
    """Raises a UserError if no network that was found meets the limits."""
    if not limited.costs:
        return
    arch = limits.nearest(space, limited)
    if float(limited.share(spaces.stack([arch]))[0]) > 1:
        raise UserError(
            f"config.search.limits: no network of the space meets them; the nearest has {limited.describe(arch)}: raise at_most"
        )
