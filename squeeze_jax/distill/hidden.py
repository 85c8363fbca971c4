"""Hidden states: those of the student's layers become those of the teacher's, projected where the widths differ.

Jiao et al. 2019, arXiv 1909.10351 (TinyBERT), equations 8 and 9: MSE(H_student W, H_teacher), W learned, of layers and
of embeddings. Sun et al. 2019, arXiv 1908.09355 (patient knowledge distillation), equation 7: of states of length 1, of
the first token.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax

from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import Bound, Layers, Shapes, Unbound
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range

_INIT = jax.nn.initializers.truncated_normal(0.02)


def make(
    layers: Layers = "uniform",
    embeddings: bool = False,
    project: bool | None = None,
    shared: bool = False,
    normalise: bool = False,
    tokens: Literal["all", "first"] = "all",
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> Unbound:
    """Returns the loss "hidden": mean over real tokens and channels of the squared error, summed over pairs of layers.

    Its parameters are the projections [student's features, teacher's features], called <student's>_<teacher's endpoint>.

    Args:
      layers: which are compared, see `_loss.layer_pairs`.
      embeddings: whether the endpoint embeddings is compared too; its projection is its own.
      project: whether the student's states are projected; None for where the widths differ.
      shared: one projection for all layers, as TinyBERT has it, called "layers".
      normalise: states are divided by their length.
      tokens: "first" for the first of a sequence alone, which stands for all of it.
      teacher: which of several.

    Raises:
      UserError: unknown layers; when bound, an endpoint that is not there or is not of tokens, layers that do not divide,
        other widths with project=False, or `shared` without anything to share.
    """
    _loss.check_layers(layers)

    def name(pair):
        return "layers" if shared and pair[0] != "embeddings" else "_".join(pair)

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> Bound:
        theirs = _loss.one(teachers, teacher)
        pairs = _loss.layer_pairs(layers, student, theirs)
        if embeddings:
            pairs += _loss.layer_pairs((("embeddings",) * 2,), student, theirs)
        widths = {}
        for pair in pairs:
            wide = _loss.token_widths("hidden", pair, student, theirs)
            if widths.get(name(pair), wide) != wide:
                raise UserError(
                    f"shared = True: the widths of {' and '.join(pair)} are {wide}, of other layers {widths[name(pair)]};"
                    " leave it out"
                )
            if _loss.needs_projection(project, *wide, pair):
                widths[name(pair)] = wide
        if shared and "layers" not in widths:
            raise UserError(
                "shared = True: no layer is projected, their widths are equal; leave it out"
            )
        init = _loss.projections(widths, _INIT)
        return _loss.paired("hidden", pairs, compare, teacher=teacher, init=init)

    def compare(ours, theirs, batch, params, pair):
        weights = _loss.token_weights(batch, *ours.shape[:2])
        if tokens == "first":
            ours, theirs, weights = ours[:, :1], theirs[:, :1], weights[:, :1]
        ours = _loss.project(ours, params.get(name(pair)))
        theirs = _loss.project(theirs, None)
        if normalise:
            ours, theirs = _loss.unit(ours), _loss.unit(theirs)
        return means.mean(((ours - theirs) ** 2).mean(-1), weights)

    return Unbound(bind)
