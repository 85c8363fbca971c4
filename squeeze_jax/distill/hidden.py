"""The hidden state loss: it trains the student's hidden states to equal the teacher's.

TinyBERT, Jiao et al. 2019, arXiv 1909.10351, equations 8 and 9: MSE(H_student W, H_teacher) of layers and embeddings. The
projection W is learned; it is needed where the widths differ. Patient knowledge distillation, Sun et al. 2019, arXiv
1908.09355, equation 7: the same of the first token, whose hidden states are divided by their norm.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax

from squeeze_jax import batches
from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import BoundLoss, Layers, Shapes, UnboundLoss
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range
from squeeze_jax.registry import checked

_INIT = jax.nn.initializers.truncated_normal(0.02)


@checked
def make(
    layers: Layers = "uniform",
    embeddings: bool = False,
    project: bool | None = None,
    shared: bool = False,
    normalise: bool = False,
    tokens: Literal["all", "first"] = "all",
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> UnboundLoss:
    """Returns the loss "hidden": the mean squared error over real tokens and features, summed over pairs of layers.

    Its parameters are the projections [student features, teacher features], called <student endpoint>_<teacher endpoint>.

    Args:
      layers: see `_loss.layer_pairs`.
      embeddings: whether to compare the endpoint "embeddings" too; it has its own projection.
      project: whether to project the student's hidden states; None projects them where the widths differ.
      shared: whether all layers share one projection, as in TinyBERT; it is called "layers".
      normalise: whether to divide hidden states by their norm.
      tokens: "all" tokens are compared, or only the "first" one, which represents the sequence.
      teacher: number of the teacher, counted from 0.

    Raises:
      UserError: `layers` is wrong. When bound: an endpoint is missing or has no tokens, a mapping does not fit the numbers
        of layers, the widths differ with project=False, or `shared` is set but no layer is projected.
    """
    _loss.check_layers(layers)

    def projection_name(pair):
        return "layers" if shared and pair[0] != "embeddings" else "_".join(pair)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> BoundLoss:
        teacher_shapes = _loss.select_teacher(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, teacher_shapes)
        if embeddings:
            pair = ("embeddings", "embeddings")
            pairs += _loss.layer_pairs((pair,), student, teacher_shapes)
        widths = {}
        for pair in pairs:
            name = projection_name(pair)
            pair_widths = _loss.token_widths("hidden", pair, student, teacher_shapes)
            if widths.get(name, pair_widths) != pair_widths:
                raise UserError(
                    f"shared = True: the widths of {' and '.join(pair)} are {pair_widths}, of other layers {widths[name]};"
                    " leave it out"
                )
            if _loss.needs_projection(project, *pair_widths, pair):
                widths[name] = pair_widths
        if shared and "layers" not in widths:
            raise UserError(
                "shared = True: no layer is projected, their widths are equal; leave it out"
            )
        init = _loss.projection_init(widths, _INIT)
        return _loss.paired_loss("hidden", pairs, compare, teacher=teacher, init=init)

    def compare(student_states, teacher_states, batch, params, pair):
        x, target = student_states, teacher_states
        weights = batches.token_weights(batch, *x.shape[:2])
        if tokens == "first":
            x, target, weights = x[:, :1], target[:, :1], weights[:, :1]
        x = _loss.project(x, params.get(projection_name(pair)))
        target = _loss.project(target, None)
        if normalise:
            x, target = _loss.unit_vectors(x), _loss.unit_vectors(target)
        return means.mean(((x - target) ** 2).mean(-1), weights)

    return UnboundLoss(bind)
