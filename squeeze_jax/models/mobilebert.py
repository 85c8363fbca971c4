"""MobileBERT: as deep as BERT-large, with layers inside bottlenecks.

Sun, Yu, Song, Liu, Yang, Zhou 2020, arXiv 2004.02984. There are 512 channels between layers and 128 inside them: fully
connected layers narrow and widen the hidden states. Attention reads the wide input; to balance it, a layer has several small
feed-forward networks. Token embeddings are narrow, and three neighbouring ones are read together. A scale and a bias replace
normalisations. `teacher` is the paper's IB-BERT, the same architecture with wide insides. MobileBERT is trained to match its
feature maps (layer1, …) and attention (attention1, …), layer by layer. `tiny` is the smaller network of Table 1.

The class in `transformers`, whose folders are read and written here, has these properties:
  * A token's neighbours are read before attention, so a sequence's last token depends on the padding after it, whatever the
    mask is. Pad as in training; with trigram=False nothing depends on the padding.
  * With layer normalisation it ignores the config's epsilon after the embeddings and after the last feed-forward network, and
    uses 1e-5 there: here `ffn_epsilon`.
  * Its queries and keys cannot come from the wide input (`teacher`) unless that is as wide as the bottleneck.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Settings, layer_names
from squeeze_jax.nn import encoder
from squeeze_jax.nn.attention import Attended, attend
from squeeze_jax.nn.blocks import residual_sum
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.heads import Task
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.layer_norm import Normalization, norm
from squeeze_jax.ranges import Count, Positive, Range, Whole
from squeeze_jax.weights import huggingface, weight_files

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(dropout=0.0)
AttentionInput = Literal["shared", "narrow", "wide"]


class Row(NamedTuple):
    """The sizes of a variant in Table 1 of the paper, see `make`; `narrow` are the channels inside a layer."""

    layers: int
    features: int
    heads: int
    ffn_features: int
    narrow: int
    stacks: int
    embedding_features: int
    attention_input: AttentionInput = "shared"
    normalization: Normalization = "no_norm"
    activation: str = "relu"
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2


VARIANTS = {
    "base": Row(24, 512, 4, 512, 128, 4, 128),
    "tiny": Row(24, 512, 4, 512, 128, 2, 128, "narrow"),
    "teacher": Row(24, 512, 4, 4096, 1024, 1, 128, "wide", "layer_norm", "gelu"),
    "toy": Row(1, 32, 4, 24, 16, 2, 16, vocabulary=99, positions=40),
}


# The masked-LM head's matrix for channels beyond those of the embeddings; `transformers` stores it even if it is empty.
_UNTIED = "cls.predictions.dense.weight"


def _unpack(arrays: weight_files.Arrays, net: "MobileBert") -> weight_files.Arrays:
    """Converts the embeddings' layer over three tokens to a convolution, and transposes the head's untied matrix."""
    unpacked = dict(arrays)
    name = "embeddings.embedding_transformation.weight"
    channels = 3 * net.row.embedding_features
    if net.trigram and np.shape(unpacked.get(name))[1:] == (channels,):
        # Its channels are those of the next, the current and the previous token.
        taps = unpacked[name].reshape(len(unpacked[name]), 3, -1)
        unpacked[name] = taps[:, ::-1].swapaxes(1, 2)
    if np.size(unpacked.get(_UNTIED, 1)) == 0:  # embeddings as wide as the layers
        del unpacked[_UNTIED]
    return _transpose_untied(unpacked)


def _pack(arrays: weight_files.Arrays, net: "MobileBert") -> weight_files.Arrays:
    """Returns arrays in MobileBERT's layout: the inverse of `_unpack`."""
    packed = dict(arrays)
    for name, array in arrays.items():
        if name.endswith("embedding_transformation.weight") and array.ndim == 3:
            packed[name] = array.swapaxes(1, 2)[:, ::-1].reshape(len(array), -1)
    row, scores_tokens = net.row, net.task in ("masked_lm", "pretraining")
    if scores_tokens and row.features == row.embedding_features:
        packed[_UNTIED] = np.zeros((row.vocabulary, 0), np.float32)
    return _transpose_untied(packed)


def _transpose_untied(arrays):
    return arrays | ({_UNTIED: arrays[_UNTIED].T} if _UNTIED in arrays else {})


HUGGINGFACE = bert.HUGGINGFACE._replace(
    model_type="mobilebert",
    prefix="mobilebert",
    classes={task: f"Mobile{name}" for task, name in bert.HUGGINGFACE.classes.items()},
    unpack=_unpack,
    pack=_pack,
)
# {key of config.json: option}: BERT's and MobileBERT's own.
_KEYS = huggingface.BERT_KEYS | {
    "embedding_size": "embedding_features",
    "trigram_input": "trigram",
    "intra_bottleneck_size": "narrow",
    "num_feedforward_networks": "stacks",
    "normalization_type": "normalization",
    "classifier_activation": "pooler_layer",
}
_ONLY = huggingface.ONLY | {"use_bottleneck": True}
_FFN_EPSILON = 1e-5  # fixed epsilon of the class in transformers


class Layer(nn.Module):
    """A layer (section 3.1): attention and feed-forward networks inside a bottleneck.

    Attributes:
      heads: attention heads.
      features: channels inside the bottleneck.
      ffn_features: hidden channels of each feed-forward network.
      stacks: number of feed-forward networks.
      attention_input, normalization, activation: see `make`.
      dropout: dropout rate before the outer residual sum, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: dropout rate of the attention probabilities, 0 to 1.
      epsilon: epsilon of the layer normalisations, except the one after the last feed-forward network.
      ffn_epsilon: epsilon of the layer normalisation after the last feed-forward network.
    """

    heads: int
    features: int
    ffn_features: int
    stacks: int
    attention_input: AttentionInput
    normalization: Normalization
    activation: str
    dropout: float
    attention_dropout: float
    epsilon: float
    ffn_epsilon: float

    residual = True

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, Attended]:
        """Returns (hidden states [b, l, d], attention) for x [b, l, d] and a mask, bool [b, l], True for real tokens."""
        narrow = self._norm("narrow")(self._dense(x, "narrow"))
        query, value = {
            "shared": (x, x),
            "narrow": (narrow, narrow),
            "wide": (x, x),
        }[self.attention_input]
        if self.attention_input == "shared":
            query = self._norm("shared")(self._dense(x, "shared"))
        attended = attend(
            self._dense(query, "query"),
            self._dense(query, "key"),
            self._dense(value, "value"),
            heads=self.heads,
            head_features=self.features // self.heads,
            mask=mask,
            drop=partial(Dropout(self.attention_dropout), train=train),
            replace=partial(tap, self),
        )
        y = self._dense(attended.context, "output")
        y = self._norm("attention")(residual_sum(narrow, y, self, "output"))
        for n in range(1, self.stacks + 1):
            z = encoder.feed_forward(
                y, self.ffn_features, activation=self.activation, name=f"ffn{n}"
            )
            epsilon = self.ffn_epsilon if n == self.stacks else self.epsilon
            y = residual_sum(y, z, self, f"ffn{n}_out")
            y = self._norm(f"ffn{n}", epsilon)(y)
        drop = partial(Dropout(self.dropout), train=train)
        y = drop(self._dense(y, "wide", x.shape[-1]))
        return self._norm("wide")(residual_sum(x, y, self, "wide")), attended

    def _dense(self, x, name, features=None):
        features, init = features or self.features, encoder.KERNEL_INIT
        return Conv(features, (1,), dtype=x.dtype, kernel_init=init, name=name)(x)

    def _norm(self, name, epsilon=None):
        epsilon = self.epsilon if epsilon is None else epsilon
        return norm(self.normalization, epsilon, name=f"{name}_norm")


class MobileBert(nn.Module):
    """The MobileBERT network; endpoints as in `_encoder.encode`.

    Attributes:
      row, task, num_classes, pooler, settings: see `bert.Bert`.
      trigram, pooler_layer, ffn_epsilon: see `make`.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    trigram: bool = True
    pooler_layer: bool = True
    ffn_epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        row = self.row
        # A convolution over three tokens widens their narrow embeddings; positions and segments are added after it.
        tables = _encoder.embeddings(
            self,
            features=row.features,
            token_features=row.embedding_features,
            window=3 if self.trigram else 1,
            normalization=row.normalization,
            epsilon=self.ffn_epsilon,
        )
        # The masked-LM head has a matrix of its own for the channels beyond those of the embeddings.
        head = _encoder.head(self, untied=row.features - row.embedding_features)
        blocks = [self._layer(number) for number in range(1, row.layers + 1)]
        return _encoder.encode(self, x, tables, blocks, head, train=train, pool=_pool)

    @nn.nowrap
    def _layer(self, number: int) -> Layer:
        row, settings = self.row, self.settings
        return Layer(
            row.heads,
            row.narrow,
            row.ffn_features,
            row.stacks,
            row.attention_input,
            row.normalization,
            settings.activation,
            settings.dropout,
            settings.attention_dropout,
            settings.epsilon,
            self.ffn_epsilon,
            name=f"layer{number}",
        )


def _pool(net, y, mask):
    """Returns the first token's hidden state, with `pooler_layer` after a fully connected layer and tanh; or None."""
    if net.pooler and not net.pooler_layer:
        return y[:, 0]
    return _encoder.pool(net, y, mask)


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    narrow: Count | None = None,
    stacks: Annotated[int, Range(1, 64)] | None = None,
    embedding_features: Count | None = None,
    attention_input: AttentionInput | None = None,
    normalization: Normalization | None = None,
    segments: Whole | None = None,
    trigram: bool = True,
    activation: str | None = None,
    ffn_epsilon: Positive | None = None,
    pooler: bool | None = None,
    pooler_layer: bool = True,
    **options: Any,
) -> MobileBert:
    """Builds a MobileBERT.

    Args:
      variant: a row of VARIANTS.
      task, segments, pooler: see `bert.make`.
      narrow: channels inside a layer; heads must divide them.
      stacks: feed-forward networks in a layer.
      embedding_features: channels of the token embeddings, at most `features`.
      attention_input: input of queries and keys. "shared": the layer's input, narrowed by one more layer for both. "narrow":
        the layer's narrow features, which the values read too. "wide": the layer's input. Except with "narrow", values read
        the layer's input.
      normalization: "no_norm", a scale and a bias, or "layer_norm".
      trigram: whether a token's embedding is read with those of its two neighbours.
      activation: activation of the feed-forward networks and the masked-LM head; None for the variant's.
      ffn_epsilon: epsilon of the normalisations after the embeddings and the last feed-forward network; None for `epsilon`.
      pooler_layer: whether the pooler has a fully connected layer and tanh, or returns the first token unchanged.
      **options: see `_encoder.Options`; `features` are the channels between layers, and dropout acts before the residual
        sums there.

    Raises:
      UserError: the variant, task or activation is unknown, or the numbers of features do not fit each other.
    """
    shared = OPTIONS._replace(**options)
    row = registry.row(VARIANTS, variant, "variant of mobilebert")
    row = _encoder.replace_sizes(
        row,
        shared,
        narrow=narrow,
        stacks=stacks,
        embedding_features=embedding_features,
        segments=segments,
    )
    replacements = {
        "attention_input": attention_input,
        "normalization": normalization,
        "activation": activation,
    }
    row = row._replace(**{k: value for k, value in replacements.items() if value})
    if row.narrow % row.heads:
        raise UserError(
            f"narrow = {row.narrow} features do not divide into heads = {row.heads}"
        )
    if row.embedding_features > row.features:
        raise UserError(
            f"embedding_features = {row.embedding_features}: should be at most features = {row.features}"
        )
    settings = _encoder.settings(shared._replace(activation=row.activation))
    return MobileBert(
        row,
        task,
        shared.num_classes,
        _encoder.has_pooler(task, pooler, shared.num_classes),
        settings,
        trigram=trigram,
        pooler_layer=pooler_layer,
        ffn_epsilon=shared.epsilon if ffn_epsilon is None else ffn_epsilon,
    )


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json."""
    options = huggingface.options_from_config(config, _KEYS, _ONLY)
    if config.get("use_bottleneck_attention", False):
        options["attention_input"] = "narrow"
    elif not config.get("key_query_shared_bottleneck", True):
        options["attention_input"] = "wide"
    return options | {"ffn_epsilon": _FFN_EPSILON}


def to_huggingface(net: MobileBert) -> dict[str, Any]:
    """Returns the entries of config.json for a network.

    Raises:
      UserError: the class in `transformers` cannot compute the same as the network.
    """
    row = net.row
    if row.normalization == "layer_norm" and net.ffn_epsilon != _FFN_EPSILON:
        raise UserError(
            f"transformers' MobileBERT normalises embeddings and the last feed-forward network with epsilon"
            f" {_FFN_EPSILON} whatever its config says: not with ffn_epsilon = {net.ffn_epsilon}"
        )
    if row.attention_input == "wide" and row.narrow != row.features:
        raise UserError(
            f"transformers' MobileBERT reads queries of narrow = {row.narrow} features: with attention_input = 'wide' it"
            f" could not load features = {row.features}"
        )
    if not net.trigram and row.embedding_features == row.features:
        raise UserError(
            "transformers' MobileBERT without trigrams does not support embeddings as wide as the layers: save a network with"
            " another embedding_features"
        )
    return huggingface.config_from_net(net, _KEYS) | {
        "use_bottleneck": True,
        "use_bottleneck_attention": row.attention_input == "narrow",
        "key_query_shared_bottleneck": row.attention_input == "shared",
    }


def huggingface_names(net: MobileBert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    parts = {
        "narrow": "bottleneck.input.dense",
        "narrow_norm": "bottleneck.input.LayerNorm",
        "shared": "bottleneck.attention.dense",
        "shared_norm": "bottleneck.attention.LayerNorm",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "wide": "output.bottleneck.dense",
        "wide_norm": "output.bottleneck.LayerNorm",
    }
    stacks = net.row.stacks
    for n in range(1, stacks + 1):
        start = "" if n == stacks else f"ffn.{n - 1}."
        parts[f"ffn{n}_in"] = f"{start}intermediate.dense"
        parts[f"ffn{n}_out"] = f"{start}output.dense"
        parts[f"ffn{n}_norm"] = f"{start}output.LayerNorm"
    names = bert.OUTER_NAMES | bert.HEAD_NAMES[net.task]
    names["embeddings/widen"] = "embeddings.embedding_transformation"
    if "head/masked_lm" in names:
        names["head/masked_lm/untied"] = "cls.predictions.dense"
    return names | layer_names(parts, net.row.layers, "encoder.layer")
