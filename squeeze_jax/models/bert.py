"""BERT: a transformer encoder, pretrained to predict masked tokens from both sides of their context.

Devlin, Chang, Lee, Toutanova 2018, arXiv 1810.04805: `base` and `large`. Turc, Chang, Lee, Toutanova 2019, arXiv
1908.08962: the smaller variants, which are better for their size if they are pretrained before they are distilled. Jiao et
al. 2019, arXiv 1909.10351: the two TinyBERTs, distilled from the teacher's embeddings, layers and attention scores before the
softmax; these are the endpoints embeddings, layer1, … and scores1, …. Variants differ only in their sizes. Embeddings of
tokens, positions and segments are added. Each layer is attention and a feed-forward network over all tokens [b, l, d]. A
task's head reads all tokens or the pooled first one.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models import _encoder
from squeeze_jax.models._encoder import Options, Row, Settings, layer_names
from squeeze_jax.nn.heads import POOLED, Task
from squeeze_jax.ranges import Whole
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options()
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
    # The last two are TinyBERT's; they project its hidden states to the teacher's width in training.
    heads=(
        "cls.predictions",
        "cls.seq_relationship",
        "classifier",
        "qa_outputs",
        "fit_dense",
        "fit_denses",
    ),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    conv1d=False,
)


VARIANTS = {
    "large": Row(24, 1024, 16, 4096),  # 1810.04805, section 3
    "base": Row(12, 768, 12, 3072),
    "medium": Row(8, 512, 8, 2048),  # 1908.08962, Table 1
    "small": Row(4, 512, 8, 2048),
    "mini": Row(4, 256, 4, 1024),
    "tiny": Row(2, 128, 2, 512),
    "tinybert4": Row(4, 312, 12, 1200),  # 1909.10351, section 4.1: TinyBERT
    "tinybert6": Row(6, 768, 12, 3072),
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40),  # for tests
}

# {our layer: its name in the checkpoints of `transformers`}, outside the numbered layers and for each task's head.
OUTER_NAMES = {
    "embeddings/tokens": "embeddings.word_embeddings",
    "embeddings/positions": "embeddings.position_embeddings",
    "embeddings/segments": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "pooler/dense": "pooler.dense",
}
_MASKED_LM = {
    "head/masked_lm": "cls.predictions",  # its bias
    "head/masked_lm/transform": "cls.predictions.transform.dense",
    "head/masked_lm/norm": "cls.predictions.transform.LayerNorm",
}
_NEXT_SENTENCE = {"head/next_sentence": "cls.seq_relationship"}
_CLASSIFIER = {"head/classifier": "classifier"}
HEAD_NAMES = {
    "features": {},
    "masked_lm": _MASKED_LM,
    "next_sentence": _NEXT_SENTENCE,
    "pretraining": _MASKED_LM | _NEXT_SENTENCE,
    "classification": _CLASSIFIER,
    "tokens": _CLASSIFIER,
    "span": {"head/span": "qa_outputs"},
    "choice": _CLASSIFIER,
}


class Bert(nn.Module):
    """The BERT network; for inputs and endpoints see `_encoder.encode`.

    Attributes:
      row: sizes of the network.
      task, num_classes: see `heads.Head`.
      pooler: whether the network has a pooler.
      settings: see `_encoder.Settings`.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        tables, blocks = _encoder.embeddings(self), _encoder.layers(self)
        return _encoder.encode(
            self, x, tables, blocks, _encoder.head(self), train=train
        )


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    segments: Whole | None = None,
    pooler: bool | None = None,
    **options: Any,
) -> Bert:
    """Builds a BERT.

    Args:
      variant: a row of VARIANTS.
      task: see `_encoder.Head`.
      segments: rows of the table of segments that replace the variant's; 0 for no segments.
      pooler: whether the network has a pooler; None for one if the task needs it.
      **options: see `_encoder.Options`.

    Raises:
      UserError: the variant, task or activation is unknown, or the heads do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.row_and_settings(
        VARIANTS, variant, "bert", shared, segments=segments
    )
    pooler = _encoder.has_pooler(task, pooler, shared.num_classes)
    return Bert(row, task, shared.num_classes, pooler, settings)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json."""
    return huggingface.options_from_config(config)


def to_huggingface(net: Bert) -> dict[str, Any]:
    """Returns the entries of config.json for a network."""
    return huggingface.config_from_net(net)


def huggingface_names(net: Bert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    return encoder_names(net.row.layers) | HEAD_NAMES[net.task]


def encoder_names(layers: int) -> dict[str, str]:
    """Returns `huggingface_names` without the heads."""
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
    return OUTER_NAMES | layer_names(parts, layers, "encoder.layer")
