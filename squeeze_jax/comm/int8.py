"""Averages gradients over devices in 8 bits with error feedback; a method of the plug point `exchange`.

Error feedback: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv 1901.09847. Compression in both directions: Tang
et al. 2019 (DoubleSqueeze), arXiv 1905.05957. With n devices, the gradients are divided into n chunks, and device j averages
chunk j:

    x_i = g_i + e_i                             gradient plus residual of device i
    all-to-all of Q(x_i); m = mean_i Q(x_i)     reduce-scatter: device j gets chunk j of m
    all-gather of Q(m)                          every device applies the same Q(m)
    e_i = x_i - Q(x_i), and in chunk i + n (m - Q(m))      the new residual

Q rounds values to int8, with one float32 scale per block of values. At any time, the sum of all applied gradients plus the mean
residual equals the sum of all mean gradients. A device sends 2 (n - 1) / n bytes per value, and the scales; a float32 ring
all-reduce sends 4 times as much, for any n. The residual of the second rounding grows with n: with more than a hundred devices
it dominates the scale of a device's own chunk.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count
from squeeze_jax.registry import checked


@checked
def make(
    rounding: Literal["nearest", "stochastic"] = "nearest",
    block: Count = 256,
    feedback: bool = True,
    smallest: Count = 1024,
) -> methods.Exchange:
    """Returns the exchange, which gives all devices the same mean gradient.

    Args:
      rounding: "nearest", or "stochastic", whose expectation is the exact value.
      block: number of values that share a scale, at least 1; a block never contains values of two parameters.
      feedback: whether to add the rounding error of a step to the next step's gradient.
      smallest: parameters with fewer values than this are averaged in float32; so are the parameters of methods.

    Raises:
      UserError: `block` or `smallest` is less than 1. When the exchange gets the parameters: none of them is large enough.
    """
    for name, value in (("block", block), ("smallest", smallest)):
        if value < 1:
            raise UserError(f"int8.{name} = {value} should be at least 1")

    def compressed_part(grads):
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
            for name, param in compressed_part(params).items()
        }

    def exchange(grads, axis_names, own):
        large = compressed_part(grads)
        small = {k: g for k, g in tree.flatten(grads).items() if k not in large}
        means = jax.lax.pmean(small, axis_names)
        values = {k: g.astype(jnp.float32) for k, g in large.items()}
        if feedback:
            values = {k: g + own.state[k] for k, g in values.items()}
        key = own.key if rounding == "stochastic" else None
        mean, error = _quantized_mean(_to_blocks(values, block), axis_names, key)
        means |= _from_blocks(mean, large)
        residuals = _from_blocks(error, large) if feedback else None
        means = tree.map_named(lambda k, g: means[k].astype(g.dtype), grads)
        return means, residuals

    if not feedback:
        return methods.Exchange(exchange)
    return methods.Exchange(exchange, state, mean_residuals)


def mean_residuals(
    residuals: dict[str, jax.Array], devices: int
) -> dict[str, jax.Array]:
    """Gives each of another number of devices the mean of the residuals.

    The mean residual stays what it was, and with it the sum that error feedback keeps: all applied gradients plus the mean
    residual are all mean gradients.

    Args:
      residuals: {parameter: float32 [devices before, ...]}.
      devices: the number of devices now.
    """
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x.mean(0), (devices, *x.shape[1:])), residuals
    )


def quantize(
    blocks: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks of values to 8 bits, with one scale per block.

    Args:
      blocks: float32 [..., block].
      key: random key for stochastic rounding; None rounds to the nearest integer.

    Returns:
      Integers within ±127, int8 [..., block], and scales max |x| / 127, float32 [..., 1]. Their product approximates `blocks`.
    """
    scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) / 127
    x = blocks / jnp.where(scale > 0, scale, 1.0)
    if key is None:
        x = jnp.round(x)
    else:
        x = jnp.floor(x + jax.random.uniform(key, x.shape))
    return jnp.clip(x, -127, 127).astype(jnp.int8), scale


def _quantized_mean(blocks, axis_names, key):
    """Returns the quantized mean over devices of blocks [count, block], and this device's new residual of the same shape."""
    n = jax.lax.axis_size(axis_names)
    count, block = blocks.shape
    rows = -(-count // n)
    blocks = jnp.pad(blocks, ((0, n * rows - count), (0, 0)))
    x = blocks.reshape(n, rows, block)  # a chunk for each device
    keys = (None, None) if key is None else jax.random.split(key)
    sent = quantize(x, keys[0])
    # Each of these is a pair of integers and scales.
    received = [jax.lax.all_to_all(array, axis_names, 0, 0) for array in sent]
    mean = jnp.mean(received[0] * received[1], 0)  # this device's chunk, [rows, block]
    shared = quantize(mean, keys[1])
    gathered = [
        jax.lax.all_gather(array, axis_names, to="invarying") for array in shared
    ]
    error = x - sent[0] * sent[1]
    own_chunk = jax.lax.axis_index(axis_names)
    error = error.at[own_chunk].add(n * (mean - shared[0] * shared[1]))
    result = (gathered[0] * gathered[1]).reshape(-1, block)[:count]
    return result, error.reshape(-1, block)[:count]


def _to_blocks(values, block):
    """Joins the arrays of a dict to one array [blocks, block]; zeros fill the last block of each array."""
    rows = [
        jnp.pad(value.reshape(-1), (0, -value.size % block)).reshape(-1, block)
        for value in values.values()
    ]
    return jnp.concatenate(rows)


def _from_blocks(blocks, like):
    """Divides an array of `_to_blocks` into a dict of arrays with the names and shapes of `like`."""
    block, start, result = blocks.shape[1], 0, {}
    for name, value in like.items():
        stop = start + -(-value.size // block)
        flat = blocks[start:stop].reshape(-1)[: value.size]
        result[name], start = flat.reshape(value.shape), stop
    return result
