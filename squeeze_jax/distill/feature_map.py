"""Feature maps: those of the student become those of the teacher, normalised for text, plain for images.

Sun et al. 2020, arXiv 2004.02984 (MobileBERT), equation 1: the mean squared error of a layer's maps, which is taken apart,
for stability, into that of the maps normalised over the channels (without scale and shift) and the differences of mean
and of variance; as published these are squared and absolute. Romero et al. 2014, arXiv 1412.6550 (FitNets), equation
3: of images' maps, the student's through a learned regressor, here a convolution with kernel 1.
"""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import Bound, Layers, Shapes, Unbound
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import NonNegative, Range

# A regressor keeps the size of what it reads.
_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def make(
    layers: Layers = "uniform",
    normalise: bool | None = None,
    mean: NonNegative = 0.0,
    variance: NonNegative = 0.0,
    project: bool | None = None,
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> Unbound:
    """Returns the loss "feature_map": mean over positions and channels, summed over pairs of layers.

    Its parameters are the regressors [student's features, teacher's features], called <student's>_<teacher's endpoint>.

    Args:
      layers: which are compared, see `_loss.layer_pairs`; of images pairs of endpoints, [b, h, w, c], of which the larger
        is averaged down to the other.
      normalise: maps are normalised over the channels; None for text alone.
      mean: weight of the squared difference of the means over the channels; MobileBERT's maps, means and variances weigh
        as 100, 5000 and 5, a mean over its 24 layers.
      variance: of the absolute difference of the variances.
      project: whether the student's maps are projected; None for where the channels differ.
      teacher: which of several.

    Raises:
      UserError: unknown layers, a negative weight; when bound, an endpoint that is not there, layers that do not divide,
        sizes that are no multiple of each other, or other channels with project=False.
    """
    _loss.check_layers(layers)
    for name, weight in ("mean", mean), ("variance", variance):
        if weight < 0:
            raise UserError(f"{name} = {weight}: a weight should not be negative")

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> Bound:
        theirs = _loss.one(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, theirs)
        widths = {}
        for pair in pairs:
            if len(_loss.shape(student, pair[0], "student")) == 4:
                wide = _loss.image_sizes("feature_map", pair, student, theirs)
            else:
                wide = _loss.token_widths("feature_map", pair, student, theirs)
            if _loss.needs_projection(project, *wide, pair):
                widths["_".join(pair)] = wide
        init = _loss.projections(widths, _INIT)
        return _loss.paired("feature_map", pairs, compare, teacher=teacher, init=init)

    def compare(ours, theirs, batch, params, pair):
        text = ours.ndim == 3
        ours = _loss.project(ours, params.get("_".join(pair)))
        theirs = _loss.project(theirs, None)
        if text:
            weights = _loss.token_weights(batch, *ours.shape[:2])
        else:
            ours, theirs = _loss.same_size(ours, theirs)
            weights = _loss.example_weights(batch, ours.shape[0])
            weights = jnp.broadcast_to(weights[:, None, None], ours.shape[:3])
        values = 0.0
        if mean:
            values += mean * (ours.mean(-1) - theirs.mean(-1)) ** 2
        if variance:
            values += variance * jnp.abs(ours.var(-1) - theirs.var(-1))
        if text if normalise is None else normalise:
            ours, theirs = _normalised(ours), _normalised(theirs)
        values += ((ours - theirs) ** 2).mean(-1)
        return means.mean(values, weights)

    return Unbound(bind)


def _normalised(x):
    centred = x - x.mean(-1, keepdims=True)
    square = (centred * centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(square + 1e-12)
