"""Builds text encoders from embeddings, a stack of layers and a task's head.

A network is a Linen module with the attributes row, task, num_classes, pooler and settings. Its `__call__` builds the parts
with `embeddings`, `layers` and `head`, passing the arguments that differ from BERT's, and runs them with `encode`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.nn import activations, encoder, heads
from squeeze_jax.nn.attention import Groups
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.embed import (
    TEXT_INPUTS,
    Embeddings,
    Sizes,
    named_inputs,
    scored_positions,
    text_inputs,
)
from squeeze_jax.nn.heads import Head, Pooler
from squeeze_jax.ranges import Count, Layers, Positive, Rate

# The layers that depend on the task or the classes; the pooler is trained for the task, too.
CLASSIFIER = ("pooler", "head")
# The tasks that score only the tokens at the input "positions", if it is given; and "features", for teachers of these tasks.
_TASKS_WITH_POSITIONS = ("masked_lm", "pretraining", "features")


class Row(NamedTuple):
    """The sizes of a variant.

    Attributes:
      layers: number of layers.
      features: channels of a layer's hidden states.
      heads: attention heads.
      ffn_features: hidden channels of a feed-forward network.
      vocabulary, positions, segments: rows of the embedding tables.
      embedding_features: channels of the embeddings; None for `features`.
    """

    layers: int
    features: int
    heads: int
    ffn_features: int
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2
    embedding_features: int | None = None


class Options(NamedTuple):
    """Options of `make` that all encoders share; `registry.options` adds them to its signature.

    Attributes:
      num_classes: outputs of the tasks classification (1: regression) and tokens. None for no head and no pooler: the network
        then returns the last hidden states [b, l, d] in place of logits.
      layers, features, heads, ffn_features: sizes that replace the variant's; heads must divide features.
      vocabulary, positions: rows of the embedding tables that replace the variant's.
      activation: activation of the feed-forward networks, a name in `activations.ACTIVATIONS`.
      epsilon: epsilon of all normalisations.
      dropout: dropout rate after embeddings and before residual sums, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: dropout rate of the attention probabilities.
      head_dropout: dropout rate before a classifier; None for `dropout`.
      dtype: dtype of the computation between the embeddings and the logits; parameters and logits are float32.
    """

    num_classes: Count | None = 2
    layers: Layers | None = None
    features: Count | None = None
    heads: Count | None = None
    ffn_features: Count | None = None
    vocabulary: Count | None = None
    positions: Count | None = None
    activation: str = "gelu"
    epsilon: Positive = 1e-12
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    head_dropout: Rate | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Settings(NamedTuple):
    """The options of a network that are not sizes, see `Options`; here `head_dropout` is always a number."""

    activation: str
    epsilon: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    dtype: str


def settings(options: Options) -> Settings:
    """Returns the options that are not sizes.

    Raises:
      UserError: the activation is unknown.
    """
    activations.by_name(options.activation)
    if options.head_dropout is None:
        options = options._replace(head_dropout=options.dropout)
    return Settings(*(getattr(options, name) for name in Settings._fields))


def replace_sizes(row: Any, options: Options, **sizes: int | None) -> Any:
    """Returns a variant's row in which the sizes that are not None replace the variant's.

    Args:
      row: the variant's row.
      options: options with the sizes that all encoders share.
      **sizes: the other sizes of an architecture.

    Raises:
      UserError: a size is not positive.
    """
    shared = ("layers", "features", "heads", "ffn_features", "vocabulary", "positions")
    sizes |= {name: getattr(options, name) for name in shared}
    return encoder.with_sizes(row, **sizes)


def row_and_settings(
    variants: Mapping[str, Row],
    variant: str,
    model_type: str,
    options: Options,
    **sizes: int | None,
) -> tuple[Row, Settings]:
    """Returns the sizes and settings of a network.

    Args:
      variants: {variant: row} of an architecture.
      variant: the variant.
      model_type: name of the architecture in error messages.
      options: the options of `make`, with the architecture's defaults.
      **sizes: options of the architecture that are sizes.

    Raises:
      UserError: the variant or activation is unknown, a size is not positive, or the heads do not divide the features.
    """
    row = registry.row(variants, variant, f"variant of {model_type}")
    row = replace_sizes(row, options, **sizes)
    encoder.check_divisors(row.features, row.ffn_features, row.heads)
    return row, settings(options)


def has_pooler(
    task: str,
    pooler: bool | None,
    num_classes: int | None,
    tasks: Any = heads.Task,
    need: Sequence[str] = heads.NEED_POOLER,
) -> bool:
    """Returns whether an encoder has a pooler, see `heads.has_pooler`.

    A network without a head (`num_classes` is None) has one only if `pooler` is True.

    Raises:
      UserError: as `heads.has_pooler`.
    """
    heads.check_task(task, tasks)
    if num_classes is None:
        return pooler is True
    return heads.has_pooler(task, pooler, tasks=tasks, need=need)


def embeddings(net, **changes: Any) -> Embeddings:
    """Builds the embeddings; `changes` are the arguments of `Embeddings` that differ from BERT's."""
    row, settings = net.row, net.settings
    common = {
        "vocabulary": row.vocabulary,
        "features": row.embedding_features or row.features,
        "positions": row.positions,
        "segments": row.segments,
        "dropout": settings.dropout,
        "epsilon": settings.epsilon,
        "dtype": jnp.dtype(settings.dtype),
    }
    return Embeddings(**{"name": "embeddings"} | common | changes)


def layer(net, number: int, groups: Groups = encoder.DENSE, **changes: Any):
    """Builds layer `number`, from 1 on; `changes` are the arguments of `encoder.Layer` that differ from BERT's."""
    common = {
        "heads": net.row.heads,
        "ffn_features": net.row.ffn_features,
        "groups": groups,
        "activation": net.settings.activation,
        "dropout": net.settings.dropout,
        "attention_dropout": net.settings.attention_dropout,
        "epsilon": net.settings.epsilon,
        "features": net.row.features,
        "name": f"layer{number}",
    }
    return encoder.Layer(**common | changes)


def layers(net, **changes: Any) -> list[nn.Module]:
    """Builds all layers, see `layer`."""
    return [layer(net, n, **changes) for n in range(1, net.row.layers + 1)]


def head(net, **changes: Any) -> Head:
    """Builds the task's head; `changes` are the arguments of `Head` that differ from BERT's."""
    has_dropout = net.task in ("classification", "tokens", "choice")
    common = {
        "task": net.task,
        "num_classes": net.num_classes,
        "features": net.row.embedding_features or net.row.features,
        "activation": net.settings.activation,
        "epsilon": net.settings.epsilon,
        "dropout": net.settings.head_dropout if has_dropout else 0.0,
        "name": "head",
    }
    return Head(**common | changes)


def project(net, y: jax.Array) -> jax.Array:
    """Projects embeddings to the layers' channels with a fully connected layer, [b, l, e] → [b, l, d]."""
    init = encoder.KERNEL_INIT
    layer = Conv(
        net.row.features, (1,), dtype=y.dtype, kernel_init=init, name="project"
    )
    return layer(y)


def pool(net, y: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns the first token's hidden state after a fully connected layer and tanh, [b, d]; None without a pooler."""
    return Pooler(name="pooler")(y) if net.pooler else None


def identity(net, y: jax.Array) -> jax.Array:
    """Returns y unchanged."""
    return y


def encode(
    net: nn.Module,
    x: Mapping[str, jax.Array],
    tables: Embeddings,
    blocks: list[nn.Module],
    last: Head,
    *,
    train: bool,
    rows: Callable = lambda mask: None,
    widen: Callable = identity,
    finish: Callable = identity,
    pool: Callable = pool,
) -> tuple[Any, dict[str, jax.Array]]:
    """Runs an encoder inside its `nn.compact` method.

    Args:
      net: the encoder, bound.
      x: {"tokens", "segments", "attended", "position_ids"}, each [b, l], see `embed.text_inputs`; and for the tasks masked_lm and
        pretraining "positions" [b, p], see `embed.scored_positions`.
      tables, blocks, last: its embeddings, layers and head.
      train: whether dropout acts.
      rows: padding mask, bool [b, l] or None → each token's row in the table of positions, int [b, l]; or None to number the
        tokens in order.
      widen: (net, embeddings) → inputs of the first layer, [b, l, d].
      finish: (net, outputs of the last layer) → final hidden states, [b, l, d].
      pool: (net, final hidden states, padding mask) → representation of each sequence, [b, d], or None.

    Returns:
      (logits, endpoints). Logits: see `heads.Head`; without a head the final hidden states [b, l, d], float32, take their
      place. Endpoints: embeddings (the inputs of the first layer) and layer1, layer2, … [b, l, d]; attention1, …
      (probabilities) and scores1, … (before the softmax) [b, heads, l, l]; and pooled [b, d] if there is a pooler.
    """
    network, others = type(net).__name__, ()
    # A network without a head may be the teacher of a network that scores tokens, on the same batches.
    if net.task in _TASKS_WITH_POSITIONS or net.num_classes is None:
        others = ("positions",)
    tokens, segments, mask, at = text_inputs(
        x,
        choices=net.task == "choice",
        sizes=_table_sizes(net, tables),
        others=others,
        network=network,
    )
    inputs = named_inputs(x, (*TEXT_INPUTS, *others), network)
    at = rows(mask) if at is None else at
    y = widen(net, tables(tokens, segments, at=at, train=train))
    endpoints = {"embeddings": y}
    y, layer_endpoints = encoder.run_layers(blocks, y, mask, train=train)
    endpoints |= layer_endpoints
    y = finish(net, y)
    pooled = pool(net, y, mask)
    if pooled is not None:
        endpoints["pooled"] = pooled
    if net.num_classes is None:
        return y.astype(jnp.float32), endpoints
    logits = last(
        y,
        pooled,
        tables.scores,
        choices=inputs["tokens"].shape[1],
        positions=scored_positions(inputs),
        train=train,
    )
    return logits, endpoints


def _table_sizes(net, tables: Embeddings) -> Sizes:
    """Returns the sizes of the embedding tables, against which inputs are checked."""
    row = net.row
    return Sizes(row.vocabulary, row.segments, tables.before + row.positions)


def layer_names(parts: Mapping[str, str], layers: int, start: str) -> dict[str, str]:
    """Returns {our layer: their layer} of numbered layers, ours numbered from 1 and theirs from 0.

    Args:
      parts: {our part of a layer: their part}.
      layers: number of layers.
      start: prefix of their number.
    """
    return {
        f"layer{number + 1}/{ours}": f"{start}.{number}.{theirs}"
        for number in range(layers)
        for ours, theirs in parts.items()
    }
