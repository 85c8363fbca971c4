"""Costs of all networks of a space, and limits on them: MACs, parameters, bytes, peak memory, and latencies on devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.nas import costs
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.space import Arch, Space

KINDS = ("latency", "macs", "parameters", "bytes", "memory")


class Cost(NamedTuple):
    """A cost of networks.

    Attributes:
      name: such as "latency, tflite_1".
      unit: such as "ms"; "" for a number.
      of: architectures with a leading axis n → float32 [n].
    """

    name: str
    unit: str
    of: Callable[[Arch], jax.Array]

    def show(self, value: float) -> str:
        """Returns a value for the user, such as "latency, tflite_1 0.0312 ms"."""
        number = f"{value:.4g}" if self.unit == "ms" else f"{round(value):,}"
        return f"{self.name} {number}{' ' if self.unit else ''}{self.unit}"


def cost(
    kind: str, pieces: costs.Pieces, *, table: Any = None, path: str = "", bits: int = 8
) -> Cost:
    """Returns a cost of all networks of a space.

    Args:
      kind: one of `KINDS`; "bytes" are those of the weights, "memory" the peak of activations in bytes.
      pieces: of the space.
      table: latencies of a device, for "latency".
      path: of the table, for errors.
      bits: of a weight or of an activation, for "bytes" and "memory".

    Raises:
      UserError: the table lacks a piece of the space.
    """
    if kind == "latency":
        return Cost(table.name, "ms", _vectorised(pieces.latency(table, path)))
    if kind == "macs":
        return Cost("MACs", "", _vectorised(pieces.tabulate(costs.macs)))
    if kind == "memory":
        of = pieces.tabulate(
            lambda placed: costs.peak_bytes(placed, bits), costs.largest
        )
        return Cost(f"peak memory in {bits} bits", "bytes", _vectorised(of))
    of = pieces.tabulate(costs.parameters)
    if kind == "parameters":
        return Cost("parameters", "", _vectorised(of))
    return Cost(
        f"weights in {bits} bits",
        "bytes",
        _vectorised(lambda arch: of(arch) * (bits / 8)),
    )


def _vectorised(of: Callable) -> Callable:
    return jax.jit(jax.vmap(of))


class Limits(NamedTuple):
    """Limits on several costs at once.

    Attributes:
      costs: the costs.
      at_most: the largest allowed value of each.
    """

    costs: Sequence[Cost]
    at_most: Sequence[float]

    def share(self, archs: Arch) -> jax.Array:
        """Returns the largest ratio of a cost to its limit, [n]; above 1 a limit is broken. 0 without limits."""
        if not self.costs:
            return jnp.zeros(jax.tree.leaves(archs)[0].shape[0])
        ratios = [
            c.of(archs) / m for c, m in zip(self.costs, self.at_most, strict=True)
        ]
        return jnp.stack(ratios).max(0)

    def describe(self, arch: Arch) -> str:
        """Returns the costs of an architecture with their limits, in a line."""
        archs = spaces.stack([arch])
        return ", ".join(
            f"{c.show(float(c.of(archs)[0]))} (at most {m:,g})"
            for c, m in zip(self.costs, self.at_most, strict=True)
        )


def nearest(space: Space, limits: Limits) -> Arch:
    """Returns an architecture that breaks the limits least: from the smallest on, the best change of one position, repeatedly.

    Args:
      space: the space.
      limits: the limits, at least one.
    """
    arch, lowest = space.smallest(), np.inf
    while True:
        archs = _neighbours(space, arch)
        shares = np.asarray(limits.share(archs))
        if shares.min() >= lowest:
            return arch
        best = int(shares.argmin())
        lowest, arch = shares[best], jax.tree.map(lambda a, i=best: a[i], archs)


def _neighbours(space: Space, arch: Arch) -> Arch:
    """Returns an architecture and all that differ from it in one position, with a leading axis."""
    rows = [arch]
    for name, choices in space.choices.items():
        for place, values in enumerate(choices):
            for index in range(len(values)):
                rows.append(spaces.changed(arch, name, place, index))
    return spaces.stack(rows)
