"""ALBERT: a BERT whose layers share one set of weights, with embeddings that are narrower than the layers.

Lan, Chen, Goodman, Gimpel, Sharma, Soricut 2019, arXiv 1909.11942, Table 1. Sharing reduces parameters but not computation.
A fully connected layer widens the embeddings of 128 channels. Instead of next-sentence prediction, ALBERT learns the order of
two sentences: the task "next_sentence". Sizes, activation and dropout rates are those of the second release, which has
dropout only before classifiers, and whose `xlarge` has 16 heads. If dropout is set, it acts as in the paper's code; the class
in `transformers` has no dropout before the residual sum after the feed-forward network.
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
# Defaults of its class in `transformers` for keys that config.json lacks: the sizes of `xxlarge`.
_DEFAULTS = {
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
    """The ALBERT network; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`.

    Attributes:
      distinct: number of layers with their own weights.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    distinct: int = 1

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        count = self.row.layers
        distinct = [_encoder.layer(self, n) for n in range(1, self.distinct + 1)]
        scores_order = self.task in ("next_sentence", "pretraining")
        changes = {"dropout": self.settings.head_dropout} if scores_order else {}
        return _encoder.encode(
            self,
            x,
            _encoder.embeddings(self),
            [distinct[n * self.distinct // count] for n in range(count)],
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
      distinct: number of layers with their own weights, at most `layers`; each is used several times in a row.
      embedding_features: channels of the embeddings that replace the variant's.
      **options: see `_encoder.Options`; head_dropout acts also before the classifier of the sentence order.

    Raises:
      UserError: the variant, task or activation is unknown, the heads do not divide the features, or `distinct` exceeds the
        number of layers.
    """
    shared = OPTIONS._replace(**options)
    sizes = {"segments": segments, "embedding_features": embedding_features}
    row, settings = _encoder.row_and_settings(
        VARIANTS, variant, "albert", shared, **sizes
    )
    if not 1 <= distinct <= row.layers:
        raise UserError(
            f"distinct = {distinct}: should be from 1 to the number of layers, {row.layers}"
        )
    pooler = _encoder.has_pooler(task, pooler, shared.num_classes)
    return Albert(row, task, shared.num_classes, pooler, settings, distinct)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json.

    Raises:
      UserError: a group has several layers, or config.json has another unsupported value.
    """
    only = huggingface.ONLY | {"inner_group_num": 1}
    return huggingface.options_from_config({**_DEFAULTS, **config}, _KEYS, only)


def to_huggingface(net: Albert) -> dict[str, Any]:
    """Returns the entries of config.json for a network."""
    return huggingface.config_from_net(net, _KEYS)


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
