"""The attention loss: it trains the student to attend to the same tokens as the teacher.

With kind "scores" it is the mean squared error of the attention scores before the softmax: TinyBERT, Jiao et al. 2019, arXiv
1909.10351, equation 7. With kind "probabilities" it is KL(a_teacher || a_student) of the attention probabilities over the
keys, averaged over heads and queries: MiniLM, Wang et al. 2020, arXiv 2002.10957, equation 6; and MobileBERT, Sun et al.
2020, arXiv 2004.02984, equation 2. MiniLM compares only the last layers, `layers=((-1, -1),)`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from squeeze_jax import batches
from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import BoundLoss, Layers, Shapes, UnboundLoss
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range
from squeeze_jax.registry import checked

# The score of a masked key is the lowest float32, or -inf if it was stored with fewer bits. All other scores are higher
# than this threshold.
_MASKED = -1e30


@checked
def make(
    kind: Literal["scores", "probabilities"] = "scores",
    layers: Layers = "uniform",
    heads: Literal["equal", "mean"] = "equal",
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> UnboundLoss:
    """Returns the loss "attention", summed over pairs of layers.

    Only real tokens count as queries and keys, and only keys that the attention mask of the query allows.

    Args:
      kind: whether to compare attention "scores" by their squared error, or "probabilities" by their KL divergence.
      layers: see `_loss.layer_pairs`.
      heads: "equal" compares head by head; "mean" first averages over the heads, so that their numbers may differ.
      teacher: number of the teacher, counted from 0.

    Raises:
      UserError: `layers` is wrong; or when bound, an endpoint is missing, a mapping does not fit the numbers of layers, or
        the numbers of heads differ.
    """
    _loss.check_layers(layers)
    if not isinstance(layers, str):
        for pair in layers:
            if any(isinstance(each, str) for each in pair):
                raise UserError(
                    f"layers: {pair!r} should be two numbers of layers: attention has several endpoints in each"
                )

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> BoundLoss:
        teacher_shapes = _loss.select_teacher(teachers, teacher)
        # The student's log-probabilities are computed from its scores, because that is exact.
        prefixes = "scores", "scores" if kind == "scores" else "attention"
        pairs = _loss.layer_pairs(layers, student, teacher_shapes, prefixes)
        for pair in pairs:
            _check_heads(pair, student, teacher_shapes, heads)

        def compare(student_scores, teacher_attention, batch, params, pair):
            del params, pair
            averages = heads == "mean"
            return difference(student_scores, teacher_attention, batch, averages)

        return _loss.paired_loss("attention", pairs, compare, teacher=teacher)

    difference = _squared_error if kind == "scores" else _divergence
    return UnboundLoss(bind)


def _squared_error(student_scores, teacher_scores, batch, averages):
    """Returns the mean squared error of attention scores [b, heads, l, l].

    The arguments are as in `_divergence`; with `averages` the scores are first averaged over the heads.
    """
    query_weights, visible = _weights_and_mask(student_scores, batch)
    visible &= teacher_scores[:, :1] > _MASKED
    # Masked scores are removed before the subtraction, because their difference may be infinite.
    student_scores, teacher_scores = (
        _average_heads(jnp.where(visible, scores.astype(jnp.float32), 0.0), averages)
        for scores in (student_scores, teacher_scores)
    )
    square = (student_scores - teacher_scores) ** 2
    weights = jnp.broadcast_to(query_weights[:, None, :, None] * visible, square.shape)
    return means.mean(square, weights)


def _divergence(student_scores, teacher_probabilities, batch, averages):
    """Returns KL(teacher_probabilities || softmax(student_scores)), averaged over queries and heads.

    Args:
      student_scores, teacher_probabilities: [b, heads, l, l].
      batch: see `batches.token_weights`.
      averages: whether probabilities are first averaged over the heads.
    """
    query_weights, visible = _weights_and_mask(student_scores, batch)
    student_scores = jnp.where(visible, student_scores.astype(jnp.float32), _MASKED)
    log_q = jax.nn.log_softmax(student_scores, -1)
    if averages:
        count = float(log_q.shape[1])
        log_q = jax.nn.logsumexp(log_q, 1, keepdims=True) - jnp.log(count)
    p = jnp.where(visible, teacher_probabilities.astype(jnp.float32), 0.0)
    p = _average_heads(p, averages)
    divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, -1)
    weights = jnp.broadcast_to(query_weights[:, None], divergence.shape)
    return means.mean(divergence, weights)


def _weights_and_mask(scores, batch):
    """Returns the weights of queries, float32 [b, l], and the mask of the keys that each query sees, bool [b, 1, l, l].

    Args:
      scores: the student's attention scores, [b, heads, l, l].
      batch: see `batches.token_weights`.
    """
    query_weights = batches.token_weights(batch, scores.shape[0], scores.shape[-1])
    # Padded keys are masked in the scores too.
    return query_weights, scores[:, :1] > _MASKED


def _average_heads(x, averages):
    return x.mean(1, keepdims=True) if averages else x


def _check_heads(pair, student: Shapes, teacher: Shapes, heads: str) -> None:
    """Raises a UserError if heads are compared one by one, but the networks have different numbers of heads."""
    ours = _loss.endpoint_shape(student, pair[0], "student")
    theirs = _loss.endpoint_shape(teacher, pair[1], "teacher")
    if heads == "equal" and ours[1] != theirs[1]:
        raise UserError(
            f"attention: the student's {pair[0]} has {ours[1]} heads, the teacher's {pair[1]} {theirs[1]}: give"
            " heads='mean', or choose another loss such as distill.hidden"
        )
