"""Gradient exchange in 8 bits with error feedback, a method of the plug point `exchange`.

Error feedback: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv 1901.09847. Two-sided compression: Tang et
al. 2019 (DoubleSqueeze), arXiv 1905.05957. Of n devices, device j reduces the j-th of n chunks:

    x_i = g_i + e_i                        gradient and residual of device i
    all-to-all of Q(x_i); m = mean_i Q(x_i)         reduce-scatter; device j has chunk j of m
    all-gather of Q(m)                     every device applies the same Q(m)
    e_i = x_i - Q(x_i),  and in chunk i  + n (m - Q(m))

Q writes int8 numbers with one float32 scale for each block of values. Then the sum of all applied gradients plus the mean
residual equals the sum of all mean gradients. A device sends 2 (n - 1) / n bytes per value, and the scales; a float32
ring all-reduce sends 4 times as much, for any n. The residual of the second rounding grows with n: above a hundred
devices it dominates the scale of a device's own chunk.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count


def make(
    rounding: Literal["nearest", "stochastic"] = "nearest",
    block: Count = 256,
    feedback: bool = True,
    smallest: Count = 1024,
) -> methods.Exchange:
    """Returns the exchange; all devices get the same mean gradient.

    Args:
      rounding: "nearest"; or "stochastic", whose expectation is the exact value.
      block: values that share a scale, at least 1; a block never spans two parameters.
      feedback: whether what was not sent is added to the next gradient.
      smallest: parameters of fewer values than this are averaged in float32, as are parameters that methods own.

    Raises:
      UserError: values out of range; when it receives parameters, none that is large enough.
    """
    for name, value in (("block", block), ("smallest", smallest)):
        if value < 1:
            raise UserError(f"int8.{name} = {value} should be at least 1")

    def compressed(grads):
        flat = tree.flatten(grads)
        large = {
            name: grad
            for name, grad in flat.items()
            if grad.size >= smallest and name.split("/")[0] != methods.METHODS
        }
        if not large:
            raise UserError(
                f"int8.smallest = {smallest}: no parameter has so many values, so nothing is compressed; the largest has"
                f" {max(grad.size for grad in flat.values())}"
            )
        return large

    def state(params):
        return {
            name: jnp.zeros(param.shape, jnp.float32)
            for name, param in compressed(params).items()
        }

    def exchange(grads, axis_names, own):
        large = compressed(grads)
        small = {k: g for k, g in tree.flatten(grads).items() if k not in large}
        means = jax.lax.pmean(small, axis_names)
        values = {k: g.astype(jnp.float32) for k, g in large.items()}
        if feedback:
            values = {k: g + own.state[k] for k, g in values.items()}
        key = own.key if rounding == "stochastic" else None
        mean, error = _mean(_blocks(values, block), axis_names, key)
        means |= _values(mean, large)
        residuals = _values(error, large) if feedback else None
        means = tree.map_named(lambda k, g: means[k].astype(g.dtype), grads)
        return means, residuals

    return methods.Exchange(exchange, state if feedback else None)


def quantize(
    blocks: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks of values to 8 bits.

    Args:
      blocks: float32 [..., block].
      key: for stochastic rounding; None rounds to the nearest.

    Returns:
      int8 [..., block] within ±127, and float32 scales [..., 1], max |x| / 127; their product approximates `blocks`.
    """
    scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) / 127
    x = blocks / jnp.where(scale > 0, scale, 1.0)
    if key is None:
        x = jnp.round(x)
    else:
        x = jnp.floor(x + jax.random.uniform(key, x.shape))
    return jnp.clip(x, -127, 127).astype(jnp.int8), scale


def _mean(blocks, axis_names, key):
    """Returns the quantized mean over devices of blocks [count, block], and this device's new residual."""
    n = jax.lax.axis_size(axis_names)
    count, block = blocks.shape
    rows = -(-count // n)
    blocks = jnp.pad(blocks, ((0, n * rows - count), (0, 0)))
    x = blocks.reshape(n, rows, block)  # a chunk for each device
    keys = (None, None) if key is None else jax.random.split(key)
    sent = quantize(x, keys[0])
    received = [jax.lax.all_to_all(part, axis_names, 0, 0) for part in sent]
    mean = jnp.mean(received[0] * received[1], 0)  # [rows, block]
    shared = quantize(mean, keys[1])
    whole = [jax.lax.all_gather(part, axis_names, to="invarying") for part in shared]
    error = x - sent[0] * sent[1]
    mine = jax.lax.axis_index(axis_names)
    error = error.at[mine].add(n * (mean - shared[0] * shared[1]))
    result = (whole[0] * whole[1]).reshape(-1, block)[:count]
    return result, error.reshape(-1, block)[:count]


def _blocks(values, block):
    """Joins arrays to one of [blocks, block]; pads each with zeros to whole blocks."""
    rows = [
        jnp.pad(value.reshape(-1), (0, -value.size % block)).reshape(-1, block)
        for value in values.values()
    ]
    return jnp.concatenate(rows)


def _values(blocks, like):
    """Takes what `_blocks` returns apart into arrays by name."""
    block, start, result = blocks.shape[1], 0, {}
    for name, value in like.items():
        stop = start + -(-value.size // block)
        flat = blocks[start:stop].reshape(-1)[: value.size]
        result[name], start = flat.reshape(value.shape), stop
    return result
