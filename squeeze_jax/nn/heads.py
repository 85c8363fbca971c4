"""The heads of encoders: the last layers, which compute the logits of a task."""

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
from squeeze_jax.nn.parameter import parameter

# The tasks of BERT. Other encoders have some of these, or tasks of their own, such as ELECTRA's "replaced".
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
# The tasks whose heads read the pooled first token as the representation of the whole sequence, and the tasks for which an
# encoder has a pooler by default.
NEED_POOLER = ("next_sentence", "pretraining", "classification", "choice")
POOLED = ("features", *NEED_POOLER)

_INIT = nn.initializers.truncated_normal(0.02)


def check_task(task: str, tasks: Any) -> None:
    """Raises a UserError unless a task is one of the strings of the `Literal` `tasks`."""
    if task not in get_args(tasks):
        raise UserError(f"unknown task {task!r}{nearest(task, get_args(tasks))}")


def has_pooler(
    task: str,
    wanted: bool | None = None,
    *,
    tasks: Any = Task,
    need: Sequence[str] = NEED_POOLER,
) -> bool:
    """Returns whether an encoder for a task has a pooler.

    Args:
      task: the head's task.
      wanted: the user's choice; None for a pooler if the task needs one, or is "features".
      tasks: `Literal` of the encoder's tasks.
      need: the tasks whose heads read the pooled token.

    Raises:
      UserError: The task is unknown, or it needs the pooler and `wanted` is False.
    """
    check_task(task, tasks)
    if wanted is False and task in need:
        raise UserError(f"task {task!r} reads the pooled token: leave out pooler=False")
    return task in ("features", *need) if wanted is None else wanted


class Pooler(nn.Module):
    """BERT's pooler: tanh(W x + b) of the first token's hidden state x; Devlin et al. 2018, arXiv 1810.04805."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the pooler: hidden states [b, l, d] → [b, d]."""
        dense = Dense(x.shape[-1], dtype=x.dtype, kernel_init=_INIT, name="dense")
        return jnp.tanh(dense(x[:, 0]))


def last_token(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the hidden state of the last real token of each sequence, [b, d].

    Args:
      x: hidden states [b, l, d].
      mask: padding mask, bool [b, l], True for real tokens; None if all are.
    """
    if mask is None:
        return x[:, -1]
    indices = jnp.arange(x.shape[1])
    last = (mask * indices).max(-1, keepdims=True)
    # A masked sum instead of an index: runtimes have no fast selection.
    return (x * (indices == last)[..., None]).sum(1)


class MaskedLM(nn.Module):
    """The head of masked language models: logits of every token of the vocabulary at each position.

    It applies a dense layer, an activation, a normalisation, the transposed embedding table and a bias.

    Attributes:
      features: number of channels of the token embeddings.
      activation: a name in `activations.ACTIVATIONS`.
      epsilon: added to the variance of the normalisation.
      untied: number of additional channels, which a matrix of the head's own multiplies instead of the embedding table; used
        by MobileBERT.
    """

    features: int
    activation: str = "gelu"
    epsilon: float = 1e-12
    untied: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, scores: Callable) -> jax.Array:
        """Applies the head.

        Args:
          x: hidden states [b, l, d].
          scores: function that multiplies by the transposed embedding table, `Embeddings.scores`.

        Returns:
          Logits, float32 [b, l, vocabulary].
        """
        rows = x.reshape(-1, x.shape[-1])
        width = self.features + self.untied
        dense = partial(Dense, dtype=x.dtype, kernel_init=_INIT, fixed=True)
        y = activations.by_name(self.activation)(dense(width, name="transform")(rows))
        rows = LayerNorm(self.epsilon, name="norm")(y)
        y = scores(rows[:, : self.features])
        if self.untied:
            untied = dense(
                y.shape[-1], use_bias=False, output_dtype=jnp.float32, name="untied"
            )
            y = y + untied(rows[:, self.features :])
        bias = parameter(self, "bias", nn.initializers.zeros_init(), y.shape[-1:])
        return (y + bias).reshape(*x.shape[:-1], -1)


class Head(nn.Module):
    """The head of a task, by default as in BERT; all logits are float32.

    | task           | logits                                                                                     |
    |----------------|--------------------------------------------------------------------------------------------|
    | features       | [b, l, d]: the last layer's hidden states, no head                                         |
    | masked_lm      | [b, l, vocabulary], or [b, p, vocabulary] at p positions only                              |
    | causal_lm      | [b, l, vocabulary]: logits of the next token after each position                           |
    | next_sentence  | [b, 2]: class 0 if the second segment follows the first, else class 1; in ALBERT, class 0  |
    |                | if the two segments are in order                                                           |
    | pretraining    | {"masked_lm": …, "next_sentence": …}                                                       |
    | replaced       | [b, l]: whether a generator network replaced the token; ELECTRA, arXiv 2003.10555          |
    | classification | [b, num_classes]; one class is a regression                                                |
    | tokens         | [b, l, num_classes]                                                                        |
    | span           | {"start": [b, l], "end": [b, l]}: where an answer begins and where it ends                 |
    | choice         | [b, choices]                                                                               |

    Attributes:
      task: what the head computes. "features": hidden states, without a head; "masked_lm": the masked tokens; "causal_lm": each
        next token; "next_sentence": whether the second segment follows the first; "pretraining": "masked_lm" and
        "next_sentence"; "replaced": which tokens a generator has replaced; "classification": the class of a text, or a number
        if num_classes is 1; "tokens": a class for each token; "span": where an answer begins and ends; "choice": the best of
        several texts.
      num_classes: number of classes, for classification and tokens.
      features: number of channels of the token embeddings, for masked_lm.
      activation: activation of masked_lm and replaced.
      epsilon: see `MaskedLM`.
      dropout: dropout rate before the last layer, 0 to 1; needs the rng "dropout" in training.
      summary: name of an activation: heads that classify sequences then read a dense layer of the first token with this
        activation. None if they read the pooled token.
      summary_dropout: dropout rate before that dense layer.
      untied: see `MaskedLM`.
      bias: whether the classifier of classification and tokens has a bias.
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
        """Returns the logits of the task, see the table.

        Args:
          x: hidden states [b, l, d].
          pooled: pooled tokens [b, d]; None if the task does not read them.
          scores: function that multiplies by the transposed embedding table, `Embeddings.scores`.
          choices: number of sequences that are one example, for the task choice.
          positions: int [b, p], the positions at which masked_lm computes logits; None for all. The logits of all positions
            take more time than the layers of a small encoder, and a loss reads only every seventh.
          train: whether to apply dropout.

        Raises:
          UserError: num_classes is less than 1, and the task needs classes.
        """
        drop = partial(Dropout(self.dropout), train=train)

        def sequence():
            return drop(self._sequence_features(x, pooled, train))

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
                y = activations.by_name(self.activation)(_transform(x))
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

    def _sequence_features(self, x, pooled, train):
        """Returns the features that represent a whole sequence, [b, d]."""
        if self.summary is None:
            return pooled
        drop = partial(Dropout(self.summary_dropout), train=train)
        return activations.by_name(self.summary)(_transform(drop(x[:, 0])))

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
    """Applies a dense layer with as many outputs as inputs, [..., d] → [..., d]."""
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
