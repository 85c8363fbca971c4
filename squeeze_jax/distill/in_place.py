"""In-place distillation: the largest network of a supernet teaches the others in the same step.

Yu, Huang 2019, arXiv 1903.05134 (universally slimmable networks), section 3.2, and Yu et al. 2020, arXiv 2003.11142
(BigNAS), section 3.2: the largest learns from the labels; the others' labels are its probabilities, through which no
gradient comes back. These are functions, for the step of a supernet to call; no loss to bind.
"""

import jax
import jax.numpy as jnp

from squeeze_jax.distill._loss import mean


def targets(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Soft labels [..., classes], float32, of the largest network's logits; their gradient is zero."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax(logits / temperature, -1)


def loss(
    logits: jax.Array, soft: jax.Array, mask: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """T^2 times the mean cross-entropy of a smaller network against soft labels.

    Args:
      logits: [b, classes].
      soft: what `targets` gave, at the same temperature.
      mask: bool [b], which examples count.
      temperature: T.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, -1)
    entropies = -jnp.sum(soft * log_q, -1)
    return temperature**2 * mean(entropies, mask.astype(jnp.float32))
