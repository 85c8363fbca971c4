"""LSTM language model: predicts each next token from a state that it carries through the text.

Zaremba, Sutskever, Vinyals 2014, "Recurrent Neural Network Regularization", arXiv 1409.2329. The variants are those of
section 4.1: `small` is the non-regularized network of Table 1, `medium` and `large` have dropout. Dropout acts between
layers, before the first and after the last, never on the recurrent connection (Figure 2).

Training reads consecutive windows of a text, and the state after one window is the state before the next (truncated
backpropagation through time). The state is the input `carry` and the output `endpoints["carry"]`. `data/tasks/contiguous.py`
supplies such windows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn import recurrent
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.embed import Embed, Sizes, named_inputs, text_inputs
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.ranges import Count, Layers, Positive, Rate

INPUTS = "tokens"
CLASSIFIER = ("output",)  # the layer that depends on the vocabulary


class Row(NamedTuple):
    """The sizes and options of a variant.

    Attributes:
      layers: number of LSTM layers.
      features: channels of the embeddings and of each layer's state.
      dropout: dropout rate of the non-recurrent connections.
      init: largest absolute value of the initial weights, which are uniformly distributed.
      vocabulary: number of tokens.
    """

    layers: int
    features: int
    dropout: float
    init: float
    vocabulary: int = 10_000  # of Penn Treebank


VARIANTS = {
    "small": Row(2, 200, 0.0, 0.1),
    "medium": Row(2, 650, 0.5, 0.05),
    "large": Row(2, 1500, 0.65, 0.04),
    "tiny": Row(2, 8, 0.0, 0.1, vocabulary=99),
}


class Lstm(nn.Module):
    """The network; attributes as in `make`.

    Endpoints: embedding, lstm1, lstm2, … [b, l, d], and "carry", the state after the last token.
    """

    row: Row
    tied: bool = False

    task = "causal_lm"

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        *,
        train: bool = False,
        carry: dict[str, recurrent.Carry] | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns (logits of each next token, float32 [b, l, vocabulary], endpoints).

        Args:
          inputs: {"tokens": int [b, l], "fresh": bool [b]}. Rows with fresh=True start with a state of zeros instead of the
            carry; without "fresh" no row does.
          train: whether dropout acts.
          carry: the state before the first token, see `initial_carry`; None for zeros.
        """
        row = self.row
        inputs = named_inputs(inputs, ("tokens", "fresh"), type(self).__name__)
        tokens = text_inputs(
            inputs, sizes=Sizes(row.vocabulary), reads=("tokens", "fresh")
        ).tokens
        carry = self._reset_fresh_rows(inputs, carry)
        init = uniform(row.init)
        embed = Embed(row.vocabulary, row.features, init, name="embedding")
        y = embed(tokens)
        endpoints, new_carry = {"embedding": y}, {}
        for name in self._names():
            y = Dropout(row.dropout)(y, train=train)
            # Tied scores are products with the embeddings, so the last layer must keep their width.
            fixed = self.tied and name == self._names()[-1]
            layer = recurrent.LSTM(row.features, fixed, init, name=name)
            y, new_carry[name] = layer(y, None if carry is None else carry[name])
            endpoints[name] = y
        y = Dropout(row.dropout)(y, train=train)
        endpoints["carry"] = new_carry
        if self.tied:
            bias = parameter(
                self, "bias", nn.initializers.zeros_init(), (row.vocabulary,)
            )
            return embed.scores(y) + bias, endpoints
        # One matrix product over all positions is faster on a CPU than one for each row.
        output = Dense(
            row.vocabulary,
            kernel_init=init,
            output_dtype=jnp.float32,
            fixed=True,
            name="output",
        )
        logits = output(y.reshape(-1, y.shape[-1]))
        return logits.reshape(*tokens.shape, -1), endpoints

    @nn.nowrap
    def initial_carry(
        self, rows: int, widths: Mapping[str, int] | None = None
    ) -> dict[str, recurrent.Carry]:
        """Returns the initial state of `rows` texts: {layer: {"hidden", "cell": zeros [rows, d]}}, float32.

        Args:
          rows: number of texts.
          widths: {layer: d} of the layers whose width an enclosing `Reshaped` changes.
        """
        sizes = dict.fromkeys(self._names(), self.row.features)
        sizes |= {k: v for k, v in (widths or {}).items() if k in sizes}
        return {k: recurrent.initial_carry(rows, size) for k, size in sizes.items()}

    @nn.nowrap
    def _names(self) -> list[str]:
        return [f"lstm{number + 1}" for number in range(self.row.layers)]

    @nn.nowrap
    def _reset_fresh_rows(self, inputs, carry):
        """Returns the carry with zeros in the rows that start a new text."""
        fresh, rows = inputs.get("fresh"), inputs["tokens"].shape[:1]
        if fresh is not None and tuple(fresh.shape) != rows:
            raise UserError(
                f"fresh should be [b], true for each row that begins a text: its shape is {tuple(fresh.shape)}, tokens"
                f" have {rows[0]} rows"
            )
        if fresh is None or carry is None:
            return carry
        keep = fresh[:, None] == 0
        return jax.tree.map(lambda a: jnp.where(keep, a, 0.0), carry)


def uniform(limit: float):
    """Returns an initializer of uniformly distributed numbers in [-limit, limit)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def make(
    variant: str = "small",
    *,
    layers: Layers | None = None,
    features: Count | None = None,
    vocabulary: Count | None = None,
    dropout: Rate | None = None,
    init: Positive | None = None,
    tied: bool = False,
) -> Lstm:
    """Builds an LSTM language model.

    Args:
      variant: a row of VARIANTS.
      layers, features, vocabulary, dropout, init: see `Row`; None for the variant's.
      tied: whether the output layer's kernel is the table of embeddings (Press, Wolf, arXiv 1608.05859).

    Raises:
      UserError: an unknown variant, or a value out of range.
    """
    row = registry.row(VARIANTS, variant, "variant of lstm")
    options = dict(
        layers=layers,
        features=features,
        vocabulary=vocabulary,
        dropout=dropout,
        init=init,
    )
    row = row._replace(**{k: v for k, v in options.items() if v is not None})
    for name in ("layers", "features", "vocabulary"):
        if getattr(row, name) < 1:
            raise UserError(
                f"config.model.{name} = {getattr(row, name)} should be a positive number"
            )
    if not 0 <= row.dropout < 1:
        raise UserError(f"config.model.dropout = {row.dropout} should lie in [0, 1)")
    if row.init <= 0:
        raise UserError(f"config.model.init = {row.init} should be positive")
    return Lstm(row, tied)


def torch_names(net: Lstm) -> dict[str, str]:
    """Returns {our layer: its name in the result of `from_torch`}."""
    names = {"embedding": "encoder"} | {
        name: f"rnn.{number}" for number, name in enumerate(net._names())
    }
    # A tied network's bias belongs to the whole network, whose path is empty.
    return names | {"" if net.tied else "output": "decoder"}


def from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the tensors of `torch.nn.LSTM`, so that `weights.foreign.fit` accepts them with `torch_names`.

    `rnn.weight_ih_l0` becomes `rnn.0.weight`, `rnn.weight_hh_l0` becomes `rnn.0.recurrent_weight`, and `rnn.bias_ih_l0` and
    `rnn.bias_hh_l0` add up to `rnn.0.bias`. The names are those of PyTorch's example word_language_model: encoder, rnn,
    decoder.
    """
    renamed = {}
    for name, array in arrays.items():
        layer, _, end = name.rpartition("_l")
        if not layer.startswith("rnn."):
            renamed[name] = array
        elif layer == "rnn.weight_ih":
            renamed[f"rnn.{end}.weight"] = array
        elif layer == "rnn.weight_hh":
            renamed[f"rnn.{end}.recurrent_weight"] = array
        else:
            total = f"rnn.{end}.bias"
            renamed[total] = renamed.get(total, 0) + np.asarray(array)
    return renamed
