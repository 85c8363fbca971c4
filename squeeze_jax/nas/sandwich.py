"""The sandwich rule: each step trains the largest, the smallest and some random widths of a network.

Yu, Huang 2019, arXiv 1903.05134 (universally slimmable networks): section 3.1, the sandwich rule, and section 3.2, in-place
distillation: the largest network learns from the labels, and its probabilities are the labels of the others; no gradient
comes back through them. The gradients of all add up. Plug point gradients: the forward and backward pass of each width
is a program of its own, so a small width costs little.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.methods import Gradients
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Positive, Whole


def make(
    widths: tuple[Positive, ...], random: Whole = 2, temperature: Positive = 1.0
) -> Gradients:
    """Returns the method for networks whose call takes `width`, such as `models/slimmable.py`.

    Args:
      widths: all widths of the network, at least two.
      random: widths drawn in each step beside the largest and the smallest, different ones; at least 0.
      temperature: of the soft labels.

    Raises:
      UserError: fewer than two widths, more random ones than there are between the ends, or a temperature of 0 or below.
    """
    ordered = sorted(widths)
    if len(set(ordered)) < max(len(ordered), 2):
        raise UserError(
            f"nas.sandwich: widths = {widths} should be two or more, each once"
        )
    if not 0 <= random <= len(ordered) - 2:
        raise UserError(
            f"nas.sandwich: random = {random}, but {len(ordered) - 2} widths lie between the smallest and the largest"
        )
    if not temperature > 0:
        raise UserError(f"nas.sandwich: temperature = {temperature} should be above 0")
    small, *between, large = ordered

    # A pass is compiled once for all steps; a new run has new passes.
    @functools.lru_cache(maxsize=2 * len(ordered))
    def compiled(passes, width):
        loss = _teacher if width == large else _student
        bound = functools.partial(loss, passes, width, temperature)
        return jax.jit(jax.value_and_grad(bound, has_aux=True))

    def compute(passes, params, stats, batch, own):
        key, others = own.key, []
        (loss, (stats, metrics, soft)), grads = compiled(passes, large)(
            params, stats, batch, key
        )
        for width in (small, *_drawn(key, between, random)):
            (value, stats), more = compiled(passes, width)(
                params, stats, batch, key, soft
            )
            grads = _sum(grads, more)
            others.append(value)
        metrics = {"loss": loss, **metrics, "smallest": others[0]}
        if random:
            metrics["random"] = sum(others[1:]) / random
        return grads, stats, metrics

    return Gradients(compute, options=("width",), fused=False)


def _teacher(passes, width, temperature, params, stats, batch, key):
    """The largest network's loss, and what the others learn from."""
    logits, endpoints, stats = passes.outputs(params, stats, batch, key, width=width)
    loss, metrics, stats = passes.objective(
        logits, endpoints, batch, params, key, stats
    )
    return loss, (stats, metrics, soft_labels(logits, temperature))


def _student(passes, width, temperature, params, stats, batch, key, soft):
    """The loss of a smaller network."""
    logits, _, stats = passes.outputs(params, stats, batch, key, width=width)
    return distilled(logits, soft, batch["mask"], temperature), stats


_sum = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _drawn(key: jax.Array, between: list[float], count: int) -> list[float]:
    """Different widths, a function of the key alone."""
    if not count:
        return []
    words = np.asarray(jax.random.key_data(key)).astype(np.uint32).ravel().tolist()
    order = np.random.default_rng(words).permutation(len(between))
    return [between[i] for i in sorted(order[:count])]


def soft_labels(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Probabilities [..., classes], float32, of the largest network's logits; their gradient is zero."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax(logits / temperature, -1)


def distilled(
    logits: jax.Array, soft: jax.Array, mask: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """T^2 times the mean cross-entropy of a smaller network against soft labels.

    Args:
      logits: [b, classes].
      soft: of `soft_labels`, at the same temperature.
      mask: bool [b], which examples count.
      temperature: T.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, -1)
    return temperature**2 * mean(-jnp.sum(soft * log_q, -1), mask)
