"""ELECTRA: BERT's encoder as a discriminator, which finds the tokens of a text that a generator has replaced.

Clark, Luong, Le, Manning 2020, arXiv 2003.10555. Discriminators `small`, `base` and `large` (Table 6) learn the task
"replaced": one logit for each token. Their generators learn "masked_lm" and share the discriminators' embeddings. They have
fewer channels, by the table's multipliers of 1/4, 1/3 and 1/4, and one head per 64 channels. The released generator of
`small` is as large as `small` itself. There is no pooler: a classifier has its own layer on the first token, with a GELU. If
the embeddings are narrower than the layers, a fully connected layer widens them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Row, Settings
from squeeze_jax.nn.embed import Embeddings
from squeeze_jax.nn.heads import check_task
from squeeze_jax.ranges import Count, Whole
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options()
HUGGINGFACE = huggingface.Family(
    "electra",
    prefix="electra",
    classes={
        "features": "ElectraModel",
        "masked_lm": "ElectraForMaskedLM",
        "replaced": "ElectraForPreTraining",
        "classification": "ElectraForSequenceClassification",
        "tokens": "ElectraForTokenClassification",
        "span": "ElectraForQuestionAnswering",
        "choice": "ElectraForMultipleChoice",
    },
    pooled=(),
    heads=(
        "generator_predictions",
        "generator_lm_head",
        "discriminator_predictions",
        "classifier",
        "classifier.dense",
        "classifier.out_proj",
        "sequence_summary",
        "qa_outputs",
    ),
    tied={"generator_lm_head.weight": "embeddings.word_embeddings.weight"},
    conv1d=False,
)

VARIANTS = {
    "large": Row(24, 1024, 16, 4096, embedding_features=1024),
    "large_generator": Row(24, 256, 4, 1024, embedding_features=1024),
    "base": Row(12, 768, 12, 3072, embedding_features=768),
    "base_generator": Row(12, 256, 4, 1024, embedding_features=768),
    "small": Row(12, 256, 4, 1024, embedding_features=128),
    "small_generator": Row(12, 64, 1, 256, embedding_features=128),
    # for tests
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40, embedding_features=16),
}

Task = Literal[
    "features", "masked_lm", "replaced", "classification", "tokens", "span", "choice"
]
# {key of config.json: option}
_KEYS = {**huggingface.BERT_KEYS, "embedding_size": "embedding_features"}
# Defaults of its class in `transformers` for keys that config.json lacks: the sizes of `small`.
_DEFAULTS = {
    "hidden_size": 256,
    "embedding_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
# How its class for multiple choice summarises a sequence.
_SUMMARY = {
    "summary_type": "first",
    "summary_use_proj": True,
    "summary_activation": "gelu",
}
_HEAD_NAMES = {
    **bert.HEAD_NAMES,
    "masked_lm": {
        "head/masked_lm": "generator_lm_head",  # its bias
        "head/masked_lm/transform": "generator_predictions.dense",
        "head/masked_lm/norm": "generator_predictions.LayerNorm",
    },
    "replaced": {
        "head/transform": "discriminator_predictions.dense",
        "head/replaced": "discriminator_predictions.dense_prediction",
    },
    "classification": {
        "head/transform": "classifier.dense",
        "head/classifier": "classifier.out_proj",
    },
    "choice": {
        "head/transform": "sequence_summary.summary",
        "head/classifier": "classifier",
    },
}


class Electra(nn.Module):
    """The ELECTRA network; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`.

    Attributes:
      shared: embeddings of another network that this one uses; None for its own.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    shared: Embeddings | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        # The heads of the paper's code always use GELU, whatever the layers use.
        changes = {"summary": "gelu"}
        if self.task == "masked_lm":
            changes["activation"] = "gelu"
        if self.task == "classification":
            changes["summary_dropout"] = self.settings.head_dropout
        same_width = self.row.embedding_features in (None, self.row.features)
        return _encoder.encode(
            self,
            x,
            self.shared or _encoder.embeddings(self),
            _encoder.layers(self),
            _encoder.head(self, **changes),
            train=train,
            widen=_encoder.identity if same_width else _encoder.project,
        )


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    segments: Whole | None = None,
    embedding_features: Count | None = None,
    **options: Any,
) -> Electra:
    """Builds an ELECTRA.

    Args:
      variant: a row of VARIANTS.
      task, segments: see `bert.make`.
      embedding_features: channels of the embeddings that replace the variant's.
      **options: see `_encoder.Options`.

    Raises:
      UserError: the variant, task or activation is unknown, or the heads do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    sizes = {"segments": segments, "embedding_features": embedding_features}
    row, settings = _encoder.row_and_settings(
        VARIANTS, variant, "electra", shared, **sizes
    )
    check_task(task, Task)
    return Electra(row, task, shared.num_classes, False, settings)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json.

    Raises:
      UserError: config.json summarises a sequence in another way, or has another unsupported value.
    """
    return huggingface.options_from_config(
        {**_DEFAULTS, **config}, _KEYS, huggingface.ONLY | _SUMMARY
    )


def to_huggingface(net: Electra) -> dict[str, Any]:
    """Returns the entries of config.json for a network."""
    dropout = {"summary_last_dropout": net.settings.head_dropout}
    return huggingface.config_from_net(net, _KEYS) | _SUMMARY | dropout


def huggingface_names(net: Electra) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    names = {"project": "embeddings_project"}
    return names | bert.encoder_names(net.row.layers) | _HEAD_NAMES[net.task]
