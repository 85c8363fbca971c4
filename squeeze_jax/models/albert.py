"""ALBERT: one layer's weights for all layers of BERT, and embeddings that are narrower than the layers.

Lan, Chen, Goodman, Gimpel, Sharma, Soricut 2019, arXiv 1909.11942, Table 1. Sharing saves weights and no computation. A
fully connected layer widens the embeddings of 128 channels. Instead of next sentences it learns the order of two: the
task "next_sentence". Sizes, activation and rates are those of the second release, which is without dropout except before
classifiers, and whose `xlarge` has 16 heads. Where there is some, it acts as in the paper's code; the class in
`transformers` drops nothing before the residual sum after the feed-forward network.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Row, Settings, layer_names
from squeeze_jax.nn.heads import POOLED, Task
from squeeze_jax.ranges import Count, Layers, Whole
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(
    activation="gelu_tanh", dropout=0.0, attention_dropout=0.0, head_dropout=0.1
)
HUGGINGFACE = huggingface.Family(
    "albert",
    prefix="albert",
    classes={
        "features": "AlbertModel",
        "masked_lm": "AlbertForMaskedLM",
        "pretraining": "AlbertForPreTraining",
        "classification": "AlbertForSequenceClassification",
        "tokens": "AlbertForTokenClassification",
        "span": "AlbertForQuestionAnswering",
        "choice": "AlbertForMultipleChoice",
    },
    pooled=POOLED,
    heads=("predictions", "sop_classifier", "classifier", "qa_outputs"),
    tied={
        "predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    conv1d=False,
)

_OWN = {"vocabulary": 30000, "embedding_features": 128}
VARIANTS = {
    "xxlarge": Row(12, 4096, 64, 16384, **_OWN),
    "xlarge": Row(24, 2048, 16, 8192, **_OWN),
    "large": Row(24, 1024, 16, 4096, **_OWN),
    "base": Row(12, 768, 12, 3072, **_OWN),
    # for tests
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40, embedding_features=16),
}

# {key of config.json: option}
_KEYS = {k: v for k, v in huggingface.BERT_KEYS.items() if k != "classifier_dropout"}
_KEYS |= {
    "classifier_dropout_prob": "head_dropout",
    "embedding_size": "embedding_features",
    "num_hidden_groups": "distinct",
}
# What its class has where config.json says nothing: the sizes of `xxlarge`.
_UNSAID = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
}
_MASKED_LM = {
    "head/masked_lm": "predictions",  # its bias
    "head/masked_lm/transform": "predictions.dense",
    "head/masked_lm/norm": "predictions.LayerNorm",
}
_ORDER = {"head/next_sentence": "sop_classifier.classifier"}
_HEAD_NAMES = {
    **bert.HEAD_NAMES,
    "masked_lm": _MASKED_LM,
    "next_sentence": _ORDER,
    "pretraining": _MASKED_LM | _ORDER,
}


class Albert(nn.Module):
    """The net; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`.

    Attributes:
      distinct: layers with weights of their own.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    distinct: int = 1

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Logits and endpoints, see `_encoder.encode`."""
        count = self.row.layers
        own = [_encoder.layer(self, n) for n in range(1, self.distinct + 1)]
        whole = self.task in ("next_sentence", "pretraining")
        changes = {"dropout": self.settings.head_dropout} if whole else {}
        return _encoder.encode(
            self,
            x,
            _encoder.embeddings(self),
            [own[n * self.distinct // count] for n in range(count)],
            _encoder.head(self, **changes),
            train=train,
            widen=_encoder.project,
        )


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    distinct: Layers = 1,
    segments: Whole | None = None,
    embedding_features: Count | None = None,
    pooler: bool | None = None,
    **options: Any,
) -> Albert:
    """Builds an ALBERT.

    Args:
      variant: a row of VARIANTS.
      task, segments, pooler: see `bert.make`.
      distinct: layers with weights of their own, at most `layers`; each is used several times in a row.
      embedding_features: channels of the embeddings instead of the variant's.
      **options: see `Options`; head_dropout acts also before the order of two sentences.

    Raises:
      UserError: unknown variant, task or activation, heads that do not divide the features, or more distinct layers than
        layers.
    """
    shared = OPTIONS._replace(**options)
    sizes = {"segments": segments, "embedding_features": embedding_features}
    row, settings = _encoder.chosen(VARIANTS, variant, "albert", shared, **sizes)
    if not 1 <= distinct <= row.layers:
        raise UserError(
            f"distinct = {distinct}: should be from 1 to the number of layers, {row.layers}"
        )
    pooler = _encoder.has_pooler(task, pooler, shared.num_classes)
    return Albert(row, task, shared.num_classes, pooler, settings, distinct)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make` from a folder's config.json.

    Raises:
      UserError: several layers in a group.
    """
    only = huggingface.ONLY | {"inner_group_num": 1}
    return huggingface.options({**_UNSAID, **config}, _KEYS, only)


def to_huggingface(net: Albert) -> dict[str, Any]:
    """What config.json says of a net."""
    return huggingface.config(net, _KEYS)


def huggingface_names(net: Albert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    parts = {
        "attention/query": "attention.query",
        "attention/key": "attention.key",
        "attention/value": "attention.value",
        "attention/output": "attention.dense",
        "attention_norm": "attention.LayerNorm",
        "ffn_in": "ffn",
        "ffn_out": "ffn_output",
        "ffn_norm": "full_layer_layer_norm",
    }
    parts = {ours: f"albert_layers.0.{theirs}" for ours, theirs in parts.items()}
    names = {"project": "encoder.embedding_hidden_mapping_in", "pooler/dense": "pooler"}
    layers = layer_names(parts, net.distinct, "encoder.albert_layer_groups")
    return bert.OUTER_NAMES | names | layers | _HEAD_NAMES[net.task]
