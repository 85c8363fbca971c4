"""Builds encoders of text from embeddings, a stack of layers and a task's head.

A net is a Linen module with the attributes row, task, num_classes, pooler and settings. Its `__call__` makes the parts by
`embeddings`, `layers` and `head`, with the arguments in which it differs from BERT, and runs them by `encode`.
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

# The layers that another task or other classes change: a pooler learns what a task asks of it.
CLASSIFIER = ("pooler", "head")
# The tasks that score tokens at the input "positions" alone, if there is one, and "features", which teaches such networks.
_SCORED = ("masked_lm", "pretraining", "features")


class Row(NamedTuple):
    """A variant: layers, their channels, attention's heads, the feed-forward network's channels, the embeddings' sizes.

    `embedding_features` are the embeddings' channels; None for those of the layers.
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
    """Options that `make` has in every file of an encoder; `registry.options` puts them into its signature.

    Attributes:
      num_classes: outputs of the tasks classification (1: regression) and tokens; None for no head and no pooler: the last
        layer's [b, l, d] stands in place of the logits.
      layers, features, heads, ffn_features: instead of the variant's; heads divide features.
      vocabulary, positions: sizes of the embeddings instead of the variant's.
      activation: of the feed-forward networks, a name of `activations.ACTIVATIONS`.
      epsilon: of all normalisations.
      dropout: rate after embeddings and before residual sums, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: rate on attention's probabilities.
      head_dropout: rate before a classifier; None for `dropout`.
      dtype: of everything between the embeddings and the logits; parameters and logits are float32.
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
    """The options that a net computes with; the sizes are in its row. See `Options`; `head_dropout` is a number."""

    activation: str
    epsilon: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    dtype: str


def settings(options: Options) -> Settings:
    """Returns the options that are no sizes.

    Raises:
      UserError: an unknown activation.
    """
    activations.by_name(options.activation)
    if options.head_dropout is None:
        options = options._replace(head_dropout=options.dropout)
    return Settings(*(getattr(options, name) for name in Settings._fields))


def sized(row: Any, options: Options, **sizes: int | None) -> Any:
    """Returns a variant's row with the sizes of the options, and others that are not None, instead of its own.

    Raises:
      UserError: a size that is not positive.
    """
    shared = ("layers", "features", "heads", "ffn_features", "vocabulary", "positions")
    sizes |= {name: getattr(options, name) for name in shared}
    return encoder.with_sizes(row, **sizes)


def chosen(
    variants: Mapping[str, Row],
    variant: str,
    model_type: str,
    options: Options,
    **sizes: int | None,
) -> tuple[Row, Settings]:
    """Returns the sizes and settings of a net.

    Args:
      variants: the rows of a file.
      variant: the name of one of them.
      model_type: how an error calls the file.
      options: what `make` was called with, and the file's defaults.
      **sizes: the file's own options that are sizes.

    Raises:
      UserError: an unknown variant or activation, a size that is not positive, heads that do not divide the features.
    """
    row = registry.row(variants, variant, f"variant of {model_type}")
    row = sized(row, options, **sizes)
    encoder.check_divisors(row.features, row.ffn_features, row.heads)
    return row, settings(options)


def has_pooler(
    task: str,
    pooler: bool | None,
    num_classes: int | None,
    tasks: Any = heads.Task,
    need: Sequence[str] = heads.NEED_POOLER,
) -> bool:
    """Whether an encoder has a pooler; see `heads.has_pooler`. A network without classes has one only if `pooler` is
    true.

    Raises:
      UserError: see `heads.has_pooler`.
    """
    heads.check_task(task, tasks)
    if num_classes is None:
        return pooler is True
    return heads.has_pooler(task, pooler, tasks=tasks, need=need)


def embeddings(net, **changes: Any) -> Embeddings:
    """Makes the embeddings; `changes` are the arguments of `Embeddings` that differ from BERT's."""
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
    """Makes a layer, which counts from 1; `changes` are the arguments of `encoder.Layer` that differ from BERT's."""
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
    """Makes all layers, see `layer`."""
    return [layer(net, n, **changes) for n in range(1, net.row.layers + 1)]


def head(net, **changes: Any) -> Head:
    """Makes the task's head; `changes` are the arguments of `Head` that differ from BERT's."""
    dropped = net.task in ("classification", "tokens", "choice")
    common = {
        "task": net.task,
        "num_classes": net.num_classes,
        "features": net.row.embedding_features or net.row.features,
        "activation": net.settings.activation,
        "epsilon": net.settings.epsilon,
        "dropout": net.settings.head_dropout if dropped else 0.0,
        "name": "head",
    }
    return Head(**common | changes)


def project(net, y: jax.Array) -> jax.Array:
    """Takes embeddings to the layers' channels by a fully connected layer, [b, l, e] → [b, l, d]."""
    init = encoder.KERNEL_INIT
    layer = Conv(
        net.row.features, (1,), dtype=y.dtype, kernel_init=init, name="project"
    )
    return layer(y)


def pool(net, y: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns the first token after a fully connected layer and tanh, [b, d], or None without a pooler."""
    return Pooler(name="pooler")(y) if net.pooler else None


def unchanged(net, y: jax.Array) -> jax.Array:
    """Returns y."""
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
    widen: Callable = unchanged,
    finish: Callable = unchanged,
    pool: Callable = pool,
) -> tuple[Any, dict[str, jax.Array]]:
    """Runs an encoder inside its `nn.compact` method.

    Args:
      net: the encoder, bound.
      x: {"tokens", "segments", "attended", "position_ids"} of [b, l], see `embed.text_inputs`, and for the tasks masked_lm and
        pretraining "positions" [b, p], see `embed.scored_positions`.
      tables, blocks, last: its embeddings, layers and head.
      train: whether dropout acts.
      rows: bool [b, l] or None → each token's row in the table of positions, int [b, l], or None to count tokens.
      widen: (net, embeddings) → what the first layer reads, [b, l, d].
      finish: (net, the last layer's outputs) → [b, l, d].
      pool: (net, what `finish` returned, mask) → what stands for a whole sequence, [b, d] or None.

    Returns:
      Logits, see `heads.Head`, and endpoints: embeddings (what the first layer reads), layer1, layer2, … [b, l, d],
      attention1, … (probabilities) and scores1, … (before the softmax) [b, heads, l, l], and pooled [b, d] if there is
      one. Without classes the last layer's [b, l, d], float32, stands in place of the logits.
    """
    network, others = type(net).__name__, ()
    # A network without a head may teach one that scores tokens, on the same batches.
    if net.task in _SCORED or net.num_classes is None:
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
    y, others = encoder.run_layers(blocks, y, mask, train=train)
    endpoints |= others
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
    row = net.row
    return Sizes(row.vocabulary, row.segments, tables.before + row.positions)


def layer_names(parts: Mapping[str, str], layers: int, start: str) -> dict[str, str]:
    """Names of numbered layers, ours from 1 on and theirs from 0.

    Args:
      parts: {our part of a layer: theirs}.
      layers: how many.
      start: what stands before their number.
    """
    return {
        f"layer{number + 1}/{ours}": f"{start}.{number}.{theirs}"
        for number in range(layers)
        for ours, theirs in parts.items()
    }
