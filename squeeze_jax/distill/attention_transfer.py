"""Attention transfer: the student's images are strong where the teacher's are.

Zagoruyko, Komodakis 2016, arXiv 1612.03928, section 3.1: the map of a layer is the sum of squares over its channels,
[b, h, w], divided by its length; of two such maps the squared distance. As published the mean over positions is taken,
and the loss weighs in the order of 1000.
"""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp

from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import Bound, Layers, Shapes, Unbound
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range


def make(layers: Layers, teacher: Annotated[int, Range(0, 63)] = 0) -> Unbound:
    """Returns the loss "attention_transfer", summed over pairs of endpoints.

    Args:
      layers: pairs (student's endpoint, teacher's endpoint) [b, h, w, c]; channels may differ, and of sizes the larger is
        averaged down to the other.
      teacher: which of several.

    Raises:
      UserError: unknown layers; when bound, an endpoint that is not there or is not of images, or sizes that are no
        multiple of each other.
    """
    _loss.check_layers(layers)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> Bound:
        theirs = _loss.one(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, theirs)
        for pair in pairs:
            _loss.image_sizes("attention_transfer", pair, student, theirs)
        return _loss.paired("attention_transfer", pairs, _compare, teacher=teacher)

    return Unbound(bind)


def _compare(ours, theirs, batch, params, pair):
    del params, pair
    ours, theirs = _loss.same_size(_energy(ours), _energy(theirs))
    rows = ours.shape[0]
    ours, theirs = (_loss.unit(each.reshape(rows, -1)) for each in (ours, theirs))
    distance = ((ours - theirs) ** 2).mean(-1)
    return means.mean(distance, _loss.example_weights(batch, rows))


def _energy(x):
    return jnp.sum(_loss.project(x, None) ** 2, -1, keepdims=True)
