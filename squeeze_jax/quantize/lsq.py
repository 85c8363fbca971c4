"""Quantization-aware training with learned step sizes: the network runs as its integer file will compute.

Esser, McKinstry, Bablani, Appuswamy, Modha 2019, arXiv 1902.08153 (LSQ). With step size s and levels from Qn to Qp,

    v = x / s        x̂ = round(clip(v, Qn, Qp)) s

and with the straight-through estimator dx̂/dx is 1 inside the range and 0 outside, and

    dx̂/ds = round(v) - v inside,   Qn or Qp outside        (equation 3), times g = 1 / sqrt(N Qp), section 2.2.

As in the int8 files of LiteRT, weights have a symmetric range and a step size for each output channel, activations one
step size a tensor and a zero point. A step size is s = s0 exp(θ): s0 is the observed range divided by the levels, the
parameter θ is learned and begins at 0. So quantization begins right whenever it begins: s0 of activations is observed
over the last steps before `start`, s0 of weights is that of the weights as they are. Plug point forward.
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

WEIGHTS = (("kernel$", True),)
ACTIVATIONS = (("/inputs$", True),)
_BORDER = 1e-3  # of a level: float32 does not put the largest weight exactly on the highest one


def make(
    bits: Annotated[int, Range(2, 16)] = 8,
    activation_bits: Annotated[int, Zero()] | Annotated[int, Range(2, 16)] = 8,
    start: Whole = 0,
    observe: Whole = 20,
    rate: NonNegative = 1.0,
    weights: tuple[tuple[str, bool], ...] = WEIGHTS,
    activations: tuple[tuple[str, bool], ...] = ACTIVATIONS,
) -> Forward:
    """Returns the change of the forward pass.

    Args:
      bits: of weights, 2 to 16.
      activation_bits: of activations, 2 to 16; 0 leaves activations as they are.
      start: the first step that quantizes; steps count from the begin of the phase, so a later phase that should go on
        quantizing has a `start` of 0.
      observe: steps before `start` over which the ranges of activations are observed, at least 0; the step `start` itself
        observes too.
      rate: learning rate of the step sizes, as a share of the weights'. The paper trains 8 bits with a rate of 1e-3 for both
        (section 2.3); where weights learn at 0.1, 0.01 keeps the step sizes at that.
      weights: (regex, whether to quantize) over parameter names, first match wins, no match means no.
      activations: the same over names of taps, such as "fire2/squeeze1x1/inputs"; see `nn/intercept.py`.

    Raises:
      UserError: values out of range; when it gets the network, a rule that matches nothing.
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
        steps = {_step(k): jnp.zeros(w.shape[-1]) for k, w in chosen_weights(params).items()}  # fmt: skip
        if activation_bits:
            steps |= {_step(name): jnp.zeros(()) for name in chosen_taps(taps)}
        return steps

    def state(params, taps):
        del params
        if not activation_bits:
            return {}
        unseen = {"low": jnp.float32(jnp.inf), "high": jnp.float32(-jnp.inf)}
        return {name: dict(unseen) for name in chosen_taps(taps)}

    def reparametrize(params, own):
        names = chosen_weights(params)

        def leaf(name, weight):
            if name not in names:
                return weight
            rounded = quantized_weight(weight, own.params[_step(name)], bits, rate)
            return jnp.where(own.step >= start, rounded, weight)

        return tree.map_named(leaf, params)

    def intercept(tap: Tap, x: jax.Array, own: Own):
        if own.state is None or tap.name not in own.state:
            return x, {}
        known = own.state[tap.name]
        if own.train:
            due = (own.step >= start - observe) & (own.step <= start)
            known = _observed(x, known, due)
        theta = own.params[_step(tap.name)]
        rounded = quantized_activation(x, theta, known, activation_bits, rate)
        # A range that nobody has observed quantizes nothing.
        active = (own.step >= start) & (known["high"] >= known["low"])
        changes = {tap.name: known} if own.train else {}
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


def _step(name: str) -> str:
    """Returns the name of a step size's parameter; no rule for kernels matches it."""
    return f"{name}_step"


def quantized_weight(
    weight: jax.Array, theta: jax.Array, bits: int, rate: float = 1.0
) -> jax.Array:
    """Rounds a kernel [..., c] to integer levels of a symmetric range (fake quantization).

    Args:
      weight: float array.
      theta: [c], logarithm of the learned factor.
      bits: levels run from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
      rate: see `make`.
    """
    top = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(weight), tuple(range(weight.ndim - 1)))
    observed = jnp.where(largest > 0, largest, 1.0) / top
    count = weight.size // weight.shape[-1]
    return fake(weight, step_size(observed, theta, count, top, rate), -top, top)


def quantized_activation(
    x: jax.Array,
    theta: jax.Array,
    known: Mapping[str, Any],
    bits: int,
    rate: float = 1.0,
) -> jax.Array:
    """Rounds activations to integer levels with one step size and a zero point (fake quantization).

    Args:
      x: float array [b, ...].
      theta: [], logarithm of the learned factor.
      known: {"low", "high"}, float32 [] each, the observed range; zero is always in it.
      bits: levels run from -z to 2^bits - 1 - z, z the zero point.
      rate: see `make`.
    """
    top = 2**bits - 1
    low, high = jnp.minimum(known["low"], 0.0), jnp.maximum(known["high"], 0.0)
    width = jnp.where(jnp.isfinite(high - low) & (high > low), high - low, 1.0)
    observed = width / top
    zero = jnp.clip(jnp.round(-jnp.where(jnp.isfinite(low), low, 0.0) / observed), 0, top)  # fmt: skip
    count = math.prod(x.shape[1:])
    step = step_size(observed, theta, count, top, rate)
    return fake(x.astype(jnp.float32), step, -zero, top - zero).astype(x.dtype)


def fake(x: jax.Array, step: jax.Array, low, high) -> jax.Array:
    """Returns round(clip(x / step, low, high)) step; the gradient passes the rounding.

    A value at the border of the range counts as inside: of each channel the largest weight stands there.
    """
    levels = x / step
    inside = (levels > low - _BORDER) & (levels < high + _BORDER)
    clipped = jax.lax.stop_gradient(jnp.clip(levels, low, high))
    levels = jnp.where(inside, levels, clipped)
    return (levels + jax.lax.stop_gradient(jnp.round(clipped) - levels)) * step


def step_size(
    observed: jax.Array, theta: jax.Array, count: int, top: int, rate: float = 1.0
) -> jax.Array:
    """Returns s = s0 exp(θ), with the gradient of LSQ.

    A step of gradient descent changes s by the same share as one on s itself would with the gradient g dL/ds: dL/dθ is
    g dL/ds / s.

    Args:
      observed: s0.
      theta: θ, of the same shape.
      count: numbers that share a step size, N.
      top: the highest level, Qp.
      rate: factor of the gradient.
    """
    step = jax.lax.stop_gradient(observed * jnp.exp(theta))
    g = rate / math.sqrt(count * top)
    return step + (theta - jax.lax.stop_gradient(theta)) * g / step


def _observed(x, known, due):
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    low, high = jnp.minimum(known["low"], x.min()), jnp.maximum(known["high"], x.max())
    return {
        "low": jnp.where(due, low, known["low"]),
        "high": jnp.where(due, high, known["high"]),
    }
