"""RoBERTa: BERT, trained longer, on more text, and on masked words alone.

Liu, Ott, Goyal, Du, Joshi, Chen, Levy, Lewis, Zettlemoyer, Stoyanov 2019, arXiv 1907.11692. The layers are BERT's. What
differs: 50265 byte-level tokens and one segment; a classifier has its own layer on the first token instead of the pooler,
which was trained for next sentences; and positions count from the third row of their table, as real tokens alone are
counted: all padding is at the second. `positions` is the longest sequence, two less than the table's rows and than
`max_position_embeddings` of `transformers`, where padding is what has the padding's token; here, what the mask says.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Row, Settings
from squeeze_jax.ranges import Whole
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(epsilon=1e-5)
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
_BEFORE = _PADDING + 1  # rows of that table before the first token's
# What its class has where config.json says nothing: BERT's, not those of the paper.
_UNSAID = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


class Roberta(nn.Module):
    """The net; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`."""

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Logits and endpoints, see `_encoder.encode`."""
        # The paper's code has these activations in the heads, whatever the layers have.
        changes = {"activation": "gelu"}
        if self.task == "classification":
            rate = self.settings.head_dropout
            changes = {"summary": "tanh", "summary_dropout": rate}
        return _encoder.encode(
            self,
            x,
            _encoder.embeddings(self, before=_BEFORE),
            _encoder.layers(self),
            _encoder.head(self, **changes),
            train=train,
            rows=_rows,
        )


def _rows(mask):
    if mask is None:
        return None
    mask = mask.astype(jnp.int32)
    return mask.cumsum(-1) * mask + _PADDING


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    task: Task = "classification",
    segments: Whole | None = None,
    pooler: bool | None = None,
    **options: Any,
) -> Roberta:
    """Builds a RoBERTa.

    Args:
      variant: a row of VARIANTS.
      task, segments, pooler: see `bert.make`.
      **options: see `Options`.

    Raises:
      UserError: unknown variant, task or activation, or heads that do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.chosen(
        VARIANTS, variant, "roberta", shared, segments=segments
    )
    need = ("choice",)
    pooler = _encoder.has_pooler(task, pooler, shared.num_classes, Task, need)
    return Roberta(row, task, shared.num_classes, pooler, settings)


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
        found["positions"] -= _BEFORE
    return found


def to_huggingface(net: Roberta) -> dict[str, Any]:
    """What config.json says of a net."""
    found = huggingface.config(net) | {"pad_token_id": _PADDING}
    found["max_position_embeddings"] += _BEFORE
    return found


def huggingface_names(net: Roberta) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    return bert.encoder_names(net.row.layers) | _HEAD_NAMES[net.task]
