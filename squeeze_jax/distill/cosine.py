"""Cosine: the student's last hidden states point where the teacher's do.

Sanh, Debut, Chaumond, Wolf 2019, arXiv 1910.01108 (DistilBERT), section 3: mean over real tokens of 1 - cos(h_student,
h_teacher).
"""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp

from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import Bound, Layers, Shapes, Unbound
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range


def make(
    layers: Layers = ((-1, -1),), teacher: Annotated[int, Range(0, 63)] = 0
) -> Unbound:
    """Returns the loss "cosine", summed over pairs of layers.

    Args:
      layers: which are compared, see `_loss.layer_pairs`; the last ones unless told otherwise.
      teacher: which of several.

    Raises:
      UserError: unknown layers; when bound, an endpoint that is not there or is not of tokens, or other widths.
    """
    _loss.check_layers(layers)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> Bound:
        theirs = _loss.one(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, theirs)
        for pair in pairs:
            widths = _loss.token_widths("cosine", pair, student, theirs)
            if widths[0] != widths[1]:
                raise UserError(
                    f"cosine: the student's {pair[0]} has {widths[0]} features, the teacher's {pair[1]} {widths[1]};"
                    " distill.hidden projects one to the other"
                )
        return _loss.paired("cosine", pairs, _compare, teacher=teacher)

    return Unbound(bind)


def _compare(ours, theirs, batch, params, pair):
    del params, pair
    ours, theirs = (_loss.unit(_loss.project(each, None)) for each in (ours, theirs))
    cosine = jnp.sum(ours * theirs, -1)  # [b, l]
    return means.mean(1 - cosine, _loss.token_weights(batch, *cosine.shape))
