"""GPT-2: a transformer that reads from left to right and predicts the next token.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language Models are Unsupervised Multitask Learners"; Table 2 has the
four variants, of which `small` is the released network of 124 million parameters. No position attends to a later one. Layers
normalise before attention and before the feed-forward network, and once more after the last layer. There are no segments; a
batch's segments are ignored. A sequence is classified by its last real token.

The classes in `transformers`, whose folders are read and written here, differ in these points:
  * Sequence classification finds the last real token by the config's `pad_token_id`, which GPT-2 does not have, and accepts
    no batches without it: save with config={"pad_token_id": …}. Here the padding mask decides.
  * They have no dropout before that classifier: fine-tune with head_dropout=0.0 to match.
  * Multiple choice is the second head of the class with two heads. The language model of that class is the task causal_lm.
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
from squeeze_jax.weights import huggingface, weight_files

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options(activation="gelu_tanh", epsilon=1e-5)
Task = Literal["features", "causal_lm", "classification", "tokens", "span", "choice"]
_SEQUENCE_TASKS = ("classification", "choice")
_PARTS = ("query", "key", "value")
_FUSED = re.compile(rf"^(.*attn\.c_attn)\.({'|'.join(_PARTS)})\.(weight|bias)$")
_TRANSPOSED = re.compile(r"\.c_(fc|proj)\.weight$")


def _unpack(arrays: weight_files.Arrays, net: "Gpt2") -> weight_files.Arrays:
    """Transposes matrices [in, out] to [out, in], and splits attention's fused query, key and value."""
    unpacked = {}
    for name, array in arrays.items():
        layer, _, end = name.rpartition(".")
        if layer.endswith("attn.c_attn") and np.shape(array)[-1] % 3 == 0:
            for part, piece in zip(_PARTS, np.split(array, 3, axis=-1), strict=True):
                unpacked[f"{layer}.{part}.{end}"] = piece.T
        else:
            unpacked[name] = array.T if _TRANSPOSED.search(name) else array
    return unpacked


def _pack(arrays: weight_files.Arrays, net: "Gpt2") -> weight_files.Arrays:
    """Returns arrays in GPT-2's layout: the inverse of `_unpack`."""
    packed = {}
    for name, array in arrays.items():
        part = _FUSED.match(name)
        if part is None:
            packed[name] = array.T if _TRANSPOSED.search(name) else array
        elif part[2] == _PARTS[0]:
            fused = [f"{part[1]}.{other}.{part[3]}" for other in _PARTS]
            joined = np.concatenate([arrays[other].T for other in fused], axis=-1)
            packed[f"{part[1]}.{part[3]}"] = joined
    return packed


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
    unpack=_unpack,
    pack=_pack,
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
_END_OF_TEXT = 50256  # first and last token of a text for the class in transformers


class Gpt2(nn.Module):
    """The GPT-2 network; endpoints as in `_encoder.encode`.

    In the tasks classification and choice the endpoint pooled [b, d] is the hidden state of the last real token.

    Attributes:
      row, task, num_classes, pooler, settings: see `bert.Bert`.
      embedding_dropout: dropout rate after the embeddings.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    embedding_dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        # The first layer normalises its inputs, so the embeddings need no normalisation.
        rate = self.embedding_dropout
        tables = _encoder.embeddings(self, epsilon=None, dropout=rate)
        # The more residual sums there are, the smaller the initial weights of their summands; section 2.3.
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
            self,
            x,
            tables,
            blocks,
            head,
            train=train,
            finish=_final_norm,
            pool=_pool_last_token,
        )


def _final_norm(net, y):
    return LayerNorm(net.settings.epsilon, name="norm")(y)


def _pool_last_token(net, y, mask):
    return last_token(y, mask) if net.task in _SEQUENCE_TASKS else None


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
      task: see `_encoder.Head`.
      embedding_dropout: dropout rate after the embeddings; None for `dropout`.
      **options: see `_encoder.Options`; dropout is the rate before residual sums.

    Raises:
      UserError: the variant, task or activation is unknown, or the heads do not divide the features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.row_and_settings(VARIANTS, variant, "gpt2", shared)
    check_task(task, Task)
    rate = shared.dropout if embedding_dropout is None else embedding_dropout
    return Gpt2(row, task, shared.num_classes, False, settings, rate)


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json."""
    options = huggingface.options_from_config(config, _KEYS, _ONLY)
    features = options.get("features", VARIANTS["small"].features)
    # For a value of another type `load` raises an error.
    default = {"ffn_features": 4 * features} if isinstance(features, int) else {}
    return default | options


def to_huggingface(net: Gpt2) -> dict[str, Any]:
    """Returns the entries of config.json for a network."""
    content = huggingface.config_from_net(net, _KEYS)
    if net.row.vocabulary <= _END_OF_TEXT:
        content |= {"bos_token_id": None, "eos_token_id": None}
    return content


def huggingface_names(net: Gpt2) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}.

    There, query, key and value are one tensor, `attn.c_attn`.
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
