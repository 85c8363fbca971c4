"""Gradients of one batch from its parts: accumulated parts, one after the other, and the devices of an exchange.

A part weighs as much as it has examples that count. Means by `nn.means.mean` divide by the sums of weights of the whole
batch, so that the average over the parts is the mean over the batch, whatever it counts: examples, tokens, pixels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means, varying
from squeeze_jax.nn.norm import SHARES
from squeeze_jax.train.sharding import BATCH


class Named(NamedTuple):
    """A method and the name under which its parameters and state stand."""

    name: str
    method: Any


def in_parts(
    compute: Callable,
    weigh: Callable,
    accumulate: int,
    axes: tuple[str, ...],
    params,
    stats,
    carry,
    batch,
    key,
):
    """Computes gradients, statistics, carry and metrics of one batch, in `accumulate` parts.

    Args:
      compute: (params, stats, carry, batch, key) → (grads, stats, carry, metrics).
      weigh: of the same arguments → by term of the loss the sums of weights of its means.
      accumulate: number of parts.
      axes: mesh axes over whose devices the batch is split besides, inside `jax.shard_map`; () for none.
      params, stats, carry, batch, key: of `compute`.
    """
    examples = _over(axes, batch["mask"].sum(dtype=jnp.float32))

    def part(totals, stats, carry, batch, key):
        share = batch["mask"].sum(dtype=jnp.float32) / jnp.maximum(examples, 1.0)
        by = {name: means.Divisors(each, share) for name, each in totals.items()}
        grads, after, carry, metrics = compute(
            params, stats | {"divisors": by}, carry, batch, key
        )
        return grads, {k: after[k] for k in stats}, carry, metrics

    if accumulate == 1:
        totals = _over(axes, weigh(params, stats, carry, batch, key))
        return part(totals, stats, carry, batch, key)

    # [b] → [b / n, n] → [n, b / n]: every part takes rows of every device, so nothing moves between devices.
    def split(x):
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    batches, carries = jax.tree.map(split, (batch, carry))
    rows = carries, batches, jax.random.split(key, accumulate)
    totals = jax.lax.map(lambda each: weigh(params, stats, *each), rows)
    totals = _over(axes, jax.tree.map(lambda x: x.sum(0), totals))

    def one(stats, rows):
        grads, stats, carry, metrics = part(totals, stats, *rows)
        return stats, (grads, metrics), carry

    counts = batches["mask"].sum(1, dtype=jnp.float32)
    shares = counts / _not_zero(counts.mean())
    stats, (grads, metrics), carries = _scan_mean(one, stats, rows, shares)
    return grads, stats, jax.tree.map(joined, carries), metrics


def _over(axes, x):
    """Sums over the devices of mesh axes."""
    return jax.lax.psum(x, axes) if axes else x


def _not_zero(count):
    return jnp.where(count > 0, count, 1.0)


def _scan_mean(part, stats, parts, shares):
    """Runs `part` over the leading axis; returns the last statistics, the mean of what it yields, and its rows.

    A part weighs as much as it has examples that count: `shares` [n], 1 on average.
    """

    def add(carry, each):
        (stats, total), (rows, share) = carry, each
        stats, new, after = part(stats, rows)
        total = jax.tree.map(lambda t, x: t + share * x, total, new)
        return (stats, total), after

    shapes = jax.eval_shape(part, stats, jax.tree.map(lambda x: x[0], parts))[1]
    # Inside shard_map a sum over a device's own rows varies over the devices, and so must what it starts from.
    zeros = jax.tree.map(
        lambda s: varying.like(jnp.zeros(s.shape, s.dtype), shares), shapes
    )
    (stats, total), rows = jax.lax.scan(add, (stats, zeros), (parts, shares))
    return stats, jax.tree.map(lambda x: x / len(shares), total), rows


def exchanged(compute: Callable, exchange: Named, first: int, mesh: Mesh) -> Callable:
    """Computes gradients on each device's own rows and reduces them by the exchange."""
    name, method = exchange

    def local(params, stats, mine, carry, batch, key):
        # A replicated weight's gradient would be summed over devices already; a varying one's is the device's own.
        varied = functools.partial(
            jax.tree.map, lambda w: jax.lax.pcast(w, BATCH, to="varying")
        )
        # Running statistics are over all devices, and so are the shares of batches in them.
        extra = {k: v if k == SHARES else varied(v) for k, v in stats["extra"].items()}
        params, stats = varied(params), stats | {"extra": extra}
        own_key = jax.random.fold_in(key, jax.lax.axis_index(BATCH))
        step = stats["step"]
        grads, stats, carry, metrics = compute(params, stats, carry, batch, own_key)
        count = batch["mask"].sum(dtype=jnp.float32)
        share = count / _not_zero(jax.lax.pmean(count, BATCH))
        grads, metrics = jax.tree.map(lambda x: share * x, (grads, metrics))
        own = methods.Own(
            params={},
            state=jax.tree.map(lambda x: x[0], mine),  # [1, ...]: this device's
            key=jax.random.fold_in(own_key, 1),
            step=step - first,
            train=True,
        )
        grads, mine = method.exchange(grads, BATCH, own)
        _check_shared(grads, name)
        mine = jax.tree.map(lambda x: x[None], mine)
        stats = {k: v for k, v in stats.items() if k != "step"}
        stats = jax.tree.map(_agreed, stats)
        return grads, stats, mine, carry, jax.lax.pmean(metrics, BATCH)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), P(BATCH), P(BATCH), P(BATCH), P()),
        out_specs=(P(), P(), P(BATCH), P(BATCH), P()),
    )

    def computed(params, stats, carry, batch, key):
        mine = stats["extra"].get(name)
        others = {k: v for k, v in stats["extra"].items() if k != name}
        grads, stats, mine, carry, metrics = mapped(
            params, stats | {"extra": others}, mine, carry, batch, key
        )
        if jax.tree.leaves(mine):
            stats["extra"] |= {name: mine}
        return grads, stats, carry, metrics

    return computed


def _check_shared(grads, name: str) -> None:
    """Raises a UserError for gradients that still differ between the devices."""
    if any(varying.axes(g) for g in jax.tree.leaves(grads)):
        raise UserError(
            f"config.exchange: {name} returns gradients that differ between the devices: return their mean over the"
            " devices, such as jax.lax.pmean(grads, axis_names)"
        )


def _agreed(x):
    """Reconciles a statistic that differs between devices: by the mean, or by the largest of counts and flags."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.pmean(x, BATCH)
    if x.dtype == bool:
        return jax.lax.pmax(x.astype(jnp.int8), BATCH).astype(bool)
    return jax.lax.pmax(x, BATCH)
