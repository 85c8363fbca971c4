"""Gradients as 8-bit integers on the wire, with error feedback: a quarter of the bytes of float32.

Seide et al. 2014 (1-bit SGD, Interspeech) and Karimireddy et al. 2019, arXiv 1901.09847: a device sends its gradient
plus what it could not send before, quantized, and keeps the difference for the next step, so nothing is lost for good:

    a = g + e        q = Q(a)        e' = a - q

Q rounds each block of values to integers in -127..127 times one float32 scale, the block's largest magnitude / 127. The
exchange is a reduce-scatter followed by an all-gather, as in a ring all-reduce of floats: each device averages one part of
the gradient and sends the average, quantized again, to all. That second error is the part's owner's to keep:
it is divided among the devices' next gradients through the owner's own residual.
Plug point exchange.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.errors import UserError
from squeeze_jax.methods import Exchange

LEVELS = 127


def make(
    block: int = 256,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    feedback: bool = True,
) -> Exchange:
    """Returns the exchange: the mean of the devices' gradients.

    Args:
      block: values that share a scale, at least 1; a scale is 4 bytes.
      rounding: "stochastic" is unbiased, and noisier.
      feedback: whether what was not sent is added to the next gradient.

    Raises:
      UserError: a block below 1.
    """
    if block < 1:
        raise UserError(f"comm.int8: block = {block} should be at least 1")

    def state(params):
        if not feedback:
            return {}
        return {"residual": jax.tree.map(jnp.zeros_like, params)}

    def exchange(grads, axis_names, own):
        leaves, structure = jax.tree.flatten(grads)
        residual = jax.tree.leaves((own.state or {}).get("residual", {}))
        wanted = (
            [g + r for g, r in zip(leaves, residual, strict=True)]
            if feedback
            else leaves
        )
        devices = lax.axis_size(axis_names)
        flat = jnp.concatenate([w.ravel().astype(jnp.float32) for w in wanted])
        parts = _in_parts(flat, devices, block)  # [devices, blocks, block]
        first, second = jax.random.split(own.key)
        sent, kept = _exchanged(parts, axis_names, devices, rounding, first, second)
        mean = _leaves(sent, leaves, structure)
        if not feedback:
            return mean, {}
        return mean, {"residual": _leaves(kept, leaves, structure)}

    return Exchange(exchange, state)


def _exchanged(parts, axis_names, devices, rounding, first, second):
    """(the mean on all devices, what this device has not sent), both [devices * blocks * block]."""
    integers, scales = quantize(parts, rounding, first)
    error = parts - dequantize(integers, scales)
    # Device d gets part d of all.
    integers, scales = (
        lax.all_to_all(x, axis_names, 0, 0, tiled=True) for x in (integers, scales)
    )
    mine = dequantize(integers, scales).mean(0)  # [blocks, block]
    integers, scales = quantize(mine, rounding, second)
    # The mean's error counts for all devices: as a part of one device's gradient it is so many times as large.
    lost = devices * (mine - dequantize(integers, scales))
    error = error.at[lax.axis_index(axis_names)].add(lost)
    integers, scales = (
        lax.all_gather(x, axis_names, to="invarying") for x in (integers, scales)
    )
    return dequantize(integers, scales).ravel(), error.ravel()


def _in_parts(flat, devices, block):
    blocks = math.ceil(flat.size / (devices * block))
    padding = devices * blocks * block - flat.size
    return jnp.pad(flat, (0, padding)).reshape(devices, blocks, block)


def _leaves(flat, like, structure):
    leaves, begin = [], 0
    for leaf in like:
        part = flat[begin : begin + leaf.size]
        leaves.append(part.reshape(leaf.shape).astype(leaf.dtype))
        begin += leaf.size
    return jax.tree.unflatten(structure, leaves)


def quantize(
    x: jax.Array, rounding: str = "nearest", key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns int8 [..., block] and scales float32 [..., 1] of x [..., block]; key for stochastic rounding."""
    scales = jnp.max(jnp.abs(x), -1, keepdims=True) / LEVELS
    levels = x / jnp.where(scales > 0, scales, 1.0)
    if rounding == "stochastic":
        levels = jnp.floor(levels + jax.random.uniform(key, x.shape))
    else:
        levels = jnp.round(levels)
    return jnp.clip(levels, -LEVELS, LEVELS).astype(jnp.int8), scales


def dequantize(integers: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 of what `quantize` returned."""
    return integers.astype(jnp.float32) * scales
