"""GPT-2: a transformer that reads from left to right and tells the next token.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language Models are Unsupervised Multitask Learners"; Table 2 has the
four variants, of which `small` is the 124 million parameters of the release. No position sees a later one; layers
normalise before attention and feed-forward network, and once after the last. There are no segments: those of a batch are
not read. A sequence is classified by its last real token.

What to know of the classes in `transformers` whose folders are read and written here:
  * Sequence classification finds the last real token by the config's `pad_token_id`, which GPT-2 has not, and takes no
    batches without it: save with config={"pad_token_id": …}. Here the mask tells.
  * It has no dropout before that classifier: fine-tune with head_dropout=0.0 to do the same.
  * Multiple choice is the second head of the class with two; its language model is the task causal_lm.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from squeeze_jax import registry
from squeeze_jax.models import _encoder
from squeeze_jax.models._encoder import Options, Row, Settings, layer_names
from squeeze_jax.nn.heads import check_task, last_token
from squeeze_jax.nn.layer_norm import LayerNorm
from squeeze_jax.ranges import Rate
from squeeze_jax.weights import files, huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(activation="gelu_tanh", epsilon=1e-5)
Task = Literal["features", "causal_lm", "classification", "tokens", "span", "choice"]
_OF_SEQUENCES = ("classification", "choice")
_PARTS = ("query", "key", "value")
_FUSED = re.compile(rf"^(.*attn\.c_attn)\.({'|'.join(_PARTS)})\.(weight|bias)$")
_TRANSPOSED = re.compile(r"\.c_(fc|proj)\.weight$")


def _unpacked(arrays: files.Arrays, net: "Gpt2") -> files.Arrays:
    """Matrices [in, out] as [out, in], and those of attention's input, three in one, each by itself."""
    found = {}
    for name, array in arrays.items():
        layer, _, end = name.rpartition(".")
        if layer.endswith("attn.c_attn") and np.shape(array)[-1] % 3 == 0:
            for part, piece in zip(_PARTS, np.split(array, 3, axis=-1), strict=True):
                found[f"{layer}.{part}.{end}"] = piece.T
        else:
            found[name] = array.T if _TRANSPOSED.search(name) else array
    return found


def _packed(arrays: files.Arrays, net: "Gpt2") -> files.Arrays:
    found = {}
    for name, array in arrays.items():
        part = _FUSED.match(name)
        if part is None:
            found[name] = array.T if _TRANSPOSED.search(name) else array
        elif part[2] == _PARTS[0]:
            every = [f"{part[1]}.{other}.{part[3]}" for other in _PARTS]
            joined = np.concatenate([arrays[other].T for other in every], axis=-1)
            found[f"{part[1]}.{part[3]}"] = joined
    return found


HUGGINGFACE = huggingface.Family(
    "gpt2",
    prefix="transformer",
    classes={
        "features": "GPT2Model",
        "causal_lm": "GPT2LMHeadModel",
        "classification": "GPT2ForSequenceClassification",
        "tokens": "GPT2ForTokenClassification",
        "span": "GPT2ForQuestionAnswering",
        "choice": "GPT2DoubleHeadsModel",
    },
    pooled=(),
    heads=("lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head"),
    tied={"lm_head.weight": "wte.weight"},
    conv1d=False,
    unpacked=_unpacked,
    packed=_packed,
)
HEAD_NAMES = {
    "features": {},
    "causal_lm": {"head/causal_lm": "lm_head"},
    "classification": {"head/classifier": "score"},
    "tokens": {"head/classifier": "classifier"},
    "span": {"head/span": "qa_outputs"},
    "choice": {"head/classifier": "multiple_choice_head.summary"},
}

VARIANTS = {
    name: Row(layers, features, heads, 4 * features, 50257, 1024, segments=0)
    for name, layers, features, heads in (
        ("small", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large", 36, 1280, 20),
        ("xl", 48, 1600, 25),
    )
}
VARIANTS["toy"] = Row(2, 32, 4, 64, vocabulary=99, positions=40, segments=0)

_KEYS = {
    "n_layer": "layers",
    "n_embd": "features",
    "n_head": "heads",
    "n_inner": "ffn_features",
    "vocab_size": "vocabulary",
    "n_positions": "positions",
    "activation_function": "activation",
    "layer_norm_epsilon": "epsilon",
    "embd_pdrop": "embedding_dropout",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "summary_first_dropout": "head_dropout",
    "classifier_dropout": "head_dropout",
}
_ONLY = {
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
}
_END_OF_TEXT = 50256  # the first and the last token to the class in transformers


class Gpt2(nn.Module):
    """The net; endpoints as in `_encoder.encode`; pooled [b, d] of tasks of sequences is the last real token.

    Attributes:
      row, task, num_classes, pooler, settings: see `bert.Bert`.
      embedding_dropout: rate after the embeddings.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    embedding_dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Logits and endpoints, see `_encoder.encode`."""
        # The first layer has the embeddings' normalisation.
        rate = self.embedding_dropout
        tables = _encoder.embeddings(self, epsilon=None, dropout=rate)
        # What is added to the residuals begins smaller the more of them there are; section 2.3.
        init = nn.initializers.normal
        blocks = _encoder.layers(
            self,
            norm_first=True,
            causal=True,
            kernel_init=init(0.02),
            output_init=init(0.02 / np.sqrt(2 * self.row.layers)),
        )
        head = _encoder.head(self, bias=self.task != "classification")
        return _encoder.encode(
            self, x, tables, blocks, head, train=train, finish=_normalised, pool=_last
        )


def _normalised(net, y):
    return LayerNorm(net.settings.epsilon, name="norm")(y)


def _last(net, y, mask):
    return last_token(y, mask) if net.task in _OF_SEQUENCES else None


@registry.options(OPTIONS)
def make(
    variant: str = "small",
    *,
    task: Task = "causal_lm",
    embedding_dropout: Rate | None = None,
    **options: Any,
) -> Gpt2:
    """Builds a GPT-2.

    Args:
      variant: a row of VARIANTS.
      task: what the head is for, see `heads.Head`.
      embedding_dropout: rate after the embeddings; None for `dropout`.
      **options: see `Options`; dropout is the rate before residual sums.

    Raises:
      UserError: unknown variant, task or activation, or heads that do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.chosen(VARIANTS, variant, "gpt2", shared)
    check_task(task, Task)
    rate = shared.dropout if embedding_dropout is None else embedding_dropout
    return Gpt2(row, task, shared.num_classes, False, settings, rate)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make` from a folder's config.json."""
    found = huggingface.options(config, _KEYS, _ONLY)
    features = found.get("features", VARIANTS["small"].features)
    # A value of another type is for `load` to name.
    wide = {"ffn_features": 4 * features} if isinstance(features, int) else {}
    return wide | found


def to_huggingface(net: Gpt2) -> dict[str, Any]:
    """What config.json says of a net."""
    found = huggingface.config(net, _KEYS)
    if net.row.vocabulary <= _END_OF_TEXT:
        found |= {"bos_token_id": None, "eos_token_id": None}
    return found


def huggingface_names(net: Gpt2) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}.

    The parts of `attn.c_attn` are one tensor there.
    """
    parts = {f"attention/{part}": f"attn.c_attn.{part}" for part in _PARTS} | {
        "attention/output": "attn.c_proj",
        "attention_norm": "ln_1",
        "ffn_in": "mlp.c_fc",
        "ffn_out": "mlp.c_proj",
        "ffn_norm": "ln_2",
    }
    names = {
        "embeddings/tokens": "wte",
        "embeddings/positions": "wpe",
        "norm": "ln_f",
    }
    names |= layer_names(parts, net.row.layers, "h")
    return names | HEAD_NAMES[net.task]
