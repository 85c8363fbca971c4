"""BERT: a transformer's encoder, trained to fill in masked words from both sides.

Devlin, Chang, Lee, Toutanova 2018, arXiv 1810.04805: `base` and `large`. Turc, Chang, Lee, Toutanova 2019, arXiv
1908.08962: the smaller ones, better than their size when they are pretrained before they are distilled. Jiao et al. 2019,
arXiv 1909.10351: TinyBERT's two, distilled from the teacher's embeddings, layers and attention before the softmax, which
are the endpoints embeddings, layer1, … and scores1, …. Variants differ in layers and channels alone. Words, positions and
segments are embedded and summed; each layer is attention and a feed-forward network over all tokens [b, l, d]; a task
reads all of them or the pooled first one.
"""

from collections.abc import Mapping
from typing import Any, Literal

from squeeze_jax.models._encoder import Encoder, Row, layer_names, sized
from squeeze_jax.nn.heads import POOLED, Task, pooled
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
    # The last two are TinyBERT's, which take its hidden states to the teacher's width in training.
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

# {our layer: its name in the checkpoints of `transformers`}: what is around the layers, and each task's head.
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


class Bert(Encoder):
    """The net; attributes and endpoints as in `Encoder`."""


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
    row = sized(
        VARIANTS,
        variant,
        "bert",
        activation,
        layers=layers,
        features=features,
        heads=heads,
        ffn_features=ffn_features,
        vocabulary=vocabulary,
        positions=positions,
        segments=segments,
    )
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
    )


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make` from a folder's config.json."""
    return huggingface.options(config)


def to_huggingface(net: Bert) -> dict[str, Any]:
    """What config.json says of a net."""
    return huggingface.config(net)


def huggingface_names(net: Bert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    return encoder_names(net.row.layers) | HEAD_NAMES[net.task]


def encoder_names(layers: int) -> dict[str, str]:
    """The part of `huggingface_names` without the heads."""
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
