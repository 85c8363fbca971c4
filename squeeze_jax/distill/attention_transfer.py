"""Attention transfer: it trains the student's feature maps to be large at the same positions as the teacher's.

Zagoruyko, Komodakis 2016, arXiv 1612.03928, section 3.1. The attention map of a layer is the sum of squares over its
channels, [b, h, w], divided by its norm. The loss is the squared difference of two such maps. As published, it is averaged
over positions, and its weight is about 1000.
"""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import BoundLoss, Layers, Shapes, UnboundLoss
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range
from squeeze_jax.registry import checked


@checked
def make(layers: Layers, teacher: Annotated[int, Range(0, 63)] = 0) -> UnboundLoss:
    """Returns the loss "attention_transfer", summed over pairs of endpoints.

    Args:
      layers: pairs (student endpoint, teacher endpoint) of feature maps [b, h, w, c]. Their channels may differ; the larger
        map is average-pooled to the height and width of the smaller one.
      teacher: number of the teacher, counted from 0.

    Raises:
      UserError: `layers` is wrong; or when bound, an endpoint is missing or is no feature map, or the height and width of
        one map are no multiples of the other's.
    """
    _loss.check_layers(layers)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> BoundLoss:
        teacher_shapes = _loss.select_teacher(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, teacher_shapes)
        for pair in pairs:
            _loss.image_channels("attention_transfer", pair, student, teacher_shapes)
        return _loss.paired_loss("attention_transfer", pairs, _compare, teacher=teacher)

    return UnboundLoss(bind)


def _compare(student_map, teacher_map, batch, params, pair):
    """Returns the loss of one pair of feature maps [b, h, w, c]."""
    del params, pair
    maps = _loss.pool_to_same_size(_energy(student_map), _energy(teacher_map))
    rows = maps[0].shape[0]
    student, teacher = (_loss.unit_vectors(x.reshape(rows, -1)) for x in maps)
    distance = ((student - teacher) ** 2).mean(-1)
    return means.mean(distance, batches.example_weights(batch, rows))


def _energy(x):
    """Returns the sum of squares over the channels, float32 [b, h, w, 1]."""
    return jnp.sum(_loss.project(x, None) ** 2, -1, keepdims=True)
