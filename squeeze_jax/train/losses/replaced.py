"""ELECTRA's objective: a generator's masked tokens, and a discriminator's guess which tokens are the generator's.

Clark et al., arXiv 2003.10555, section 2: loss = masked LM + λ binary cross-entropy over all real tokens; λ = 50, Table 6.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import NonNegative
from squeeze_jax.train.losses import masked_lm
from squeeze_jax.train.losses.masked_lm import part

WEIGHT = 50.0


def make(discriminator: NonNegative = WEIGHT) -> Callable:
    """Returns `loss(logits, endpoints, batch) → (loss, metrics)`.

    Logits are {"masked_lm": see `masked_lm.scored`, "replaced": [b, l]}, and endpoints have "is_replaced" [b, l], both from
    `models/electra_pretraining.py`. Metrics are "accuracy", the generator's, "replaced_accuracy", the discriminator's, and
    "generator_loss" and "replaced_loss".

    Args:
      discriminator: weight of its loss, λ.

    Raises:
      UserError: a negative weight.
    """
    if discriminator < 0:
        raise UserError(
            f"config.objective.discriminator = {discriminator} should not be negative"
        )

    def loss(logits, endpoints, batch):
        generated, judgement = (part(logits, k) for k in ("masked_lm", "replaced"))
        losses, hits, weights = masked_lm.scored(generated, batch)
        wrong, right, real = judged(judgement, endpoints["is_replaced"], batch)
        first, second = mean(losses, weights), mean(wrong, real)
        return first + discriminator * second, {
            "accuracy": mean(hits, weights),
            "replaced_accuracy": mean(right, real),
            "generator_loss": first,
            "replaced_loss": second,
        }

    return loss


def judged(logits, is_replaced, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Binary cross-entropies in nats, whether the sign is right, and weights, float32 [b, l] each.

    Args:
      logits: [b, l], positive for a replaced token.
      is_replaced: [b, l], whether it is.
      batch: "attended" [b, l] and "mask" [b].
    """
    replaced = is_replaced != 0
    losses = jax.nn.softplus(jnp.where(replaced, -logits, logits))
    right = ((logits > 0) == replaced).astype(jnp.float32)
    return losses, right, batch["attended"] * batch["mask"][:, None].astype(jnp.float32)
