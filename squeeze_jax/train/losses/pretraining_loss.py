"""The objective of BERT and ALBERT: masked tokens, and how two segments go together.

Devlin et al., arXiv 1810.04805, section A.2: the sum of both mean losses. Lan et al., arXiv 1909.11942, section 3.1.
"""

from collections.abc import Callable

from squeeze_jax.nn.means import mean
from squeeze_jax.train.losses import masked_lm
from squeeze_jax.train.losses.masked_lm import part


def make() -> Callable:
    """Returns `loss(logits, endpoints, batch) → (loss, {"accuracy", "order_accuracy"})`.

    Logits are {"masked_lm": see `masked_lm.scored`, "next_sentence": [b, 2]}; the batch has "label" int [b] as well.
    """

    def loss(logits, endpoints, batch):
        del endpoints
        losses, hits, weights = masked_lm.scored(part(logits, "masked_lm"), batch)
        order, right = ordered(part(logits, "next_sentence"), batch)
        total = mean(losses, weights)
        total += mean(order, batch["mask"])
        return total, {
            "accuracy": mean(hits, weights),
            "order_accuracy": mean(right, batch["mask"]),
        }

    return loss


def ordered(logits, batch):
    """Cross-entropies and whether the label is the likelier, float32 [b]; logits [b, 2], "label" int [b]."""
    return masked_lm.token_losses(logits, batch["label"], batch["mask"])
