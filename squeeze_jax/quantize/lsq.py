"""Quantization-aware training with learned step sizes (LSQ): in training, the network computes as its integer file will.

Esser, McKinstry, Bablani, Appuswamy, Modha 2019, arXiv 1902.08153. With step size s and integer levels from Qn to Qp, a value x
becomes

    x̂ = round(clip(v, Qn, Qp)) s,    v = x / s

With the straight-through estimator, dx̂/dx is 1 inside the range and 0 outside. The gradient of the step size is

    dx̂/ds = round(v) - v  inside the range,   Qn or Qp  outside        (equation 3)

times g = 1 / sqrt(N Qp) (section 2.2), where N values share the step size.

As in the int8 files of LiteRT, weights have a symmetric range and one step size per output channel; activations have one step
size per tensor, and a zero point. A step size is s = s0 exp(θ): s0 is the observed range divided by the number of levels, and
the parameter θ is learned and starts at 0. For activations, the range is observed in the last steps before `start`; for
weights it is that of the current weights. So the step sizes are right at whatever step quantization starts. This is a method of
the plug point `forward`.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Forward, Own, Tap
from squeeze_jax.ranges import NonNegative, Range, Whole, Zero
from squeeze_jax.registry import checked

WEIGHTS = (("kernel$", True),)
ACTIVATIONS = (("/inputs$", True),)
# Tolerance at the ends of the range, in levels: in float32 the largest weight does not lie exactly on the highest level.
_TOLERANCE = 1e-3


@checked
def make(
    bits: Annotated[int, Range(2, 16)] = 8,
    activation_bits: Annotated[int, Zero()] | Annotated[int, Range(2, 16)] = 8,
    start: Whole = 0,
    observe: Whole = 20,
    rate: NonNegative = 1.0,
    weights: tuple[tuple[str, bool], ...] = WEIGHTS,
    activations: tuple[tuple[str, bool], ...] = ACTIVATIONS,
) -> Forward:
    """Returns the method, which changes the forward pass.

    Args:
      bits: number of bits of weights, 2 to 16.
      activation_bits: number of bits of activations, 2 to 16; 0 does not quantize activations.
      start: first step that quantizes. Steps count from the begin of the phase, so a later phase that continues to quantize
        has a `start` of 0.
      observe: number of steps before `start` in which the ranges of activations are observed, at least 0. The step `start`
        observes them, too.
      rate: learning rate of the step sizes, as a multiple of the weights' learning rate. The paper trains 8-bit networks with
        a learning rate of 1e-3 for both (section 2.3). If weights have a learning rate of 0.1, a `rate` of 0.01 gives the
        step sizes 1e-3.
      weights: ordered pairs (regex, bool) for parameter names. The first match decides whether a parameter is quantized. A
        parameter without a match is not quantized.
      activations: the same for names of arrays in the network: a layer and one of inputs, kernel and outputs, such as
        "fire2/squeeze1x1/inputs".

    Raises:
      UserError: A value is out of range. When the method gets the network: a rule matches nothing.
    """
    _check(bits, activation_bits, start, observe, rate)

    def chosen_weights(params):
        network = {k: v for k, v in params.items() if k != METHODS}
        where = "quantize.lsq: weights"
        chosen = tree.flatten(
            tree.apply_rules(weights, network, default=False, where=where)
        )
        return {k: w for k, w in tree.flatten(network).items() if chosen[k]}

    def chosen_taps(taps):
        names = dict.fromkeys(tap.name for tap in taps)
        where = "quantize.lsq: activations"
        flat = dict.fromkeys(names, 0)
        chosen = tree.apply_rules(activations, flat, default=False, where=where)
        return [name for name in names if chosen[name]]

    def init(key, params, taps):
        del key
        thetas = {_theta_name(k): jnp.zeros(w.shape[-1]) for k, w in chosen_weights(params).items()}  # fmt: skip
        if activation_bits:
            thetas |= {_theta_name(name): jnp.zeros(()) for name in chosen_taps(taps)}
        return thetas

    def state(params, taps):
        del params
        if not activation_bits:
            return {}
        empty_range = {"low": jnp.float32(jnp.inf), "high": jnp.float32(-jnp.inf)}
        return {name: dict(empty_range) for name in chosen_taps(taps)}

    def reparametrize(params, own):
        names = chosen_weights(params)

        def quantize_if_chosen(name, weight):
            if name not in names:
                return weight
            theta = own.params[_theta_name(name)]
            rounded = quantized_weight(weight, theta, bits, rate)
            return jnp.where(own.step >= start, rounded, weight)

        return tree.map_named(quantize_if_chosen, params)

    def intercept(tap: Tap, x: jax.Array, own: Own):
        if own.state is None or tap.name not in own.state:
            return x, {}
        value_range = own.state[tap.name]
        if own.train:
            observes = (own.step >= start - observe) & (own.step <= start)
            value_range = _observed_range(x, value_range, observes)
        theta = own.params[_theta_name(tap.name)]
        rounded = quantized_activation(x, theta, value_range, activation_bits, rate)
        # Without an observed range, activations stay as they are.
        has_range = value_range["high"] >= value_range["low"]
        active = (own.step >= start) & has_range
        changes = {tap.name: value_range} if own.train else {}
        return jnp.where(active, rounded, x), changes

    return Forward(
        reparametrize=reparametrize,
        intercept=intercept if activation_bits else None,
        taps=lambda name: any(re.search(rule[0], name) for rule in activations),
        init=init,
        state=state if activation_bits else None,
        integer=True,
        until=start,
    )


def _check(bits, activation_bits, start, observe, rate) -> None:
    if not rate >= 0:
        raise UserError(f"quantize.lsq: rate = {rate} should not be negative")
    if not 2 <= bits <= 16:
        raise UserError(f"quantize.lsq: bits = {bits} should lie in 2..16")
    if activation_bits and not 2 <= activation_bits <= 16:
        raise UserError(
            f"quantize.lsq: activation_bits = {activation_bits} should lie in 2..16, or be 0 for none"
        )
    for name, value in ("start", start), ("observe", observe):
        if value < 0:
            raise UserError(f"quantize.lsq: {name} = {value} should not be negative")


def _theta_name(name: str) -> str:
    """Returns the name of the parameter θ of a weight's or a tap's step size; a rule like "kernel$" does not match it."""
    return f"{name}_step"


def quantized_weight(
    weight: jax.Array, theta: jax.Array, bits: int, rate: float = 1.0
) -> jax.Array:
    """Returns a kernel, rounded to integer levels of a symmetric range, as floats (fake quantization).

    Args:
      weight: kernel [..., c].
      theta: parameter θ of the step size, [c].
      bits: number of bits; levels are -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
      rate: see `make`.
    """
    top = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(weight), tuple(range(weight.ndim - 1)))
    observed = jnp.where(largest > 0, largest, 1.0) / top
    count = weight.size // weight.shape[-1]
    step = step_size(observed, theta, count, top, rate)
    return fake(weight, step, -top, top)


def quantized_activation(
    x: jax.Array,
    theta: jax.Array,
    value_range: Mapping[str, Any],
    bits: int,
    rate: float = 1.0,
) -> jax.Array:
    """Returns activations, rounded to integer levels with one step size and a zero point, as floats (fake quantization).

    Args:
      x: activations [b, ...].
      theta: parameter θ of the step size, [].
      value_range: the observed range {"low", "high"}, float32 [] each; it is extended to contain 0.
      bits: number of bits; levels are -z to 2^bits - 1 - z for a zero point z.
      rate: see `make`.
    """
    top = 2**bits - 1
    low = jnp.minimum(value_range["low"], 0.0)
    high = jnp.maximum(value_range["high"], 0.0)
    width = jnp.where(jnp.isfinite(high - low) & (high > low), high - low, 1.0)
    observed = width / top
    zero = jnp.clip(jnp.round(-jnp.where(jnp.isfinite(low), low, 0.0) / observed), 0, top)  # fmt: skip
    count = math.prod(x.shape[1:])
    step = step_size(observed, theta, count, top, rate)
    return fake(x.astype(jnp.float32), step, -zero, top - zero).astype(x.dtype)


def fake(x: jax.Array, step: jax.Array, low, high) -> jax.Array:
    """Returns round(clip(x / step, low, high)) * step; the gradient treats the rounding as the identity.

    A value at the end of the range counts as inside, because the largest weight of each channel lies there.

    Args:
      x: float array.
      step: step size, broadcastable to x.
      low, high: lowest and highest level.
    """
    levels = x / step
    inside = (levels > low - _TOLERANCE) & (levels < high + _TOLERANCE)
    clipped = jax.lax.stop_gradient(jnp.clip(levels, low, high))
    levels = jnp.where(inside, levels, clipped)
    return (levels + jax.lax.stop_gradient(jnp.round(clipped) - levels)) * step


def step_size(
    observed: jax.Array, theta: jax.Array, count: int, top: int, rate: float = 1.0
) -> jax.Array:
    """Returns the step size s = s0 exp(θ), with the gradient of LSQ.

    The gradient with respect to θ is dL/dθ = g dL/ds / s. So a step of gradient descent on θ changes s by the same share as
    a step on s itself would, with the gradient g dL/ds.

    Args:
      observed: s0.
      theta: θ, of the same shape.
      count: N, the number of values that share a step size.
      top: Qp, the highest level.
      rate: factor of the gradient.
    """
    step = jax.lax.stop_gradient(observed * jnp.exp(theta))
    g = rate / math.sqrt(count * top)
    return step + (theta - jax.lax.stop_gradient(theta)) * g / step


def _observed_range(x, value_range, observes):
    """Returns the range, extended to the values of x if `observes` is true."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    low = jnp.minimum(value_range["low"], x.min())
    high = jnp.maximum(value_range["high"], x.max())
    return {
        "low": jnp.where(observes, low, value_range["low"]),
        "high": jnp.where(observes, high, value_range["high"]),
    }
