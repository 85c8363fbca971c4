"""The pretraining loss of BERT and ALBERT: masked tokens plus the prediction of how two segments belong together.

The loss is the sum of both mean losses (Devlin et al., arXiv 1810.04805, section A.2). BERT predicts whether the second
segment follows the first; ALBERT predicts their order (Lan et al., arXiv 1909.11942, section 3.1).
"""

from collections.abc import Callable

import jax.numpy as jnp

from squeeze_jax.batches import mask_of
from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import masked_lm
from squeeze_jax.train.losses.masked_lm import head_logits

READS = 'logits {"masked_lm": [b, p, vocabulary], "next_sentence": [b, 2]}, and batch["targets"] [b, p] and batch["label"] [b]'


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (loss, {"accuracy", "order_accuracy"})`.

    Logits are {"masked_lm": see `masked_lm.masked_losses`, "next_sentence": [b, 2]}. The batch also has "label" int [b],
    the class of a pair of segments.
    """

    def loss(logits, endpoints, batch):
        del endpoints
        batch = masked_lm.read(batch, "losses.pretraining_loss")
        token_logits = head_logits(logits, "masked_lm")
        losses, hits, weights = masked_lm.masked_losses(token_logits, batch)
        order_logits = head_logits(logits, "next_sentence")
        order_losses, order_hits = segment_losses(order_logits, batch)
        total = mean(losses, weights)
        examples = mask_of(batch, len(order_losses))
        total += mean(order_losses, examples)
        return total, {
            "accuracy": mean(hits, weights),
            "order_accuracy": mean(order_hits, examples),
        }

    return loss


def segment_losses(logits, batch):
    """Returns the cross-entropies of pairs of segments, and hits: 1 where the label has the higher logit; float32 [b] each.

    Args:
      logits: [b, 2].
      batch: "label" int [b]; may have a "mask" [b].
    """
    batch = masked_lm.read(batch, "losses.pretraining_loss")
    labels = jnp.asarray(batch["label"])
    return masked_lm.token_losses(logits, labels, mask_of(batch, len(labels)))
