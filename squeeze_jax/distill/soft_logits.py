"""The loss of soft targets: it trains the student to predict the same class probabilities as its teachers.

Hinton, Vinyals, Dean 2015, arXiv 1503.02531: T^2 KL(p_teacher || p_student), where p = softmax(z / T) of each network's
logits z. The factor T^2 keeps the size of the gradients as the temperature T grows (section 2.1). With several teachers,
p_teacher is the arithmetic mean of their probabilities. Ba, Caruana 2013, arXiv 1312.6184, use the mean squared error of the
logits instead. If an example may have any number of classes, each class has its own probability p = sigmoid(z / T), and the
loss is the mean over the classes of T^2 KL(p_teacher || p_student).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from squeeze_jax import tree
from squeeze_jax.batches import example_weights, padding_mask, token_weights
from squeeze_jax.distill._loss import (
    BoundLoss,
    Shapes,
    UnboundLoss,
    read_batch,
    teacher_outputs,
)
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.means import mean
from squeeze_jax.ranges import Positive
from squeeze_jax.registry import checked

# Heads of question answering, whose classes are the positions of the sequence.
_POSITION_HEADS = ("start", "end")
# The logit of an impossible class: far below all others, and finite, so that its product with 0 is 0.
_IMPOSSIBLE = -1e30


@checked
def make(
    temperature: Positive = 1.0,
    kind: Literal["kl", "cross_entropy", "mse"] = "kl",
    positions: Literal["all", "chosen"] = "all",
) -> UnboundLoss:
    """Returns the loss "soft_logits".

    Logits are [b, classes]; or [b, l, classes], one row per token; or [b, p, classes], one row for each of the positions in
    batch["positions"]; or a dict of heads, whose losses are averaged. In heads called "start" and "end" the classes are
    the positions of the sequence, [b, l], and padded positions are left out. A single class is a regression: for any kind,
    the loss is then the mean squared error of the predictions. The loss does not accept logits with one number per token,
    which ELECTRA's head for replaced tokens has.

    If the data give each example any number of classes, runs take the attribute `multi_label` of the result. It compares the
    probabilities sigmoid(z / T) of each class, and averages T^2 KL over the classes.

    Args:
      temperature: temperature T of the softmax or sigmoid, above 0; must be 1 with kind "mse".
      kind: "kl" is T^2 KL(p_teacher || p_student). "cross_entropy" is larger by the teachers' entropy and has the same
        gradients. "mse" is the mean squared error of the logits.
      positions: the tokens that count in logits with one row per token: "all" real tokens, or the masked tokens that
        batch["chosen"] marks.

    Raises:
      UserError: the temperature is not positive, or has no effect. When bound: logits are missing, or have different
        shapes in student and teacher.
    """
    if temperature <= 0:
        raise UserError(f"temperature = {temperature}: should be above 0")
    if kind == "mse" and temperature != 1:
        raise UserError(
            f"temperature = {temperature} has no effect with kind='mse': leave it out"
        )

    def bind(
        student: Shapes,
        teacher: Shapes | Sequence[Shapes],
        *,
        compare: Callable = divergence,
    ) -> BoundLoss:
        teachers = [teacher] if isinstance(teacher, Mapping) else list(teacher)
        _check_logits(student, teachers, positions)

        def loss(logits, endpoints, batch, params):
            del endpoints, params
            heads = tree.flatten(logits)
            batch = read_batch(batch, "soft_logits")
            teacher_heads = [
                tree.flatten(outputs["logits"])
                for outputs in teacher_outputs(batch, "soft_logits", ("logits",))
            ]
            losses = [
                head_loss(
                    name, x, [each[name] for each in teacher_heads], batch, compare
                )
                for name, x in heads.items()
            ]
            total = sum(losses) / len(losses)
            return total, {"soft_logits": total}

        return BoundLoss(("logits",), lambda key: {}, loss)

    def head_loss(name, student, teachers, batch, compare):
        student, *teachers = (x.astype(jnp.float32) for x in (student, *teachers))
        rows, allowed = student.shape[0], None
        if student.ndim == 3:
            masked_only = positions == "chosen"
            weights = _position_weights(
                batch, *student.shape[:2], masked_only=masked_only
            )
        else:
            weights = example_weights(batch, rows)
        if _predicts_position(name):
            allowed = padding_mask(batch)
        is_number = student.shape[-1] == 1 and compare is divergence
        if kind == "mse" or is_number:
            return mean(squared_error(student, teachers, allowed), weights)
        entropy = kind == "kl"
        losses = compare(student, teachers, temperature, allowed, entropy=entropy)
        return mean(losses, weights)

    multi_label = functools.partial(bind, compare=label_divergence)
    return UnboundLoss(bind, UnboundLoss(multi_label))


def divergence(
    student: jax.Array,
    teachers: Sequence[jax.Array],
    temperature: float,
    allowed: jax.Array | None = None,
    *,
    entropy: bool = True,
) -> jax.Array:
    """Returns T^2 KL(mean of softmax(teacher / T) over the teachers || softmax(student / T)), [...].

    Hinton et al., equation 1 and section 2.1.

    Args:
      student: the student's logits [..., classes].
      teachers: the logits of each teacher, of the same shape.
      temperature: T.
      allowed: bool [..., classes], True for the possible classes; None if all are possible.
      entropy: whether to subtract the teachers' entropy; without that the result is the cross-entropy.
    """

    def log_softmax(logits):
        logits = logits / temperature
        if allowed is not None:
            logits = jnp.where(allowed, logits, _IMPOSSIBLE)
        return jax.nn.log_softmax(logits, -1)

    log_q = log_softmax(student)
    log_p = log_softmax(teachers[0])
    if len(teachers) > 1:
        log_ps = jnp.stack([log_p, *map(log_softmax, teachers[1:])])
        log_p = jax.nn.logsumexp(log_ps, 0) - jnp.log(float(len(teachers)))
    log_ratio = log_p - log_q if entropy else -log_q
    return temperature**2 * jnp.sum(jnp.exp(log_p) * log_ratio, -1)


def label_divergence(
    student: jax.Array,
    teachers: Sequence[jax.Array],
    temperature: float,
    allowed: jax.Array | None = None,
    *,
    entropy: bool = True,
) -> jax.Array:
    """Returns the `divergence` of the two outcomes "has the class" and "has it not", averaged over the classes, [...].

    The probability of a class is sigmoid(z / T), independent of the other classes. The arguments are as in `divergence`.
    """

    def outcomes(logits):  # softmax((z, 0)) is (sigmoid(z), 1 - sigmoid(z))
        return jnp.stack([logits, jnp.zeros_like(logits)], -1)

    losses = divergence(
        outcomes(student), [*map(outcomes, teachers)], temperature, entropy=entropy
    )
    return losses.mean(-1) if allowed is None else _allowed_mean(losses, allowed)


def squared_error(
    student: jax.Array,
    teachers: Sequence[jax.Array],
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Returns the mean over the classes of (student - mean of the teachers)^2, [...]; the arguments are as in `divergence`."""
    square = (student - sum(teachers) / len(teachers)) ** 2
    return square.mean(-1) if allowed is None else _allowed_mean(square, allowed)


def _allowed_mean(values: jax.Array, allowed: jax.Array) -> jax.Array:
    """Returns the mean of the allowed values along the last axis, [...]."""
    total = jnp.where(allowed, values, 0.0).sum(-1)
    return total / jnp.maximum(allowed.sum(-1), 1)


def _position_weights(batch, rows, positions, *, masked_only):
    """Returns the weights of logits with one row per token or per chosen position, float32 [rows, positions].

    Args:
      batch: "mask", and as needed "positions" int [rows, positions], "chosen", and the padding mask.
      rows: number of sequences.
      positions: number of positions per sequence.
      masked_only: whether only the tokens count that batch["chosen"] marks.

    Raises:
      UserError: the batch lacks "chosen", or has "positions" without a padding mask.
    """
    if masked_only:
        if "chosen" not in batch:
            raise UserError(
                "positions = 'chosen': the data chooses no tokens; leave it out"
            )
        weights = batch["chosen"].reshape(rows, positions).astype(jnp.float32)
        return weights * example_weights(batch, rows)[:, None]
    if "positions" not in batch:
        return token_weights(batch, rows, positions)
    is_real = padding_mask(batch)
    if is_real is None:
        raise UserError(
            "the batch has 'positions' without a padding mask: give it as 'attended' [b, l], true for real tokens"
        )
    weights = token_weights(batch, *is_real.shape)
    weights = jnp.take_along_axis(weights, batch["positions"], 1, mode="clip")
    # Sequences with fewer chosen tokens fill "positions" with arbitrary values.
    return weights * batch["chosen"] if "chosen" in batch else weights


def _predicts_position(name: str) -> bool:
    """Returns whether the classes of a head are the positions of the sequence."""
    return name.split("/")[-1] in _POSITION_HEADS


def _check_logits(student: Shapes, teachers: Sequence[Shapes], positions: str) -> None:
    """Raises a UserError unless the loss accepts the student's logits and all teachers have logits of the same shapes.

    Args:
      student, teachers: output shapes of the networks.
      positions: the option of `make`.
    """
    for whose, outputs in ("student", student), *(("teacher", t) for t in teachers):
        if "logits" not in outputs:
            raise UserError(
                f"soft_logits: the {whose} has no logits, only {', '.join(outputs) or 'nothing'}"
            )
    heads = tree.flatten(student["logits"])
    if "replaced" in heads:
        raise UserError(
            "soft_logits: the student's logits 'replaced' are one number for each token, not classes: choose another loss,"
            " such as distill.hidden"
        )
    for name, head in heads.items():
        if head.ndim > 3:
            raise UserError(
                f"soft_logits: the student's logits {name or ''} {list(head.shape)} are maps: the loss is for [b, classes] and [b, l,"
                " classes]"
            )
    if positions == "chosen" and all(head.ndim < 3 for head in heads.values()):
        raise UserError(
            "positions = 'chosen': the logits are not of each token; leave it out"
        )
    for teacher_heads in (tree.flatten(outputs["logits"]) for outputs in teachers):
        for name, head in heads.items():
            if name not in teacher_heads:
                raise UserError(
                    f"soft_logits: the teacher's logits have no head {name!r}{nearest(name, teacher_heads)}"
                )
            if tuple(head.shape) != tuple(teacher_heads[name].shape):
                raise UserError(
                    f"soft_logits: the student's logits are {tuple(head.shape)}, the teacher's"
                    f" {tuple(teacher_heads[name].shape)}: both need the same classes"
                )
