"""What encoders of text have in common: embeddings, a stack of layers, a head; a net overrides where it differs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.nn import activations, encoder
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.embed import Embeddings, positions, text
from squeeze_jax.nn.heads import Head, Pooler


class Row(NamedTuple):
    """A variant: layers, their channels, attention's heads, the feed-forward network's channels, the embeddings' sizes.

    `embedding_features` are the embeddings' channels; None for those of the layers.
    """

    layers: int
    features: int
    heads: int
    ffn_features: int
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2
    embedding_features: int | None = None


class Encoder(nn.Module):
    """Embeddings of words, positions and segments; layers of attention and feed-forward networks; a task's head.

    Endpoints: embeddings (what the first layer sees), layer1, layer2, … [b, l, d], attention1, … (probabilities) and
    scores1, … (before the softmax) [b, heads, l, l], pooled [b, d] where there is a pooler.

    Attributes:
      row: the sizes.
      task, num_classes: see `heads.Head`.
      activation: of the feed-forward networks.
      epsilon, layer_epsilon: of the normalisations outside and inside of the layers.
      dropout, attention_dropout: see `encoder.Layer`; the first also after the embeddings.
      head_dropout: rate before a classifier.
      pooler: whether there is one.
      dtype: between the embeddings and the logits.
      groups: of each layer; None for dense layers.
    """

    row: Row
    task: str
    num_classes: int
    activation: str
    epsilon: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    pooler: bool
    dtype: str
    groups: tuple[Groups, ...] | None = None
    layer_epsilon: float | None = None

    # Rows of the positions' table before that of the first token.
    before_positions = 0

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Logits, see `heads.Head`, and endpoints.

        Args:
          x: {"tokens", "segments", "mask"} of [b, l], see `embed.text`, and "positions" for masked_lm.
          train: whether dropout acts.
        """
        row = self.row
        tokens, segments, mask = text(x, choices=self.task == "choice")
        embeddings = self.make_embeddings()
        at = self.position_rows(mask)
        y = embeddings(tokens, segments, at=at, train=train)
        if self.has_projection():
            y = Conv(row.features, 1, kernel_init=encoder.KERNEL_INIT, name="project")(
                y
            )
        endpoints = {"embeddings": y}
        y, more = encoder.stack(self.make_layers(), y, mask, train=train)
        endpoints |= more
        y = self.finish(y)
        pooled = self.pool(y, mask)
        if pooled is not None:
            endpoints["pooled"] = pooled
        logits = self.make_head()(
            y,
            pooled,
            embeddings.scores,
            choices=x["tokens"].shape[1],
            positions=positions(x),
            train=train,
        )
        return logits, endpoints

    def make_embeddings(self, **options) -> Embeddings:
        """The embeddings; options are those of `embed.Embeddings` that differ from BERT's."""
        row = self.row
        common = {
            "vocabulary": row.vocabulary,
            "features": row.embedding_features or row.features,
            "positions": row.positions,
            "segments": row.segments,
            "dropout": self.dropout,
            "epsilon": self.epsilon,
            "dtype": jnp.dtype(self.dtype),
            "before": self.before_positions,
        }
        return Embeddings(**common | options, name="embeddings")

    def finish(self, y):
        """What is done to the last layer's [b, l, d]."""
        return y

    def pool(self, y, mask):
        """What stands for a whole sequence, [b, d] or None, of y [b, l, d]; mask: bool [b, l] or None."""
        return Pooler(name="pooler")(y) if self.pooler else None

    def position_rows(self, mask):
        """The row of each token in the table of positions, int [b, l], or None to count tokens from the first on."""
        return None

    def has_projection(self) -> bool:
        """Whether a fully connected layer widens the embeddings."""
        return self.row.embedding_features not in (None, self.row.features)

    def make_layers(self) -> list[nn.Module]:
        """The layers in their order."""
        groups = self.groups or (Groups(),) * self.row.layers
        return [self.make_layer(f"layer{n}", each) for n, each in enumerate(groups, 1)]

    def make_layer(self, name: str, groups: Groups, **options) -> nn.Module:
        """One layer; options are those of `encoder.Layer` that differ from BERT's."""
        return encoder.Layer(
            self.row.heads,
            self.row.ffn_features,
            groups,
            self.activation,
            self.dropout,
            self.attention_dropout,
            self.epsilon if self.layer_epsilon is None else self.layer_epsilon,
            features=self.row.features,
            **options,
            name=name,
        )

    def make_head(self, **options) -> Head:
        """The task's head; options are those of `heads.Head` that differ from BERT's."""
        common = {
            "task": self.task,
            "num_classes": self.num_classes,
            "features": self.row.embedding_features or self.row.features,
            "activation": self.activation,
            "epsilon": self.epsilon,
            "dropout": self.head_dropout
            if self.task in ("classification", "tokens", "choice")
            else 0.0,
        }
        return Head(**common | options, name="head")


def sized(
    variants: Mapping[str, Row],
    variant: str,
    model_type: str,
    activation: str,
    **sizes: Any,
) -> Row:
    """A variant's row with the sizes that are given, not None, instead of its own.

    Raises:
      UserError: an unknown variant or activation, a size that is not positive, heads that do not divide the features.
    """
    row = registry.row(variants, variant, f"variant of {model_type}")
    row = encoder.resized(row, **sizes)
    encoder.check(row.features, row.ffn_features, row.heads)
    activations.named(activation)
    return row


def layer_names(parts: Mapping[str, str], layers: int, start: str) -> dict[str, str]:
    """Names of numbered layers, ours from 1 on and theirs from 0.

    Args:
      parts: {our part of a layer: theirs}.
      layers: how many.
      start: what stands before their number.
    """
    return {
        f"layer{number + 1}/{ours}": f"{start}.{number}.{theirs}"
        for number in range(layers)
        for ours, theirs in parts.items()
    }
