"""The sandwich rule: each training step trains the largest, the smallest and some random widths of a slimmable network.

Yu, Huang 2019, arXiv 1903.05134 (universally slimmable networks): the sandwich rule (section 3.1) and in-place distillation
(section 3.2). The largest network learns from the labels. Its probabilities are the soft labels of the smaller networks, and no
gradient passes through them. The gradients of all widths are added up. This is a method of the plug point `gradients`. The
forward and backward pass of each width is a program of its own, so a small width takes little time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.in_order import in_order
from squeeze_jax.methods import Gradients
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Positive, Whole
from squeeze_jax.registry import checked


@checked
def make(
    widths: tuple[Positive, ...], random: Whole = 2, temperature: Positive = 1.0
) -> Gradients:
    """Returns the method, for networks that are called with an argument `width`, such as `models/slimmable.py`.

    Args:
      widths: all widths of the network, at least two.
      random: number of different widths between the smallest and the largest that each step draws in addition; at least 0.
      temperature: temperature of the soft labels, above 0.

    Raises:
      UserError: There are fewer than two widths, or `random` exceeds the number of widths between the smallest and the
        largest, or the temperature is not above 0.
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

    # Each pass is compiled once for all steps. The cache has room for two runs, because a new run has new passes.
    @functools.lru_cache(maxsize=2 * len(ordered))
    def compiled(passes, width):
        loss = _largest_loss if width == large else _smaller_loss
        bound = functools.partial(loss, passes, width, temperature)
        return in_order(jax.jit(jax.value_and_grad(bound, has_aux=True)))

    def compute(passes, params, stats, batch, own):
        key, smaller_losses = own.key, []
        (loss, (stats, metrics, targets)), grads = compiled(passes, large)(
            params, stats, batch, key
        )
        for width in (small, *_draw_widths(key, between, random)):
            (smaller_loss, stats), smaller_grads = compiled(passes, width)(
                params, stats, batch, key, targets
            )
            grads = _sum(grads, smaller_grads)
            smaller_losses.append(smaller_loss)
        metrics = {"loss": loss, **metrics, "smallest": smaller_losses[0]}
        if random:
            metrics["random"] = sum(smaller_losses[1:]) / random
        return grads, stats, metrics

    return Gradients(compute, options=("width",), fused=False, softmax=True)


def _largest_loss(passes, width, temperature, params, stats, batch, key):
    """Returns the largest network's loss on the labels, and the soft labels for the smaller networks."""
    logits, endpoints, stats = passes.outputs(params, stats, batch, key, width=width)
    loss, metrics, stats = passes.objective(
        logits, endpoints, batch, params, key, stats
    )
    return loss, (stats, metrics, soft_labels(logits, temperature))


def _smaller_loss(passes, width, temperature, params, stats, batch, key, targets):
    """Returns a smaller network's loss on the soft labels."""
    logits, _, stats = passes.outputs(params, stats, batch, key, width=width)
    return soft_cross_entropy(logits, targets, batch["mask"], temperature), stats


_sum = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _draw_widths(key: jax.Array, widths: list[float], count: int) -> list[float]:
    """Draws `count` different widths; they depend on the key only."""
    if not count:
        return []
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).ravel().tolist()
    order = np.random.default_rng(seed).permutation(len(widths))
    return [widths[i] for i in sorted(order[:count])]


def soft_labels(logits: Any, temperature: float = 1.0) -> Any:
    """Returns the probabilities of the largest network, float32 [..., classes]; no gradient passes through them.

    Args:
      logits: [..., classes], or a dict of such arrays.
      temperature: temperature of the softmax.
    """

    def soften(array):
        array = jax.lax.stop_gradient(array).astype(jnp.float32)
        return jax.nn.softmax(array / temperature, -1)

    return jax.tree.map(soften, logits)


def soft_cross_entropy(
    logits: Any, targets: Any, mask: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Returns T^2 times the mean cross-entropy of a smaller network with respect to soft labels.

    Args:
      logits: [b, ..., classes]; or a dict of such arrays, over which the cross-entropies are averaged.
      targets: soft labels of the same shape, from `soft_labels` with the same temperature.
      mask: bool [b], True for examples that count.
      temperature: T.

    Raises:
      UserError: there is only one class, as in a regression, which has no soft labels.
    """

    def cross_entropy(array, soft):
        if array.shape[-1] == 1:
            raise UserError(
                "the network has one output, whose probability is always 1, so smaller networks learn nothing from the largest"
                " one: set config.gradients.distill = 0 and labels = 1"
            )
        log_probabilities = jax.nn.log_softmax(array.astype(jnp.float32) / temperature)
        each = -jnp.sum(soft * log_probabilities, -1)
        return mean(each.mean(tuple(range(1, each.ndim))), mask)

    pairs = jax.tree.map(cross_entropy, logits, targets)
    return temperature**2 * sum(jax.tree.leaves(pairs)) / len(jax.tree.leaves(pairs))
