"""DistilBERT: a BERT with half the layers, distilled from BERT.

Sanh, Debut, Chaumond, Wolf 2019, arXiv 1910.01108, section 3: the layers are BERT's, and every second one is omitted. It has
no segments and no pooler. A classifier has its own layer on the first token, with a ReLU. All normalisations have an epsilon
of 1e-12, which config.json cannot change. The input's segments are ignored. Dropout acts where BERT has it; the class in
`transformers` has none before the residual sum after attention.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Row, Settings, layer_names
from squeeze_jax.nn.heads import check_task
from squeeze_jax.ranges import Rate
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(head_dropout=0.2)
HUGGINGFACE = huggingface.Family(
    "distilbert",
    prefix="distilbert",
    classes={
        "features": "DistilBertModel",
        "masked_lm": "DistilBertForMaskedLM",
        "classification": "DistilBertForSequenceClassification",
        "tokens": "DistilBertForTokenClassification",
        "span": "DistilBertForQuestionAnswering",
        "choice": "DistilBertForMultipleChoice",
    },
    pooled=(),
    heads=(
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "pre_classifier",
        "classifier",
        "qa_outputs",
    ),
    tied={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
    conv1d=False,
)

VARIANTS = {
    "base": Row(6, 768, 12, 3072, segments=0),
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40, segments=0),  # for tests
}

Task = Literal["features", "masked_lm", "classification", "tokens", "span", "choice"]
# {key of config.json: option}
_KEYS = {
    "n_layers": "layers",
    "dim": "features",
    "n_heads": "heads",
    "hidden_dim": "ffn_features",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "activation": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "seq_classif_dropout": "head_dropout",
    "qa_dropout": "span_dropout",
}
_EPSILON = 1e-12  # epsilon of the class in transformers
_SEQUENCE = {"head/transform": "pre_classifier", "head/classifier": "classifier"}
_HEAD_NAMES = {
    **bert.HEAD_NAMES,
    "masked_lm": {
        "head/masked_lm": "vocab_projector",  # its bias
        "head/masked_lm/transform": "vocab_transform",
        "head/masked_lm/norm": "vocab_layer_norm",
    },
    "classification": _SEQUENCE,
    "choice": _SEQUENCE,
}


class DistilBert(nn.Module):
    """The DistilBERT network; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`.

    Attributes:
      span_dropout: dropout rate before the layer that scores the ends of a span.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    span_dropout: float = 0.1

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        rates = {"span": self.span_dropout, "tokens": self.settings.dropout}
        dropout = rates.get(self.task, self.settings.head_dropout)
        head = _encoder.head(self, summary="relu", dropout=dropout)
        tables, blocks = _encoder.embeddings(self), _encoder.layers(self)
        return _encoder.encode(self, x, tables, blocks, head, train=train)


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    span_dropout: Rate = 0.1,
    **options: Any,
) -> DistilBert:
    """Builds a DistilBERT.

    Args:
      variant: a row of VARIANTS.
      task: see `_encoder.Head`.
      span_dropout: dropout rate before the last layer of the task span.
      **options: see `_encoder.Options`; head_dropout acts in the tasks classification and choice, `dropout` in the task tokens.

    Raises:
      UserError: the variant, task or activation is unknown, or the heads do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.row_and_settings(VARIANTS, variant, "distilbert", shared)
    check_task(task, Task)
    return DistilBert(row, task, shared.num_classes, False, settings, span_dropout)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json."""
    return huggingface.options_from_config(config, _KEYS)


def to_huggingface(net: DistilBert) -> dict[str, Any]:
    """Returns the entries of config.json for a network.

    Raises:
      UserError: the network's epsilon differs from that of the class in `transformers`.
    """
    if net.settings.epsilon != _EPSILON:
        raise UserError(
            f"transformers' DistilBERT normalises with {_EPSILON}, whatever its config says: not with epsilon ="
            f" {net.settings.epsilon}"
        )
    return huggingface.config_from_net(net, _KEYS)


def huggingface_names(net: DistilBert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    parts = {
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "ffn_in": "ffn.lin1",
        "ffn_out": "ffn.lin2",
        "ffn_norm": "output_layer_norm",
    }
    layers = layer_names(parts, net.row.layers, "transformer.layer")
    return bert.OUTER_NAMES | layers | _HEAD_NAMES[net.task]
