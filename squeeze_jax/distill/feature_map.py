"""The feature map loss: it trains the student's feature maps to equal the teacher's.

For text: MobileBERT, Sun et al. 2020, arXiv 2004.02984, equation 1, the mean squared error of a layer's feature maps. For
stability it is split into three terms. The first is the mean squared error of the maps after normalisation over the
channels, without scale and shift. The others are the squared difference of the means and the absolute difference of the
variances, as published.

For images: FitNets, Romero et al. 2014, arXiv 1412.6550, equation 3, the squared error of the maps, to which a learned
regressor maps the student's. Here the regressor is a 1x1 convolution.
"""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import BoundLoss, Layers, Shapes, UnboundLoss
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import NonNegative, Range
from squeeze_jax.registry import checked

# With this initializer the outputs of a regressor have the scale of its inputs.
_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@checked
def make(
    layers: Layers = "uniform",
    normalise: bool | None = None,
    mean: NonNegative = 0.0,
    variance: NonNegative = 0.0,
    project: bool | None = None,
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> UnboundLoss:
    """Returns the loss "feature_map": a mean over positions and channels, summed over pairs of layers.

    Its parameters are the regressors [student features, teacher features], called <student endpoint>_<teacher endpoint>.

    Args:
      layers: see `_loss.layer_pairs`. For images, pairs of endpoints [b, h, w, c]; the larger map is average-pooled to the
        height and width of the smaller one.
      normalise: whether maps are normalised over the channels; None normalises those of text only.
      mean: weight of the squared difference of the means over the channels. In MobileBERT the weights of maps, means and
        variances are 100, 5000 and 5, for an average over its 24 layers.
      variance: weight of the absolute difference of the variances over the channels.
      project: whether a regressor maps the student's maps; None uses one where the numbers of channels differ.
      teacher: number of the teacher, counted from 0.

    Raises:
      UserError: `layers` is wrong, or a weight is negative. When bound: an endpoint is missing, a mapping does not fit the
        numbers of layers, the height and width of one map are no multiples of the other's, or the channels differ with
        project=False.
    """
    _loss.check_layers(layers)
    for name, weight in ("mean", mean), ("variance", variance):
        if weight < 0:
            raise UserError(f"{name} = {weight}: a weight should not be negative")

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> BoundLoss:
        teacher_shapes = _loss.select_teacher(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, teacher_shapes)
        widths = {}
        for pair in pairs:
            is_image = len(_loss.endpoint_shape(student, pair[0], "student")) == 4
            find_widths = _loss.image_channels if is_image else _loss.token_widths
            pair_widths = find_widths("feature_map", pair, student, teacher_shapes)
            if _loss.needs_projection(project, *pair_widths, pair):
                widths["_".join(pair)] = pair_widths
        return _loss.paired_loss(
            "feature_map",
            pairs,
            compare,
            teacher=teacher,
            init=_loss.projection_init(widths, _INIT),
        )

    def compare(student_map, teacher_map, batch, params, pair):
        is_text = student_map.ndim == 3
        x = _loss.project(student_map, params.get("_".join(pair)))
        target = _loss.project(teacher_map, None)
        if is_text:
            weights = batches.token_weights(batch, *x.shape[:2])
        else:
            x, target = _loss.pool_to_same_size(x, target)
            weights = batches.example_weights(batch, x.shape[0])
            weights = jnp.broadcast_to(weights[:, None, None], x.shape[:3])
        values = 0.0
        if mean:
            values += mean * (x.mean(-1) - target.mean(-1)) ** 2
        if variance:
            values += variance * jnp.abs(x.var(-1) - target.var(-1))
        if is_text if normalise is None else normalise:
            x, target = _normalise(x), _normalise(target)
        values += ((x - target) ** 2).mean(-1)
        return means.mean(values, weights)

    return UnboundLoss(bind)


def _normalise(x):
    """Normalises the channels of each position to mean 0 and variance 1."""
    centred = x - x.mean(-1, keepdims=True)
    square = (centred * centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(square + 1e-12)
