"""Elastic SqueezeBERT: a once-for-all space of BERTs with grouped convolutions.

Iandola, Shaw, Krishna, Keutzer 2020, arXiv 2006.11316 (SqueezeBERT); Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791
(once-for-all); Lan et al. 2019, arXiv 1909.11942 (ALBERT's shared layers). Each network of the space is a SqueezeBERT with its
own depth, and in each layer its own number of heads, width of the feed-forward network and numbers of groups of the six
convolutions. Its parameters have the names of `models/squeezebert.py`. The largest network is BERT: dense convolutions hold the
weights of all numbers of groups as diagonal blocks, see `nas/subnetwork.py`.

Heads are the first heads of each of as many blocks as divide all choices, and hidden channels of the feed-forward network the first
channels of each of 12 blocks. So a narrower network with as many groups uses a part of the wider one's weights.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder
from squeeze_jax.models._encoder import Options, Settings
from squeeze_jax.nn import encoder, encoder_pieces, heads
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.chain import Chain, Output, Piece
from squeeze_jax.nn.elastic import one_per_position
from squeeze_jax.nn.embed import Embeddings, Sizes, text_inputs
from squeeze_jax.nn.placement import Axis
from squeeze_jax.ranges import Count, Layers

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options()
GROUPS = (12, 6, 4, 3, 2, 1)  # in ascending order of size
BLOCKS = 12  # of the hidden channels of feed-forward networks; each number of groups divides it
_GROUP_OPTIONS = tuple(f"{name}_groups" for name in Groups._fields)
Task = Literal["features", "classification", "tokens", "span"]


class Row(NamedTuple):
    """A variant.

    Attributes:
      features: channels of the hidden states.
      depth, heads, ffn: choices of the number of layers, and of the heads and hidden channels of each layer, ascending.
      vocabulary, positions, segments: rows of the embedding tables.
    """

    features: int
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2


VARIANTS = {
    "base": Row(768, (6, 8, 10, 12), (6, 9, 12), (768, 1536, 2304, 3072)),
    "small": Row(384, (1, 2, 3), (6, 9, 12), (384, 768, 1152, 1536), positions=128),
    "tiny": Row(24, (1, 2), (1, 2), (24, 48), vocabulary=99, positions=64),
}


class Tables(nn.Module):
    """The embeddings: {"tokens", "segments", "attended", "position_ids"}, each [b, l] → {"hidden", "attended"}.

    `hidden` are the hidden states [b, l, d]. `attended` is the padding mask, float32 [b, l]: 1 for real tokens; absent if
    all are. Integers and booleans would have no gradients, and pieces are differentiated one by one.
    """

    row: Row
    settings: Settings

    endpoints = ("embeddings",)

    def setup(self):
        """Creates the tables; their parameters are the piece's own."""
        row, settings = self.row, self.settings
        sizes = row.vocabulary, row.features, row.positions, row.segments
        self.tables = Embeddings(*sizes, settings.dropout, settings.epsilon)
        nn.share_scope(self, self.tables)

    def __call__(self, x, *, train: bool):
        """Returns the embeddings of token sequences."""
        row = self.row
        sizes = Sizes(row.vocabulary, row.segments, row.positions)
        text = text_inputs(x, sizes=sizes, network="elastic_squeezebert")
        y = self.tables(text.tokens, text.segments, at=text.position_ids, train=train)
        value = {"hidden": y}
        if text.attended is not None:
            value["attended"] = text.attended.astype(y.dtype)
        return Output(value, {"embeddings": y})


class Shape(NamedTuple):
    """The sizes and numbers of groups of a layer, and the sizes of the largest network.

    Attributes:
      row: the variant.
      heads, ffn: numbers of heads and of hidden channels of the feed-forward network.
      groups: numbers of groups of the convolutions.
      shuffle: whether a grouped layer after attention reads channels of every group of the values.
    """

    row: Row
    heads: int
    ffn: int
    groups: Groups
    shuffle: bool

    def head_axis(self) -> Axis:
        """Returns the channels of queries, keys and values."""
        row, unit = self.row, self.row.features // self.row.heads[-1]
        blocks = math.gcd(*row.heads)
        return Axis("heads", row.features, self.heads * unit, blocks, unit)

    def read_axis(self) -> Axis:
        """Returns the channels that the layer after attention reads."""
        axis, groups = self.head_axis(), self.groups
        if self.shuffle and groups.output > 1:
            return axis._replace(shuffle=(groups.value, groups.output))
        return axis

    def ffn_axis(self) -> Axis:
        """Returns the hidden channels of the feed-forward network."""
        return Axis("ffn", self.row.ffn[-1], self.ffn, BLOCKS)


def _layer(shape: Shape, settings: Settings) -> dict[str, nn.Module]:
    """Returns the modules of a layer, {name: module} in order; names and parameters are those of `encoder.Layer`."""
    features, groups, heads = shape.row.features, shape.groups, shape.head_axis()
    projections = {
        f"attention/{role}": encoder_pieces.Project(
            role, heads.count, getattr(groups, role), heads
        )
        for role in ("query", "key", "value")
    }
    ffn, add_norm = shape.ffn_axis(), partial(encoder_pieces.AddNorm, settings.dropout, settings.epsilon)  # fmt: skip
    return projections | {
        "attention/output": encoder_pieces.Attend(
            features,
            shape.heads,
            groups.output,
            shape.read_axis(),
            settings.attention_dropout,
        ),
        "attention_norm": add_norm(last=False),
        "ffn_in": encoder_pieces.Hidden(
            shape.ffn, groups.ffn_in, ffn, settings.activation
        ),
        "ffn_out": encoder_pieces.Reduce(features, groups.ffn_out, ffn),
        "ffn_norm": add_norm(last=True),
    }


class Pooler(nn.Module):
    """BERT's pooler of the first token; it adds "pooled" [b, d] to {"hidden", "attended"}."""

    endpoints = ("pooled",)

    def setup(self):
        """Creates the layer; its parameters are the piece's own."""
        self.pooler = heads.Pooler()
        nn.share_scope(self, self.pooler)

    def __call__(self, x, *, train: bool):
        """Applies the pooler."""
        del train
        pooled = self.pooler(x["hidden"])
        return Output(x | {"pooled": pooled}, {"pooled": pooled})


class Head(nn.Module):
    """The head of a task, see `heads.Head`; it reads {"hidden", "attended", "pooled"}."""

    task: str
    num_classes: int | None
    dropout: float

    def setup(self):
        """Creates the head; its parameters are the piece's own."""
        dropout = self.dropout if self.task in ("classification", "tokens") else 0.0
        self.head = heads.Head(self.task, self.num_classes, 0, dropout=dropout)
        nn.share_scope(self, self.head)

    def __call__(self, x, *, train: bool):
        """Returns the logits."""
        return self.head(x["hidden"], x.get("pooled"), lambda rows: rows, train=train)


@registry.options(
    OPTIONS, without=("layers", "features", "heads", "ffn_features", "dtype")
)
def make(
    variant: str = "base",
    *,
    depth: tuple[Count, ...] | Count | None = None,
    heads: tuple[Count, ...] | Count | None = None,
    ffn: tuple[Count, ...] | Count | None = None,
    query_groups: tuple[Count, ...] | Count | None = None,
    key_groups: tuple[Count, ...] | Count | None = None,
    value_groups: tuple[Count, ...] | Count | None = None,
    output_groups: tuple[Count, ...] | Count | None = None,
    ffn_in_groups: tuple[Count, ...] | Count | None = None,
    ffn_out_groups: tuple[Count, ...] | Count | None = None,
    shuffle: bool = False,
    distinct: Layers | None = None,
    task: Task = "classification",
    **options: Any,
) -> Chain:
    """Builds a network of the space.

    Args:
      variant: a row of VARIANTS.
      depth: number of layers; None for the largest. Values of the other options for layers beyond it are not used.
      heads: number of heads: one for all layers, or one for each layer of the largest network; None for the largest.
      ffn: hidden channels of the feed-forward networks, likewise.
      query_groups, key_groups, value_groups, output_groups: numbers of groups of attention's projections: one for all layers,
        or one for each; None for 1, which is the largest.
      ffn_in_groups, ffn_out_groups: numbers of groups of the two layers of the feed-forward networks, likewise.
      shuffle: whether a grouped layer after attention reads channels of every group of the values.
      distinct: number of layers with their own weights, each used several times in a row as in ALBERT; then all elastic
        options except `depth` have one value for each of these. None for weights in each layer.
      task: see `heads.Head`.
      **options: see `_encoder.Options`.

    Raises:
      UserError: the variant or activation is unknown, `distinct` exceeds the number of layers, or an option has the wrong
        number of values or a value outside the space.
    """
    shared = OPTIONS._replace(**options)
    row = registry.row(VARIANTS, variant, "variant of elastic_squeezebert")
    settings = _encoder.settings(shared)
    values = one_per_position(
        elastic(variant, distinct),
        dict(
            depth=depth,
            heads=heads,
            ffn=ffn,
            query_groups=query_groups,
            key_groups=key_groups,
            value_groups=value_groups,
            output_groups=output_groups,
            ffn_in_groups=ffn_in_groups,
            ffn_out_groups=ffn_out_groups,
        ),
    )
    row = encoder.with_sizes(
        row, vocabulary=shared.vocabulary, positions=shared.positions
    )
    groups = map(Groups, *(values[name] for name in _GROUP_OPTIONS))
    layers = zip(values["heads"], values["ffn"], groups, strict=True)
    modules = [_layer(Shape(row, *sizes, shuffle), settings) for sizes in layers]
    pieces = [Piece("embeddings", Tables(row, settings))]
    for number in range(values["depth"][0]):
        place = number * len(modules) // row.depth[-1]
        first = -(-place * row.depth[-1] // len(modules))  # layer with these weights
        for name, module in modules[place].items():
            owner = None if number == first else f"layer{first + 1}/{name}"
            piece = Piece(f"layer{number + 1}/{name}", module, owner, f"{number + 1}")
            pieces.append(piece)
    if _encoder.has_pooler(task, None, shared.num_classes, Task):
        pieces.append(Piece("pooler", Pooler()))
    task = "features" if shared.num_classes is None else task
    head = Head(task, shared.num_classes, settings.head_dropout)
    return Chain((*pieces, Piece("head", head)))


def elastic(
    variant: str = "base", distinct: int | None = None, **_
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the space: for each elastic option of `make`, the choices of each of its values, in ascending order of size.

    Raises:
      UserError: the variant is unknown, or `distinct` exceeds the number of layers.
    """
    row = registry.row(VARIANTS, variant, "variant of elastic_squeezebert")
    layers = row.depth[-1]
    if distinct is not None and not 1 <= distinct <= layers:
        raise UserError(
            f"distinct = {distinct}: should be from 1 to the number of layers, {layers}"
        )
    count = distinct or layers
    return {
        "depth": (row.depth,),
        "heads": (row.heads,) * count,
        "ffn": (row.ffn,) * count,
        **dict.fromkeys(_GROUP_OPTIONS, (GROUPS,) * count),
    }
