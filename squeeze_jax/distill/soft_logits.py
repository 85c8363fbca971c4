"""Soft logits: the student's class probabilities, tempered, become like its teachers'.

Hinton, Vinyals, Dean 2015, arXiv 1503.02531: with p = softmax(z / T) of each network, T^2 KL(p_teacher || p_student); T^2
keeps the gradient's size as T grows (section 2.1). Of several teachers p_teacher is the arithmetic mean. Ba, Caruana 2013,
arXiv 1312.6184: the mean squared error of the logits themselves instead.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.distill._loss import (
    Bound,
    Shapes,
    Unbound,
    attended,
    example_weights,
    token_weights,
)
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Positive

# Heads whose classes are the positions of the sequence.
_POSITIONS = ("start", "end")
# Far below any logit, and finite so that products with 0 are 0.
_NEVER = -1e30


def make(
    temperature: Positive = 1.0,
    kind: Literal["kl", "cross_entropy", "mse"] = "kl",
    positions: Literal["all", "chosen"] = "all",
) -> Unbound:
    """Returns the loss "soft_logits".

    Logits are [b, classes], [b, l, classes] for each token or [b, p, classes] for those at batch["positions"], or a dict of
    heads, whose losses are averaged; in heads called start and end the classes are the positions [b, l], of which padded
    ones are none. One class is a regression: its loss is the mean squared error of the predictions, whatever the kind.
    Logits that are one number for each token (replaced tokens) are not for this loss.

    Args:
      temperature: T, above 0; only 1 with kind "mse".
      kind: "kl"; "cross_entropy" is larger by the teachers' entropy and has the same gradient; "mse" of the logits.
      positions: of logits for each token "all" real ones count, or those that batch["chosen"] says: masked tokens.

    Raises:
      UserError: a temperature that is not positive or has no effect; when bound, logits that are not there or have other
        shapes.
    """
    if temperature <= 0:
        raise UserError(f"temperature = {temperature}: should be above 0")
    if kind == "mse" and temperature != 1:
        raise UserError(
            f"temperature = {temperature} has no effect with kind='mse': leave it out"
        )

    def bind(student: Shapes, teacher: Shapes | Sequence[Shapes]) -> Bound:
        teachers = [teacher] if isinstance(teacher, Mapping) else list(teacher)
        _check(student, teachers, positions)

        def loss(logits, endpoints, batch, params):
            del endpoints, params
            heads = tree.flatten(logits)
            given = [
                tree.flatten(jax.lax.stop_gradient(each["logits"]))
                for each in batch["teacher"]
            ]
            losses = [
                _head(name, ours, [each[name] for each in given], batch)
                for name, ours in heads.items()
            ]
            total = sum(losses) / len(losses)
            return total, {"soft_logits": total}

        return Bound(("logits",), lambda key: {}, loss)

    def _head(name, ours, theirs, batch):
        ours, *theirs = (each.astype(jnp.float32) for each in (ours, *theirs))
        rows, allowed = ours.shape[0], None
        if ours.ndim == 3:
            weights = _places(batch, *ours.shape[:2], chosen=positions == "chosen")
        else:
            weights = example_weights(batch, rows)
        if _spans(name):
            allowed = attended(batch)
        if kind == "mse" or ours.shape[-1] == 1:
            return mean(squared_error(ours, theirs, allowed), weights)
        entropy = kind == "kl"
        losses = divergence(ours, theirs, temperature, allowed, entropy=entropy)
        return mean(losses, weights)

    return Unbound(bind)


def divergence(
    ours: jax.Array,
    theirs: Sequence[jax.Array],
    temperature: float,
    allowed: jax.Array | None = None,
    *,
    entropy: bool = True,
) -> jax.Array:
    """T^2 KL(mean of softmax(theirs / T) || softmax(ours / T)), equation 1 and section 2.1.

    Args:
      ours: the student's logits [..., classes].
      theirs: each teacher's, of that shape.
      temperature: T.
      allowed: bool [..., classes], which classes there are; None for all.
      entropy: False leaves out the teachers' entropy, which gives the cross-entropy.

    Returns:
      [...].
    """

    def log_softmax(logits):
        logits = logits / temperature
        if allowed is not None:
            logits = jnp.where(allowed, logits, _NEVER)
        return jax.nn.log_softmax(logits, -1)

    log_q = log_softmax(ours)
    log_p = log_softmax(theirs[0])
    if len(theirs) > 1:
        each = jnp.stack([log_p, *map(log_softmax, theirs[1:])])
        log_p = jax.nn.logsumexp(each, 0) - jnp.log(float(len(theirs)))
    against = log_p - log_q if entropy else -log_q
    return temperature**2 * jnp.sum(jnp.exp(log_p) * against, -1)


def squared_error(
    ours: jax.Array, theirs: Sequence[jax.Array], allowed: jax.Array | None = None
) -> jax.Array:
    """Mean over the classes of (ours - mean of theirs)^2: [..., classes] → [...]."""
    square = (ours - sum(theirs) / len(theirs)) ** 2
    if allowed is None:
        return square.mean(-1)
    counted = jnp.where(allowed, square, 0.0).sum(-1)
    return counted / jnp.maximum(allowed.sum(-1), 1)


def _places(batch, rows, places, *, chosen):
    """Weights, float32 [rows, places], of logits for each token or for some."""
    if chosen:
        if "chosen" not in batch:
            raise UserError(
                "positions = 'chosen': the data chooses no tokens; leave it out"
            )
        weights = batch["chosen"].reshape(rows, places).astype(jnp.float32)
        return weights * example_weights(batch, rows)[:, None]
    if "positions" not in batch:
        return token_weights(batch, rows, places)
    real = attended(batch)
    if real is None:
        raise UserError(
            "the batch has 'positions' without a padding mask: give it as 'attended' [b, l], true for real tokens"
        )
    weights = token_weights(batch, *real.shape)
    weights = jnp.take_along_axis(weights, batch["positions"], 1, mode="clip")
    # Where fewer are chosen the other places point to anything.
    return weights * batch["chosen"] if "chosen" in batch else weights


def _spans(name: str) -> bool:
    return name.split("/")[-1] in _POSITIONS


def _check(student: Shapes, teachers: Sequence[Shapes], positions: str) -> None:
    for whose, each in ("student", student), *(("teacher", t) for t in teachers):
        if "logits" not in each:
            raise UserError(
                f"soft_logits: the {whose} has no logits, only {', '.join(each) or 'nothing'}"
            )
    heads = tree.flatten(student["logits"])
    if "replaced" in heads:
        raise UserError(
            "soft_logits: the student's logits 'replaced' are one number for each token, not classes: choose another loss,"
            " such as distill.hidden"
        )
    if positions == "chosen" and all(head.ndim < 3 for head in heads.values()):
        raise UserError(
            "positions = 'chosen': the logits are not of each token; leave it out"
        )
    for theirs in (tree.flatten(each["logits"]) for each in teachers):
        for name, head in heads.items():
            if name not in theirs:
                raise UserError(
                    f"soft_logits: the teacher's logits have no head {name!r}{nearest(name, theirs)}"
                )
            if tuple(head.shape) != tuple(theirs[name].shape):
                raise UserError(
                    f"soft_logits: the student's logits are {tuple(head.shape)}, the teacher's"
                    f" {tuple(theirs[name].shape)}: both need the same classes"
                )
