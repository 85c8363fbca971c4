"""SqueezeBERT: BERT with grouped convolutions in place of fully connected layers.

Iandola, Shaw, Krishna, Keutzer 2020, arXiv 2006.11316. A position-wise fully connected layer is a convolution with kernel
size 1. With four groups, as in efficient vision networks, it has a quarter of the weights and of the computation. The layer
after attention stays dense and mixes the groups. With groups=1 this network is exactly BERT.

`released` is `base` with the vocabulary of the published checkpoints, padded to 30528 tokens. The class in `transformers`,
whose folders are read and written here, differs in these points:
  * Its `attentions` are the scores before the softmax. These are our endpoints scores1, …; our attention1, … are
    probabilities.
  * Its layers normalise with an epsilon of 1e-12, whatever the config's `layer_norm_eps`, which applies only to the embeddings
    and the masked-LM head. Here these are `layer_epsilon` and `epsilon`.
  * It has a pooler for every task; here only tasks that use it have one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, bert
from squeeze_jax.models._encoder import Options, Row, Settings, layer_names
from squeeze_jax.nn import encoder
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.heads import Task
from squeeze_jax.ranges import Count, Positive, Whole
from squeeze_jax.weights import huggingface

INPUTS = "tokens"
CLASSIFIER = _encoder.CLASSIFIER
OPTIONS = Options()
HUGGINGFACE = bert.HUGGINGFACE._replace(
    model_type="squeezebert",
    prefix="transformer",
    classes={
        "features": "SqueezeBertModel",
        "masked_lm": "SqueezeBertForMaskedLM",
        "classification": "SqueezeBertForSequenceClassification",
        "tokens": "SqueezeBertForTokenClassification",
        "span": "SqueezeBertForQuestionAnswering",
        "choice": "SqueezeBertForMultipleChoice",
    },
    pooled=("features", "masked_lm", "classification", "tokens", "span", "choice"),
    conv1d=True,
)

GROUPS = Groups(query=4, key=4, value=4, output=1, ffn_in=4, ffn_out=4)  # section 3.2
VARIANTS = {
    "base": Row(12, 768, 12, 3072),
    "released": Row(12, 768, 12, 3072, vocabulary=30528),
    "toy": bert.VARIANTS["toy"],
}

# {key of config.json: position in Groups}
_GROUP_KEYS = {
    "q_groups": "query",
    "k_groups": "key",
    "v_groups": "value",
    "post_attention_groups": "output",
    "intermediate_groups": "ffn_in",
    "output_groups": "ffn_out",
}
# Its class has no separate dropout rate for the classifier.
_KEYS = {k: v for k, v in huggingface.BERT_KEYS.items() if k != "classifier_dropout"}
_LAYER_EPSILON = 1e-12  # epsilon of the layers in the class of transformers


class SqueezeBert(nn.Module):
    """The SqueezeBERT network; endpoints as in `_encoder.encode`.

    Attributes:
      row, task, num_classes, pooler, settings: see `bert.Bert`.
      groups: numbers of groups of each layer.
      layer_epsilon: epsilon of the layers' normalisations.
      shuffle: see `make`.
    """

    row: Row
    task: str
    num_classes: int | None
    pooler: bool
    settings: Settings
    groups: tuple[Groups, ...]
    layer_epsilon: float
    shuffle: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints), see `_encoder.encode`."""
        changes = {"epsilon": self.layer_epsilon, "shuffle": self.shuffle}
        blocks = [
            _encoder.layer(self, number, groups, **changes)
            for number, groups in enumerate(self.groups, 1)
        ]
        tables, head = _encoder.embeddings(self), _encoder.head(self)
        return _encoder.encode(self, x, tables, blocks, head, train=train)


@registry.options(OPTIONS)
def make(
    variant: str = "base",
    *,
    groups: Count
    | Mapping[str, Count]
    | Sequence[Count | Mapping[str, Count]]
    | None = None,
    task: Task = "classification",
    segments: Whole | None = None,
    layer_epsilon: Positive | None = None,
    pooler: bool | None = None,
    shuffle: bool = False,
    **options: Any,
) -> SqueezeBert:
    """Builds a SqueezeBERT.

    Args:
      variant: a row of VARIANTS.
      groups: numbers of groups of the convolutions: one number for all; {"query": 4, "ffn_out": 8} for some convolutions
        (query, key, value, output, ffn_in, ffn_out), while the others keep the paper's; or a list with one of these for
        each layer.
      task, segments, pooler: see `bert.make`.
      layer_epsilon: epsilon of the layers' normalisations; None for `epsilon`.
      shuffle: whether channels are shuffled before a grouped layer after attention, so that each of its groups reads channels
        of every group of the values, as in ShuffleNet. The paper does not do this.
      **options: see `_encoder.Options`.

    Raises:
      UserError: the variant, task, activation or a convolution's name is unknown, or groups or heads do not divide the
        features.
    """
    shared = OPTIONS._replace(**options)
    row, settings = _encoder.row_and_settings(
        VARIANTS, variant, "squeezebert", shared, segments=segments
    )
    by_layer = encoder.layer_groups(
        {} if groups is None else groups, GROUPS, row.layers
    )
    encoder.check_divisors(row.features, row.ffn_features, row.heads, by_layer)
    return SqueezeBert(
        row,
        task,
        shared.num_classes,
        _encoder.has_pooler(task, pooler, shared.num_classes),
        settings,
        groups=by_layer,
        layer_epsilon=shared.epsilon if layer_epsilon is None else layer_epsilon,
        shuffle=shuffle,
    )


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `make` from a folder's config.json.

    Raises:
      UserError: the embeddings have another width than the layers, or config.json has another unsupported value.
    """
    options = huggingface.options_from_config(config, _KEYS)
    features = config.get("hidden_size", VARIANTS["base"].features)
    if config.get("embedding_size", features) != features:
        raise UserError(
            f"{huggingface.CONFIG}: embedding_size = {config['embedding_size']} should be hidden_size = {features}"
        )
    groups = {ours: config.get(key) for key, ours in _GROUP_KEYS.items()}
    groups = {ours: number for ours, number in groups.items() if number is not None}
    return options | {"groups": groups, "layer_epsilon": _LAYER_EPSILON}


def to_huggingface(net: SqueezeBert) -> dict[str, Any]:
    """Returns the entries of config.json for a network.

    Raises:
      UserError: the class in `transformers` cannot have these groups, does not shuffle, or has another epsilon.
    """
    if len(set(net.groups)) > 1:
        raise UserError(
            "transformers' SqueezeBERT has the same groups in every layer: these differ, so it could not load them"
        )
    if net.shuffle:
        raise UserError(
            "transformers' SqueezeBERT does not shuffle channels: it could not load this network"
        )
    if net.layer_epsilon != _LAYER_EPSILON:
        raise UserError(
            f"transformers' SqueezeBERT normalises layers with epsilon {_LAYER_EPSILON} whatever its config says: not"
            f" with layer_epsilon = {net.layer_epsilon}"
        )
    groups = net.groups[0]._asdict()
    content = huggingface.config_from_net(net, _KEYS) | {
        "embedding_size": net.row.features
    }
    return content | {key: groups[ours] for key, ours in _GROUP_KEYS.items()}


def huggingface_names(net: SqueezeBert) -> dict[str, str]:
    """Returns {our layer: its name in the checkpoints of `transformers`, without the encoder's prefix}."""
    parts = {
        "attention/query": "attention.query",
        "attention/key": "attention.key",
        "attention/value": "attention.value",
        "attention/output": "post_attention.conv1d",
        "attention_norm": "post_attention.layernorm",
        "ffn_in": "intermediate.conv1d",
        "ffn_out": "output.conv1d",
        "ffn_norm": "output.layernorm",
    }
    layers = layer_names(parts, net.row.layers, "encoder.layers")
    return bert.OUTER_NAMES | layers | bert.HEAD_NAMES[net.task]
