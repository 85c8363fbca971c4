"""What encoders end in: one head for each task."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn import activations
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.layer_norm import LayerNorm

# BERT's; others have some of these, and ELECTRA "replaced".
Task = Literal[
    "features",
    "masked_lm",
    "next_sentence",
    "pretraining",
    "classification",
    "tokens",
    "span",
    "choice",
]
# The tasks that look at the whole sequence by its pooled first token, and those with a pooler unless told otherwise.
NEED_POOLER = ("next_sentence", "pretraining", "classification", "choice")
POOLED = ("features", *NEED_POOLER)

_INIT = nn.initializers.truncated_normal(0.02)


def check(task: str, tasks: Any) -> None:
    """Checks that a task is one of a `Literal`.

    Raises:
      UserError: an unknown task.
    """
    if task not in get_args(tasks):
        raise UserError(f"unknown task {task!r}{nearest(task, get_args(tasks))}")


def pooled(
    task: str,
    wanted: bool | None = None,
    *,
    tasks: Any = Task,
    need: Sequence[str] = NEED_POOLER,
) -> bool:
    """Whether an encoder for the task has a pooler; `wanted` decides where it is not None.

    Args:
      task: what the head is for.
      wanted: whether there shall be one; None for where the task needs it, and for features.
      tasks: the `Literal` of those that the encoder has.
      need: those whose heads read the pooled token.

    Raises:
      UserError: an unknown task, or one that needs the pooler which is not wanted.
    """
    check(task, tasks)
    if wanted is False and task in need:
        raise UserError(f"task {task!r} reads the pooled token: leave out pooler=False")
    return task in ("features", *need) if wanted is None else wanted


class Pooler(nn.Module):
    """tanh(W x + b) of the first token; BERT, arXiv 1810.04805."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [b, l, d] → [b, d]."""
        dense = Dense(x.shape[-1], dtype=x.dtype, kernel_init=_INIT, name="dense")
        return jnp.tanh(dense(x[:, 0]))


def last_token(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x: [b, l, d], mask: bool [b, l], True for real tokens, or None → the last real one [b, d]."""
    if mask is None:
        return x[:, -1]
    places = jnp.arange(x.shape[1])
    last = (mask * places).max(-1, keepdims=True)
    # A sum, because runtimes have no quick selection.
    return (x * (places == last)[..., None]).sum(1)


class MaskedLM(nn.Module):
    """Scores of every token at every position: dense, activation, normalisation, the embeddings' table, a bias.

    Attributes:
      features: of the embeddings.
      activation: a name of `activations.ACTIVATIONS`.
      epsilon: of the normalisation.
      untied: channels beside those of the embeddings, which a matrix of the head's own scores; MobileBERT's.
    """

    features: int
    activation: str = "gelu"
    epsilon: float = 1e-12
    untied: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, scores: Callable) -> jax.Array:
        """x: [b, l, d], scores: `Embeddings.scores` → [b, l, vocabulary], float32."""
        rows = x.reshape(-1, x.shape[-1])
        width = self.features + self.untied
        dense = partial(Dense, dtype=x.dtype, kernel_init=_INIT, fixed=True)
        y = activations.named(self.activation)(dense(width, name="transform")(rows))
        rows = LayerNorm(self.epsilon, name="norm")(y)
        y = scores(rows[:, : self.features])
        if self.untied:
            own = dense(
                y.shape[-1], use_bias=False, output_dtype=jnp.float32, name="untied"
            )
            y = y + own(rows[:, self.features :])
        bias = self.param("bias", nn.initializers.zeros_init(), y.shape[-1:])
        return (y + bias).reshape(*x.shape[:-1], -1)


class Head(nn.Module):
    """A task's head, by default as BERT has it; all logits are float32.

    | task           | logits                                                                                     |
    |----------------|--------------------------------------------------------------------------------------------|
    | features       | [b, l, d]: the last layer, no head                                                         |
    | masked_lm      | [b, l, vocabulary], or [b, p, vocabulary] of p positions                                   |
    | causal_lm      | [b, l, vocabulary]: of the token after each                                                |
    | next_sentence  | [b, 2]: whether the second segment follows the first (0) or not (1), or is in order        |
    | pretraining    | {"masked_lm": …, "next_sentence": …}                                                       |
    | replaced       | [b, l]: whether another net put the token there; ELECTRA, arXiv 2003.10555                 |
    | classification | [b, num_classes]; one class is a regression                                                |
    | tokens         | [b, l, num_classes]                                                                        |
    | span           | {"start": [b, l], "end": [b, l]}: where an answer begins and ends                          |
    | choice         | [b, choices]                                                                               |

    Attributes:
      task: see the table.
      num_classes: of classification and tokens.
      features: of the embeddings, for masked_lm.
      activation: of masked_lm and replaced.
      epsilon: see `MaskedLM`.
      dropout: rate before the last layer, 0 to 1; needs the rng "dropout" in training.
      summary: the activation after a fully connected layer on the first token, which tasks of sequences read instead of
        the pooled one; None for the pooled one.
      summary_dropout: rate before that layer.
      untied: see `MaskedLM`.
      bias: whether a classifier has one.
    """

    task: str
    num_classes: int
    features: int
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.0
    summary: str | None = None
    summary_dropout: float = 0.0
    untied: int = 0
    bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        pooled: jax.Array | None,
        scores: Callable,
        *,
        choices: int = 1,
        positions: jax.Array | None = None,
        train: bool = False,
    ):
        """The logits, of `choices` sequences each for choice.

        Args:
          x: [b, l, d].
          pooled: [b, d], or None where the task does not read it.
          scores: `Embeddings.scores`.
          choices: how many sequences are one example.
          positions: int [b, p]: where masked_lm scores tokens; None for everywhere. The scores of all positions take more
            time than the layers of a small encoder, and a loss reads every seventh.

        Raises:
          UserError: no classes.
        """
        drop = partial(Dropout(self.dropout), train=train)

        def sequence():
            return drop(self._sequence(x, pooled, train))

        match self.task:
            case "features":
                return x.astype(jnp.float32)
            case "masked_lm":
                return self._masked_lm(x, scores, positions)
            case "causal_lm":
                return scores(x)
            case "next_sentence":
                return _dense(2, "next_sentence")(sequence())
            case "pretraining":
                return {
                    "masked_lm": self._masked_lm(x, scores, positions),
                    "next_sentence": _dense(2, "next_sentence")(sequence()),
                }
            case "replaced":
                y = activations.named(self.activation)(_transform(x))
                return _dense(1, "replaced")(drop(y))[..., 0]
            case "span":
                start, end = jnp.moveaxis(_dense(2, "span")(drop(x)), -1, 0)
                return {"start": start, "end": end}
            case "choice":
                return _dense(1, "classifier")(sequence()).reshape(-1, choices)
        if self.num_classes < 1:
            raise UserError(
                f"num_classes = {self.num_classes}: should be a positive number, 1 for a regression"
            )
        y = drop(x) if self.task == "tokens" else sequence()
        return _dense(self.num_classes, "classifier", self.bias)(y)

    def _sequence(self, x, pooled, train):
        """What stands for the whole sequence, [b, d]."""
        if self.summary is None:
            return pooled
        drop = partial(Dropout(self.summary_dropout), train=train)
        return activations.named(self.summary)(_transform(drop(x[:, 0])))

    def _masked_lm(self, x, scores, positions):
        head = MaskedLM(
            self.features,
            self.activation,
            self.epsilon,
            self.untied,
            name="masked_lm",
        )
        if positions is not None:
            x = jnp.take_along_axis(x, positions[..., None], axis=1, mode="clip")
        return head(x, scores)


def _transform(x):
    """A fully connected layer that keeps the channels, [..., d]."""
    dense = Dense(x.shape[-1], dtype=x.dtype, kernel_init=_INIT, name="transform")
    return dense(x)


def _dense(features: int, name: str, bias: bool = True) -> Dense:
    return Dense(
        features,
        use_bias=bias,
        dtype=jnp.float32,
        kernel_init=_INIT,
        fixed=True,
        name=name,
    )
