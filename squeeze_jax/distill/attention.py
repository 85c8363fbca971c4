"""Attention: what the student's tokens look at becomes what the teacher's do.

Jiao et al. 2019, arXiv 1909.10351 (TinyBERT), equation 7: the mean squared error of the scores before the softmax. Wang et
al. 2020, arXiv 2002.10957 (MiniLM), equation 6, and Sun et al. 2020, arXiv 2004.02984 (MobileBERT), equation 2:
KL(a_teacher || a_student) of the probabilities, over the keys, mean over heads and queries; MiniLM's is of the last
layers alone, `layers=((-1, -1),)`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from squeeze_jax.distill import _loss
from squeeze_jax.distill._loss import Bound, Layers, Shapes, Unbound
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.ranges import Range

# A key that may not be seen has the lowest float32 for its score, or -inf where that was kept in less; no other is so low.
_UNSEEN = -1e30


def make(
    kind: Literal["scores", "probabilities"] = "scores",
    layers: Layers = "uniform",
    heads: Literal["equal", "mean"] = "equal",
    teacher: Annotated[int, Range(0, 63)] = 0,
) -> Unbound:
    """Returns the loss "attention", summed over pairs of layers.

    Only real tokens count, as queries and as keys, and no keys that a query may not see.

    Args:
      kind: "scores" or "probabilities", see above.
      layers: which are compared, see `_loss.layer_pairs`; pairs are of numbers.
      heads: "mean" averages over the heads first, so that their numbers may differ.
      teacher: which of several.

    Raises:
      UserError: unknown layers; when bound, an endpoint that is not there, layers that do not divide, or numbers of heads
        that differ.
    """
    _loss.check_layers(layers)
    if not isinstance(layers, str):
        for pair in layers:
            if any(isinstance(each, str) for each in pair):
                raise UserError(
                    f"layers: {pair!r} should be two numbers of layers: attention has several endpoints in each"
                )

    def bind(student: Shapes, teachers: Shapes | Sequence[Shapes]) -> Bound:
        theirs = _loss.one(teachers, teacher)
        # The student's logarithms of probabilities are exact from its scores alone.
        prefixes = "scores", "scores" if kind == "scores" else "attention"
        pairs = _loss.layer_pairs(layers, student, theirs, prefixes)
        for pair in pairs:
            _check(pair, student, theirs, heads)

        def compare(ours, theirs, batch, params, pair):
            del params, pair
            return difference(ours, theirs, batch, heads == "mean")

        return _loss.paired("attention", pairs, compare, teacher=teacher)

    difference = _scores if kind == "scores" else _probabilities
    return Unbound(bind)


def _scores(ours, theirs, batch, average):
    """Mean squared error of scores [b, heads, l, l]."""
    real, seen = _counted(ours, batch)
    seen &= theirs[:, :1] > _UNSEEN
    # The unseen ones go first: what they differ by may be infinite.
    ours, theirs = (
        _over_heads(jnp.where(seen, each.astype(jnp.float32), 0.0), average)
        for each in (ours, theirs)
    )
    square = (ours - theirs) ** 2
    weights = jnp.broadcast_to(real[:, None, :, None] * seen, square.shape)
    return means.mean(square, weights)


def _probabilities(ours, theirs, batch, average):
    """KL(theirs, probabilities || softmax of ours, scores), both [b, heads, l, l]."""
    real, seen = _counted(ours, batch)
    log_q = jax.nn.log_softmax(jnp.where(seen, ours.astype(jnp.float32), _UNSEEN), -1)
    if average:
        count = float(log_q.shape[1])
        log_q = jax.nn.logsumexp(log_q, 1, keepdims=True) - jnp.log(count)
    p = _over_heads(jnp.where(seen, theirs.astype(jnp.float32), 0.0), average)
    divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, -1)
    return means.mean(divergence, jnp.broadcast_to(real[:, None], divergence.shape))


def _counted(scores, batch):
    """Of the student's scores [b, heads, l, l] the weights of queries [b, l], and the keys they see, bool [b, 1, l, l]."""
    real = _loss.token_weights(batch, scores.shape[0], scores.shape[-1])
    # Padded keys are among the unseen.
    return real, scores[:, :1] > _UNSEEN


def _over_heads(x, average):
    return x.mean(1, keepdims=True) if average else x


def _check(pair, student: Shapes, teacher: Shapes, heads: str) -> None:
    ours = _loss.shape(student, pair[0], "student")
    theirs = _loss.shape(teacher, pair[1], "teacher")
    if heads == "equal" and ours[1] != theirs[1]:
        raise UserError(
            f"attention: the student's {pair[0]} has {ours[1]} heads, the teacher's {pair[1]} {theirs[1]}: give"
            " heads='mean', or choose another loss such as distill.hidden"
        )
