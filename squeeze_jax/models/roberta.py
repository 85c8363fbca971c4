"""RoBERTa: BERT, trained longer, on more text, and on masked words alone.

Liu, Ott, Goyal, Du, Joshi, Chen, Levy, Lewis, Zettlemoyer, Stoyanov 2019, arXiv 1907.11692. The layers are BERT's. What
differs: 50265 byte-level tokens and one segment; a classifier has its own layer on the first token instead of the pooler,
which was trained for next sentences; and positions count from the third row of their table, as real tokens alone are
counted: all padding is at the second. `positions` is the longest sequence, two less than the table's rows and than
`max_position_embeddings` of `transformers`, where padding is what has the padding's token; here, what the mask says.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.models import bert
from squeeze_jax.models._encoder import Encoder, Row, sized
from squeeze_jax.nn.heads import Head, pooled
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
HUGGINGFACE = huggingface.Family(
    "roberta",
    prefix="roberta",
    classes={
        "features": "RobertaModel",
        "masked_lm": "RobertaForMaskedLM",
        "classification": "RobertaForSequenceClassification",
        "tokens": "RobertaForTokenClassification",
        "span": "RobertaForQuestionAnswering",
        "choice": "RobertaForMultipleChoice",
    },
    pooled=("features", "choice"),
    heads=(
        "lm_head",
        "classifier",
        "classifier.dense",
        "classifier.out_proj",
        "qa_outputs",
    ),
    tied={
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    conv1d=False,
)

_BASE = Row(12, 768, 12, 3072, vocabulary=50265, segments=1)
VARIANTS = {
    "large": Row(24, 1024, 16, 4096, vocabulary=50265, segments=1),  # section 5
    "base": _BASE,  # section 3.1
    "toy": Row(2, 32, 4, 64, vocabulary=99, positions=40, segments=1),  # for tests
}

_HEAD_NAMES = {
    **bert.HEAD_NAMES,
    "masked_lm": {
        "head/masked_lm": "lm_head",  # its bias
        "head/masked_lm/transform": "lm_head.dense",
        "head/masked_lm/norm": "lm_head.layer_norm",
    },
    "classification": {
        "head/transform": "classifier.dense",
        "head/classifier": "classifier.out_proj",
    },
}

Task = Literal["features", "masked_lm", "classification", "tokens", "span", "choice"]
# Of padding, in the vocabulary and in the table of positions.
_PADDING = 1
# What its class has where config.json says nothing: BERT's, not those of the paper.
_UNSAID = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


class Roberta(Encoder):
    """The net; attributes and endpoints as in `Encoder`."""

    before_positions = _PADDING + 1

    def position_rows(self, mask):
        if mask is None:
            return None
        mask = mask.astype(jnp.int32)
        return mask.cumsum(-1) * mask + _PADDING

    def make_head(self) -> Head:
        if self.task == "classification":
            return super().make_head(summary="tanh", summary_dropout=self.head_dropout)
        # The paper's code has this activation there, whatever the layers have.
        return super().make_head(activation="gelu")


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
    epsilon: float = 1e-5,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    head_dropout: float | None = None,
    pooler: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Roberta:
    """Builds a RoBERTa.

    Args:
      variant: a row of VARIANTS.
      Others: see `bert.make`.

    Raises:
      UserError: unknown variant, task or activation, or heads that do not divide the features.
    """
    row = sized(
        VARIANTS,
        variant,
        "roberta",
        activation,
        layers=layers,
        features=features,
        heads=heads,
        ffn_features=ffn_features,
        vocabulary=vocabulary,
        positions=positions,
        segments=segments,
    )
    return Roberta(
        row,
        task,
        num_classes,
        activation,
        epsilon,
        dropout,
        attention_dropout,
        dropout if head_dropout is None else head_dropout,
        pooled(task, pooler, tasks=Task, need=("choice",)),
        dtype,
    )


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make` from a folder's config.json.

    Raises:
      UserError: padding is another token.
    """
    padding = config.get("pad_token_id", _PADDING)
    if padding != _PADDING:
        raise UserError(
            f"{huggingface.CONFIG}: pad_token_id = {padding} is not supported, only {_PADDING}, after which positions count"
        )
    found = huggingface.options({**_UNSAID, **config})
    if isinstance(found.get("positions"), int):  # else it is for `load` to name
        found["positions"] -= Roberta.before_positions
    return found


def to_huggingface(net: Roberta) -> dict[str, Any]:
    """What config.json says of a net."""
    found = huggingface.config(net) | {"pad_token_id": _PADDING}
    found["max_position_embeddings"] += Roberta.before_positions
    return found


def huggingface_names(net: Roberta) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    return bert.encoder_names(net.row.layers) | _HEAD_NAMES[net.task]
