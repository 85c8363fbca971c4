"""The pretraining loss of ELECTRA: masked tokens for the generator, replaced tokens for the discriminator.

Clark et al., arXiv 2003.10555, section 2: loss = masked LM loss of the generator + λ * binary cross-entropy of the
discriminator over all real tokens. λ is 50 (Table 6).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.errors import UserError
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import NonNegative
from squeeze_jax.registry import checked
from squeeze_jax.train.losses import masked_lm
from squeeze_jax.train.losses.masked_lm import head_logits

WEIGHT = 50.0

READS = 'logits {"masked_lm": [b, p, vocabulary], "replaced": [b, l]}, and batch["targets"] [b, p] and batch["tokens"] [b, l]'


@checked
def make(discriminator: NonNegative = WEIGHT) -> Callable:
    """Returns `loss(logits, endpoints, batch) → (loss, metrics)`.

    Logits are {"masked_lm": see `masked_lm.masked_losses`, "replaced": [b, l]}, and endpoints contain "is_replaced" [b, l];
    `models/electra_pretraining.py` computes both. Metrics are "accuracy" of the generator, "replaced_accuracy" of the
    discriminator, "generator_loss" and "replaced_loss".

    Args:
      discriminator: weight λ of the discriminator's loss.

    Raises:
      UserError: the weight is negative.
    """
    if discriminator < 0:
        raise UserError(
            f"config.objective.discriminator = {discriminator} should not be negative"
        )

    def loss(logits, endpoints, batch):
        batch = masked_lm.read(batch, "losses.replaced")
        generator_logits = head_logits(logits, "masked_lm")
        discriminator_logits = head_logits(logits, "replaced")
        if "is_replaced" not in endpoints:
            raise UserError(
                f"losses.replaced reads the endpoint 'is_replaced', and the network gives {', '.join(endpoints) or 'none'}:"
                " models.make('electra_pretraining') makes a network with it"
            )
        losses, hits, weights = masked_lm.masked_losses(generator_logits, batch)
        replaced_losses, replaced_hits, real = discriminator_losses(
            discriminator_logits, endpoints["is_replaced"], batch
        )
        generator_loss = mean(losses, weights)
        replaced_loss = mean(replaced_losses, real)
        return generator_loss + discriminator * replaced_loss, {
            "accuracy": mean(hits, weights),
            "replaced_accuracy": mean(replaced_hits, real),
            "generator_loss": generator_loss,
            "replaced_loss": replaced_loss,
        }

    return loss


def discriminator_losses(
    logits, is_replaced, batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the discriminator's loss of each token.

    Args:
      logits: [b, l], positive where the discriminator predicts a replaced token.
      is_replaced: [b, l], nonzero where the generator replaced the token.
      batch: may have "attended" [b, l], the padding mask, and "mask" [b], the examples that count.

    Returns:
      Binary cross-entropies in nats, hits (1 where the prediction is right) and weights (1 for real tokens of examples
      that count), float32 [b, l] each.
    """
    is_replaced = is_replaced != 0
    losses = jax.nn.softplus(jnp.where(is_replaced, -logits, logits))
    hits = ((logits > 0) == is_replaced).astype(jnp.float32)
    return losses, hits, batches.token_weights(batch, *logits.shape)
