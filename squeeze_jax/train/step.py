"""One training step, pure: `(state, batch, key, *frozen) → (state, metrics)`, and its four plug points.

    1 gradient transforms   `tx`, an optax chain
    2 forward weights       `weights`, functions params → params applied inside the loss
    3 objective             `objective(logits, endpoints, batch) → (scalar, metrics)`; one that learns parameters of its
                            own takes them as the fourth argument
    4 gradient exchange     `exchange(key, grads, axis_name) → grads`, inside `jax.shard_map`

Sharding stays outside: the arrays that come in carry it. Only an explicit gradient exchange needs the mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from squeeze_jax.nn import varying
from squeeze_jax.train.sharding import BATCH
from squeeze_jax.train.state import OBJECTIVE, State, network


def make(
    model: nn.Module,
    tx: optax.GradientTransformation,
    objective: Callable,
    *,
    prepare: Callable = lambda key, batch: batch,
    inputs: Callable = lambda batch: batch["image"],
    teach: Callable | None = None,
    weights: Sequence[Callable] = (),
    exchange: Callable | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    accumulate: int = 1,
    ema: float = 0.0,
) -> Callable[..., tuple[State, dict]]:
    """Builds the step.

    Args:
      model: what `inputs` gives → (logits, endpoints).
      tx: gradient transforms; they get the gradients as the extra argument `grads` too.
      objective: (logits, endpoints, batch) → (scalar, metrics).
      prepare: (key, batch) → batch on the accelerator: augmentation.
      inputs: batch → what the network reads: normalised images, say; floating-point arrays are cast to `dtype`.
      teach: (frozen, batch) → what the objective finds as `batch["teacher"]`: outputs of other networks, whose weights
        `frozen` the step takes as its fourth argument. It is outside of what is differentiated.
      weights: reparametrizations, applied in order inside the loss.
      exchange: reduces gradients over the devices; None leaves the mean to the compiler.
      mesh: needed by `exchange`, whose parameters must be replicated.
      dtype: of the computation; master weights and statistics stay float32.
      accumulate: split the batch into so many parts, one after the other; a part weighs as much as it has examples
        that count.
      ema: decay of the averaged weights, 0 for none; it warms up as (1 + t) / (10 + t).

    Returns:
      The pure step; metrics are float32 scalars: "loss", "grad_norm", "examples" (how many counted) and the
      objective's own.
    """

    def loss_of(params, stats, batch, key):
        own = (params[OBJECTIVE],) if OBJECTIVE in params else ()
        params = network(params)
        for reparametrize in weights:
            params = reparametrize(params)
        (logits, endpoints), changed = model.apply(
            {"params": cast(params, dtype), "batch_stats": stats},
            floats(inputs(batch), dtype),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        logits = floats(logits, jnp.float32)
        loss, metrics = objective(logits, endpoints, batch, *own)
        return loss, (changed.get("batch_stats", stats), {"loss": loss, **metrics})

    def gradients(params, stats, batch, key):
        """Gradients, new statistics and metrics of one batch, in `accumulate` parts."""

        def part(stats, batch_and_key):
            batch, key = batch_and_key
            (_, (stats, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(
                params, stats, batch, key
            )
            return stats, (grads, metrics)

        if accumulate == 1:
            stats, (grads, metrics) = part(stats, (batch, key))
            return grads, stats, metrics
        # [b] → [b / n, n] → [n, b / n]: every part takes rows of every device, so nothing moves between devices.
        split = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        counts = split["mask"].sum(1, dtype=jnp.float32)
        keys = jax.random.split(key, accumulate)
        shares = counts / jnp.maximum(counts.mean(), 1.0)
        stats, total = _scan_mean(part, stats, (split, keys), shares)
        return total[0], stats, total[1]

    if exchange is not None:
        gradients = _exchanged(gradients, exchange, mesh)

    def step(state: State, batch: dict, key: jax.Array, *frozen) -> tuple[State, dict]:
        key = jax.random.fold_in(key, state.step)
        prepare_key, forward_key = jax.random.split(key)
        examples = jnp.sum(batch["mask"].astype(jnp.float32))
        batch = prepare(prepare_key, batch)
        if teach is not None:
            batch = batch | {"teacher": teach(*frozen, batch)}
        grads, stats, metrics = gradients(state.params, state.stats, batch, forward_key)
        updates, opt = optax.with_extra_args_support(tx).update(
            grads, state.opt, state.params, grads=grads
        )
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if ema:
            t = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema, (1 + t) / (10 + t))
            fresh = {"params": params, "stats": stats}
            average = jax.tree.map(
                lambda a, b: decay * a + (1 - decay) * b, average, fresh
            )
        metrics |= {"grad_norm": optax.tree.norm(grads), "examples": examples}
        return State(state.step + 1, params, stats, opt, average), metrics

    return step


def make_evaluation(
    model: nn.Module,
    measure: Callable,
    *,
    inputs: Callable = lambda batch: batch["image"],
    weights: Sequence[Callable] = (),
    dtype: str = "float32",
):
    """Builds `(variables, batch) → (sums, rows)`, see `metrics._metric.Metric`; rows get "mask" and "index" too.

    Args:
      model, inputs, weights, dtype: as in `make`.
      measure: (logits, batch) → (sums, rows).
    """

    def evaluate(variables: dict[str, Any], batch: dict):
        params = variables["params"]
        for reparametrize in weights:
            params = reparametrize(params)
        logits, _ = model.apply(
            {**variables, "params": cast(params, dtype)},
            floats(inputs(batch), dtype),
            train=False,
        )
        sums, rows = measure(floats(logits, jnp.float32), batch)
        return sums, rows | {k: batch[k] for k in ("mask", "index") if rows}

    return evaluate


def floats(values, dtype: str):
    """The floating-point arrays of a pytree in a dtype; others as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        values,
    )


def cast(params, dtype: str):
    """Weights in the dtype of the computation; scales and shifts of normalisations stay float32."""
    if dtype == "float32" or not isinstance(params, dict):
        return params
    if "scale" in params:
        return params
    return {
        k: cast(v, dtype) if isinstance(v, dict) else v.astype(dtype)
        for k, v in params.items()
    }


def _scan_mean(part, stats, parts, shares):
    """Runs `part` over the leading axis; returns the last statistics and the mean of what it yields.

    A part weighs as much as it has examples that count: `shares` [n], 1 on average.
    """

    def add(carry, each):
        (stats, total), (each, share) = carry, each
        stats, new = part(stats, each)
        return (stats, jax.tree.map(lambda t, x: t + share * x, total, new)), None

    shapes = jax.eval_shape(part, stats, jax.tree.map(lambda x: x[0], parts))[1]
    # Inside shard_map a sum over a device's own rows varies over the devices, and so must what it starts from.
    zeros = jax.tree.map(
        lambda s: varying.like(jnp.zeros(s.shape, s.dtype), shares), shapes
    )
    (stats, total), _ = jax.lax.scan(add, (stats, zeros), (parts, shares))
    return stats, jax.tree.map(lambda x: x / len(shares), total)


def _exchanged(gradients, exchange, mesh):
    """Computes gradients on each device's own rows and reduces them by `exchange`."""

    def local(params, stats, batch, key):
        # A replicated weight's gradient would be summed over devices already; a varying one's is the device's own.
        params = jax.tree.map(lambda w: jax.lax.pcast(w, BATCH, to="varying"), params)
        own_key = jax.random.fold_in(key, jax.lax.axis_index(BATCH))
        grads, stats, metrics = gradients(params, stats, batch, own_key)
        count = batch["mask"].sum(dtype=jnp.float32)
        share = count / jnp.maximum(jax.lax.pmean(count, BATCH), 1.0)
        grads, metrics = jax.tree.map(lambda x: share * x, (grads, metrics))
        grads = exchange(jax.random.fold_in(own_key, 1), grads, BATCH)
        return grads, jax.lax.pmean(stats, BATCH), jax.lax.pmean(metrics, BATCH)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), P(BATCH), P()),
        out_specs=(P(), P(), P()),
    )
