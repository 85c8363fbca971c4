"""BERT: a transformer's encoder, trained to fill in masked words from both sides.

Devlin, Chang, Lee, Toutanova 2018, arXiv 1810.04805: `base` and `large`. Turc, Chang, Lee, Toutanova 2019, arXiv
1908.08962: the smaller ones, better than their size when they are pretrained before they are distilled. Variants differ
in layers and channels alone. Words, positions and segments are embedded and summed; each layer is attention and a
feed-forward network over all tokens [b, l, d]; a task reads all of them or the pooled first one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.nn import activations, encoder
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.embed import Embeddings, text
from squeeze_jax.nn.heads import POOLED, Head, Pooler, Task, pooled
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
HUGGINGFACE = huggingface.Family(
    "bert",
    prefix="bert",
    classes={
        "features": "BertModel",
        "masked_lm": "BertForMaskedLM",
        "next_sentence": "BertForNextSentencePrediction",
        "pretraining": "BertForPreTraining",
        "classification": "BertForSequenceClassification",
        "tokens": "BertForTokenClassification",
        "span": "BertForQuestionAnswering",
        "choice": "BertForMultipleChoice",
    },
    pooled=POOLED,
    heads=("cls.predictions", "cls.seq_relationship", "classifier", "qa_outputs"),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    conv1d=False,
)


class Row(NamedTuple):
    """A variant: L, H, A of the paper, the feed-forward network's channels, and the sizes of the three embeddings."""

    layers: int
    features: int
    heads: int
    ffn_features: int
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2


VARIANTS = {
    "large": Row(24, 1024, 16, 4096),  # 1810.04805, section 3
    "base": Row(12, 768, 12, 3072),
    "medium": Row(8, 512, 8, 2048),  # 1908.08962, Table 1
    "small": Row(4, 512, 8, 2048),
    "mini": Row(4, 256, 4, 1024),
    "tiny": Row(2, 128, 2, 512),
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40),  # for tests
}


class Bert(nn.Module):
    """The net; attributes as in `make`, and for SqueezeBERT the groups and the epsilon of each layer.

    Endpoints: embeddings, layer1, layer2, … [b, l, d], attention1, … (probabilities) and scores1, … (before the softmax)
    [b, heads, l, l], pooled [b, d] where there is a pooler.
    """

    row: Row
    task: Task
    num_classes: int
    activation: str
    epsilon: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    pooler: bool
    dtype: str
    groups: tuple[Groups, ...]
    layer_epsilon: float

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """x: {"tokens", "segments", "mask"} of [b, l], see `embed.text` → logits, see `heads.Head`, and endpoints."""
        row = self.row
        tokens, segments, mask = text(x, choices=self.task == "choice")
        embeddings = Embeddings(
            row.vocabulary,
            row.features,
            row.positions,
            row.segments,
            self.dropout,
            self.epsilon,
            jnp.dtype(self.dtype),
            name="embeddings",
        )
        layer = partial(
            encoder.Layer,
            row.heads,
            row.ffn_features,
            activation=self.activation,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            epsilon=self.layer_epsilon,
        )
        y = embeddings(tokens, segments, train=train)
        endpoints = {"embeddings": y}
        layers = [
            layer(groups=groups, name=f"layer{n}")
            for n, groups in enumerate(self.groups, 1)
        ]
        y, more = encoder.stack(layers, y, mask, train=train)
        endpoints |= more
        if self.pooler:
            endpoints["pooled"] = Pooler(name="pooler")(y)
        head = Head(
            self.task,
            self.num_classes,
            row.features,
            self.activation,
            self.epsilon,
            self.head_dropout,
            name="head",
        )
        choices = x["tokens"].shape[1]
        logits = head(
            y,
            endpoints.get("pooled"),
            embeddings.scores,
            choices=choices,
            train=train,
        )
        return logits, endpoints


def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    num_classes: int = 2,
    layers: int | None = None,
    features: int | None = None,
    heads: int | None = None,
    ffn_features: int | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
    segments: int | None = None,
    activation: str = "gelu",
    epsilon: float = 1e-12,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    head_dropout: float | None = None,
    pooler: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Bert:
    """Builds a BERT.

    Args:
      variant: a row of VARIANTS.
      task: what the head is for, see `heads.Head`.
      num_classes: outputs of the tasks classification (1: regression) and tokens.
      layers, features, heads, ffn_features: instead of the variant's; heads divide features.
      vocabulary, positions, segments: sizes of the embeddings instead of the variant's.
      activation: of the feed-forward networks, a name of `activations.ACTIVATIONS`.
      epsilon: of all normalisations.
      dropout: rate after embeddings and before residual sums, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: rate on attention's probabilities.
      head_dropout: rate before a classifier; None for `dropout`.
      pooler: whether there is one; None where the task needs one.
      dtype: of everything between the embeddings and the logits; parameters and logits are float32.

    Raises:
      UserError: unknown variant, task or activation, or heads that do not divide the features.
    """
    row = registry.row(VARIANTS, variant, "variant of bert")
    row = encoder.resized(
        row,
        layers=layers,
        features=features,
        heads=heads,
        ffn_features=ffn_features,
        vocabulary=vocabulary,
        positions=positions,
        segments=segments,
    )
    encoder.check(row.features, row.ffn_features, row.heads)
    activations.named(activation)
    return Bert(
        row,
        task,
        num_classes,
        activation,
        epsilon,
        dropout,
        attention_dropout,
        dropout if head_dropout is None else head_dropout,
        pooled(task, pooler),
        dtype,
        groups=(Groups(),) * row.layers,
        layer_epsilon=epsilon,
    )


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make` from a folder's config.json."""
    return huggingface.options(config)


def to_huggingface(net: Bert) -> dict[str, Any]:
    """What config.json says of a net."""
    return huggingface.config(net)


def huggingface_names(net: Bert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    parts = {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    names = outer_names(net.task)
    for number in range(net.row.layers):
        for ours, theirs in parts.items():
            names[f"layer{number + 1}/{ours}"] = f"encoder.layer.{number}.{theirs}"
    return names


def outer_names(task: Task) -> dict[str, str]:
    """The part of `huggingface_names` that is not the layers'."""
    names = {
        "embeddings/tokens": "embeddings.word_embeddings",
        "embeddings/positions": "embeddings.position_embeddings",
        "embeddings/segments": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
        "pooler/dense": "pooler.dense",
    }
    masked_lm = {
        "head/masked_lm": "cls.predictions",  # its bias
        "head/masked_lm/transform": "cls.predictions.transform.dense",
        "head/masked_lm/norm": "cls.predictions.transform.LayerNorm",
    }
    next_sentence = {"head/next_sentence": "cls.seq_relationship"}
    match task:
        case "features":
            return names
        case "masked_lm":
            return names | masked_lm
        case "next_sentence":
            return names | next_sentence
        case "pretraining":
            return names | masked_lm | next_sentence
        case "span":
            return names | {"head/span": "qa_outputs"}
    return names | {"head/classifier": "classifier"}
