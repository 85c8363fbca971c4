"""Computes the gradients of a batch from its parts: accumulated parts, and the devices of a gradient exchange.

The gradients of the parts are averaged. The weight of a part is its number of examples that count. Means by
`nn.means.mean` divide by the sums of weights of the whole batch. So the average over the parts is the mean over the batch,
whether a loss counts examples, tokens or pixels.
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
    """A method with its name.

    Attributes:
      name: key of the method's parameters in `params["methods"]`, and of its state in `State.extra`.
      method: the method.
    """

    name: str
    method: Any


def compute_in_parts(
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
    """Computes gradients, statistics, carry and metrics of one batch, in `accumulate` parts one after the other.

    Args:
      compute: (params, stats, carry, batch, key) → (grads, stats, carry, metrics).
      weigh: the same arguments → for each term of the objective the sums of weights by which its means divide.
      accumulate: number of parts.
      axes: mesh axes over whose devices the batch is also split, inside `jax.shard_map`; () for none.
      params, stats, carry, batch, key: the arguments of `compute`, for the whole batch.

    Returns:
      (grads, stats, carry, metrics) of the batch. Statistics pass from part to part; gradients and metrics are averaged.
    """
    examples = _sum_over(axes, batch["mask"].sum(dtype=jnp.float32))

    def compute_part(totals, stats, carry, batch, key):
        share = batch["mask"].sum(dtype=jnp.float32) / means.one_if_zero(examples)
        divisors = {name: means.Divisors(sums, share) for name, sums in totals.items()}
        grads, after, carry, metrics = compute(
            params, stats | {"divisors": divisors}, carry, batch, key
        )
        return grads, {k: after[k] for k in stats}, carry, metrics

    if accumulate == 1:
        totals = _sum_over(axes, weigh(params, stats, carry, batch, key))
        return compute_part(totals, stats, carry, batch, key)

    rows = batch["mask"].shape[0]
    if rows % accumulate:
        raise UserError(
            f"accumulate = {accumulate}: a batch of {rows} examples{' on a device' if axes else ''} does not divide into"
            f" {accumulate} equal parts"
        )

    # [b] → [b / n, n] → [n, b / n]: every part takes rows of every device, so nothing moves between devices.
    def split(x):
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    batches, carries = jax.tree.map(split, (batch, carry))
    parts = carries, batches, jax.random.split(key, accumulate)
    totals = jax.lax.map(lambda part: weigh(params, stats, *part), parts)
    totals = _sum_over(axes, jax.tree.map(lambda x: x.sum(0), totals))

    def scan_part(stats, part):
        grads, stats, carry, metrics = compute_part(totals, stats, *part)
        return stats, (grads, metrics), carry

    counts = batches["mask"].sum(1, dtype=jnp.float32)
    shares = counts / means.one_if_zero(counts.mean())
    stats, (grads, metrics), carries = _scan_mean(scan_part, stats, parts, shares)
    return grads, stats, jax.tree.map(join, carries), metrics


def _sum_over(axes, x):
    """Sums a pytree over the devices of mesh axes; returns it unchanged if `axes` is empty."""
    return jax.lax.psum(x, axes) if axes else x


def _scan_mean(fn, stats, parts, shares):
    """Runs a function on one part after the other, and averages one of its results over the parts.

    Args:
      fn: (stats, part) → (stats, values, rows).
      stats: the statistics before the first part.
      parts: pytree of arrays [n, ...], a leading axis over the parts.
      shares: float32 [n], the weights of the parts, 1 on average.

    Returns:
      The statistics after the last part, the weighted mean of `values`, and the `rows` of all parts, [n, ...].
    """

    def add(carry, part_and_share):
        (stats, total), (part, share) = carry, part_and_share
        stats, values, rows = fn(stats, part)
        total = jax.tree.map(lambda t, x: t + share * x, total, values)
        return (stats, total), rows

    shapes = jax.eval_shape(fn, stats, jax.tree.map(lambda x: x[0], parts))[1]
    # Inside shard_map the sum over a device's own rows varies over the devices, so its initial value has to vary too.
    zeros = jax.tree.map(
        lambda s: varying.like(jnp.zeros(s.shape, s.dtype), shares), shapes
    )
    (stats, total), rows = jax.lax.scan(add, (stats, zeros), (parts, shares))
    return stats, jax.tree.map(lambda x: x / len(shares), total), rows


def with_exchange(
    compute: Callable, exchange: Named, first: int, mesh: Mesh
) -> Callable:
    """Wraps a function that computes gradients, so that each device computes its own and the exchange reduces them.

    Args:
      compute: (params, stats, carry, batch, key) → (grads, stats, carry, metrics).
      exchange: the named method of the plug point `exchange`.
      first: the step at which the phase began.
      mesh: the mesh over whose axes `BATCH` the rows of a batch are divided.

    Returns:
      A function with the arguments and results of `compute`, for the global batch.
    """
    name, method = exchange

    def compute_on_device(params, stats, device_state, carry, batch, key):
        # JAX sums the gradient of a replicated weight over the devices. The gradient of a varying weight stays local.
        vary = functools.partial(
            jax.tree.map, lambda w: jax.lax.pcast(w, BATCH, to="varying")
        )
        # Running statistics are computed over all devices, and so are the shares of batches in them.
        extra = {k: v if k == SHARES else vary(v) for k, v in stats["extra"].items()}
        params, stats = vary(params), stats | {"extra": extra}
        device_key = jax.random.fold_in(key, jax.lax.axis_index(BATCH))
        step = stats["step"]
        grads, stats, carry, metrics = compute(params, stats, carry, batch, device_key)
        count = batch["mask"].sum(dtype=jnp.float32)
        share = count / means.one_if_zero(jax.lax.pmean(count, BATCH))
        grads, metrics = jax.tree.map(lambda x: share * x, (grads, metrics))
        own = methods.Own(
            params={},
            state=jax.tree.map(lambda x: x[0], device_state),  # from [1, ...]
            key=jax.random.fold_in(device_key, 1),
            step=step - first,
            train=True,
        )
        grads, device_state = method.exchange(grads, BATCH, own)
        _check_equal_on_devices(grads, name)
        device_state = jax.tree.map(lambda x: x[None], device_state)
        stats = {k: v for k, v in stats.items() if k != "step"}
        stats = jax.tree.map(_reconcile, stats)
        return grads, stats, device_state, carry, jax.lax.pmean(metrics, BATCH)

    mapped = jax.shard_map(
        compute_on_device,
        mesh=mesh,
        in_specs=(P(), P(), P(BATCH), P(BATCH), P(BATCH), P()),
        out_specs=(P(), P(), P(BATCH), P(BATCH), P()),
    )

    def compute_and_exchange(params, stats, carry, batch, key):
        device_states = stats["extra"].get(name)
        others = {k: v for k, v in stats["extra"].items() if k != name}
        grads, stats, device_states, carry, metrics = mapped(
            params, stats | {"extra": others}, device_states, carry, batch, key
        )
        if jax.tree.leaves(device_states):
            stats["extra"] |= {name: device_states}
        return grads, stats, carry, metrics

    return compute_and_exchange


def _check_equal_on_devices(grads, name: str) -> None:
    """Raises a UserError if gradients may still differ between the devices after the exchange called `name`."""
    if any(varying.axes(g) for g in jax.tree.leaves(grads)):
        raise UserError(
            f"config.exchange: {name} returns gradients that differ between the devices: return their mean over the"
            " devices, such as jax.lax.pmean(grads, axis_names)"
        )


def _reconcile(x):
    """Makes a statistic equal on all devices: takes the mean of floats, and the maximum of integers and flags."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.pmean(x, BATCH)
    if x.dtype == bool:
        return jax.lax.pmax(x.astype(jnp.int8), BATCH).astype(bool)
    return jax.lax.pmax(x, BATCH)
