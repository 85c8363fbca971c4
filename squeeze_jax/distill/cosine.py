"""The cosine loss: it trains the student's hidden states to have the same direction as the teacher's.

DistilBERT, Sanh, Debut, Chaumond, Wolf 2019, arXiv 1910.01108, section 3: the mean over real tokens of
1 - cos(h_student, h_teacher).
"""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import BoundLoss, Layers, Shapes, UnboundLoss
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range
from squeeze_jax.registry import checked


@checked
def make(
    layers: Layers = ((-1, -1),), teacher: Annotated[int, Range(0, 63)] = 0
) -> UnboundLoss:
    """Returns the loss "cosine", summed over pairs of layers.

    Args:
      layers: see `_loss.layer_pairs`. By default, only the last layers are compared.
      teacher: number of the teacher, counted from 0.

    Raises:
      UserError: `layers` is wrong; or when bound, an endpoint is missing or has no tokens, or the widths differ.
    """
    _loss.check_layers(layers)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> BoundLoss:
        teacher_shapes = _loss.select_teacher(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, teacher_shapes)
        for pair in pairs:
            widths = _loss.token_widths("cosine", pair, student, teacher_shapes)
            if widths[0] != widths[1]:
                raise UserError(
                    f"cosine: the student's {pair[0]} has {widths[0]} features, the teacher's {pair[1]} {widths[1]};"
                    " distill.hidden projects one to the other"
                )
        return _loss.paired_loss("cosine", pairs, _compare, teacher=teacher)

    return UnboundLoss(bind)


def _compare(student_states, teacher_states, batch, params, pair):
    """Returns the loss of one pair of hidden states [b, l, features]."""
    del params, pair
    student, teacher = (
        _loss.unit_vectors(_loss.project(states, None))
        for states in (student_states, teacher_states)
    )
    cosine = jnp.sum(student * teacher, -1)  # [b, l]
    return means.mean(1 - cosine, batches.token_weights(batch, *cosine.shape))
