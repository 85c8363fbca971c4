"""RoBERTa: a BERT that is pretrained longer, on more text, and only on masked tokens.

Liu, Ott, Goyal, Du, Joshi, Chen, Levy, Lewis, Zettlemoyer, Stoyanov 2019, arXiv 1907.11692. The layers are BERT's. The
differences: there are 50265 byte-level tokens and one segment. A classifier has its own layer on the first token instead of
the pooler, which BERT trains with next-sentence prediction. Positions are counted over real tokens only and start at the
third row of their table; all padding has the second row. `positions` is the longest sequence: two less than the rows of that
table and than `max_position_embeddings` of `transformers`. There, padding is every token with the padding's id; here, the
padding mask decides.
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
_PADDING = 1  # row of padding in the vocabulary and in the table of positions
_BEFORE = _PADDING + 1  # rows of the table of positions before the first token's row
# Defaults of its class in `transformers` for keys that config.json lacks: BERT's, not those of the paper.
_DEFAULTS = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


class Roberta(nn.Module):
    """The RoBERTa network; attributes as in `bert.Bert`, endpoints as in `_encoder.encode`."""

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        # The heads of the paper's code always use these activations, whatever the layers use.
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
            rows=_position_rows,
        )


def _position_rows(mask):
    """Returns each token's row in the table of positions, int [b, l]; None without a padding mask."""
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
      **options: see `_encoder.Options`.

    Raises:
      UserError: the variant, task or activation is unknown, or the heads do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.row_and_settings(
        VARIANTS, variant, "roberta", shared, segments=segments
    )
    need = ("choice",)
    pooler = _encoder.has_pooler(task, pooler, shared.num_classes, Task, need)
    return Roberta(row, task, shared.num_classes, pooler, settings)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json.

    Raises:
      UserError: the padding token has another id, or config.json has another unsupported value.
    """
    padding = config.get("pad_token_id", _PADDING)
    if padding != _PADDING:
        raise UserError(
            f"{huggingface.CONFIG}: pad_token_id = {padding} is not supported, only {_PADDING}, after which positions count"
        )
    options = huggingface.options_from_config({**_DEFAULTS, **config})
    if isinstance(options.get("positions"), int):  # otherwise `load` raises an error
        options["positions"] -= _BEFORE
    return options


def to_huggingface(net: Roberta) -> dict[str, Any]:
    """Returns the entries of config.json for a network."""
    content = huggingface.config_from_net(net) | {"pad_token_id": _PADDING}
    content["max_position_embeddings"] += _BEFORE
    return content


def huggingface_names(net: Roberta) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    return bert.encoder_names(net.row.layers) | _HEAD_NAMES[net.task]
