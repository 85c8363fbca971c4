"""Multi-head self-attention, whose projections are (grouped) convolutions with kernel 1."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv, GroupArrays
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import as_float, float_dtype
from squeeze_jax.nn.intercept import tap


class Attended(NamedTuple):
    """The outputs of attention.

    Attributes:
      context: the weighted sums of values, [b, l, d] in their dtype.
      probabilities: attention weights after the softmax and before dropout, [b, heads, l, l]; each row sums to 1.
      scores: attention scores before the softmax, float32 [b, heads, l, l]; the lowest float32 for masked keys.
    """

    context: jax.Array
    probabilities: jax.Array
    scores: jax.Array


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    heads: int,
    head_features: int | None = None,
    mask: jax.Array | None = None,
    causal: bool = False,
    drop: Callable[[jax.Array], jax.Array] = lambda p: p,
    replace: Callable[[str, jax.Array], jax.Array] = lambda role, x: x,
) -> Attended:
    """Computes softmax(Q K^T / sqrt(d / heads)) V in each head; Vaswani et al. 2017, arXiv 1706.03762, equation 1.

    Args:
      query, key: [b, l, d]; each head has d / heads neighbouring channels.
      value: [b, l, d'].
      heads: number of heads; divides d and d'.
      head_features: the products are divided by the square root of this number; None for d / heads.
      mask: padding mask, bool [b, l], True for keys that may be attended to; None for all. If all keys of a sequence are
        masked, all of them get the same weight.
      causal: whether a position attends only to itself and to earlier positions.
      drop: function applied to the probabilities before they weight the values, such as dropout.
      replace: (role, array) → array; applied to the query (divided by its scale), key and value of all heads, and to the
        probabilities before `drop`. `SelfAttention` passes its taps here.

    Raises:
      UserError: The channels do not divide into heads, or queries and keys have different widths.
    """
    if query.shape[-1] != key.shape[-1]:
        raise UserError(
            f"queries have {query.shape[-1]} features and keys {key.shape[-1]}: give both the same width"
        )
    query, key, value = map(as_float, (query, key, value))
    split = partial(_split_heads, heads=heads)
    head_features = head_features or query.shape[-1] // heads
    scale = np.sqrt(head_features).astype(query.dtype)
    q = replace("query", split(query / scale))
    k, v = replace("key", split(key)), replace("value", split(value))
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    allowed = _allowed(mask, causal, query.shape[1])
    if allowed is not None:
        # Added rather than selected: runtimes have no fast selection.
        lowest = jnp.finfo(jnp.float32).min
        scores = scores + jnp.where(allowed, 0, lowest).astype(jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    probabilities = replace("probabilities", probabilities)
    context = drop(probabilities) @ v  # [b, heads, l, d' / heads]
    context = context.swapaxes(1, 2).reshape(value.shape)
    return Attended(context, probabilities, scores)


def attend_groups(
    query: jax.Array | GroupArrays,
    key: jax.Array | GroupArrays,
    value: jax.Array | GroupArrays,
    *,
    heads: int,
    attend: Callable[..., Attended] = attend,
) -> Attended:
    """Computes attention on arrays, or on tuples of their channel groups; in the second case the context is a tuple, too.

    Groups are joined unless all three have the same number of groups, and it divides the heads.

    Args:
      query, key, value: see `attend`, or tuples of groups of neighbouring channels.
      heads: number of all heads.
      attend: (query, key, value, heads=...) → `Attended`.
    """
    arrays = query, key, value
    counts = {len(a) if isinstance(a, tuple) else 1 for a in arrays}
    if len(counts) > 1 or counts == {1} or heads % max(counts):
        return attend(*map(join_groups, arrays), heads=heads)
    # Heads do not exchange values, so attention runs on each group of heads.
    by_group = [
        attend(*qkv, heads=heads // len(query)) for qkv in zip(*arrays, strict=True)
    ]
    context, *maps = zip(*by_group, strict=True)
    return Attended(context, *(jnp.concatenate(m, 1) for m in maps))


def is_grouped(x: jax.Array | GroupArrays, groups: int) -> bool:
    """Returns whether x is a tuple of so many channel groups."""
    return isinstance(x, tuple) and len(x) == groups


def join_groups(x: jax.Array | GroupArrays) -> jax.Array:
    """Returns the channels of all groups as one array."""
    return jnp.concatenate(x, -1) if isinstance(x, tuple) else x


def _split_heads(x, heads):
    """Splits the channels into heads: [b, l, d] → [b, heads, l, d / heads]."""
    if x.shape[-1] % heads:
        raise UserError(
            f"{x.shape[-1]} features do not divide into heads={heads}: choose a divisor"
        )
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _allowed(mask, causal: bool, length: int):
    """Returns which keys each query may attend to, bool [b or 1, 1, l or 1, l]; None for all."""
    allowed = None if mask is None else mask.astype(bool)[:, None, None, :]
    if causal:
        not_later = np.tri(length, dtype=bool)[None, None]
        allowed = not_later if allowed is None else allowed & not_later
    return allowed


class Groups(NamedTuple):
    """The number of groups of each convolution in an encoder layer; with 1 group everywhere it is the usual, dense layer.

    Attributes:
      query, key, value: projections to the heads.
      output: projection of attention's result.
      ffn_in, ffn_out: first and second layer of the position-wise feed-forward network.
    """

    query: int = 1
    key: int = 1
    value: int = 1
    output: int = 1
    ffn_in: int = 1
    ffn_out: int = 1


class SelfAttention(nn.Module):
    """Self-attention with the projections query, key, value and output, which are convolutions with kernel 1.

    Attributes:
      heads: number of heads; divides the channels.
      groups: numbers of groups of the convolutions.
      dropout: dropout rate of the probabilities, 0 to 1; needs the rng "dropout" in training.
      causal: whether a position attends only to itself and to earlier positions.
      kernel_init: initializer of the kernels.
      output_init: initializer of the output projection's kernel; None for `kernel_init`.
      shuffle: whether each group of the output projection reads channels of every group of the values; see
        `shuffle_channels`. It has no effect if that projection has 1 group.
      features: number of channels of query, key and value; None for the input's. This number also sets the scale of the
        products if `widths` give queries and keys another number of channels. So channels that are zero can be removed.
    """

    heads: int
    groups: Groups = Groups()
    dropout: float = 0.0
    causal: bool = False
    kernel_init: Callable = nn.initializers.truncated_normal(0.02)
    output_init: Callable | None = None
    shuffle: bool = False
    features: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, Attended]:
        """Applies the layer.

        Args:
          x: [b, l, d].
          mask: padding mask, bool [b, l], True for real tokens; None if all are.
          train: whether to apply dropout.

        Returns:
          [b, l, d], and the outputs of `attend`.
        """
        features = self.features or x.shape[-1]
        dtype = float_dtype(x)
        project = partial(Conv, features, (1,), dtype=dtype)
        groups, init = self.groups, self.kernel_init
        # Groups of whole heads can stay separate arrays from the projections on.
        same_groups = len(set(groups[:3])) == 1 and self.heads % groups.query == 0
        query, key, value = (
            project(
                feature_group_count=getattr(groups, name), kernel_init=init, name=name
            )(x, join_groups=not same_groups)
            for name in ("query", "key", "value")
        )
        attention = partial(
            attend,
            head_features=features // self.heads,
            mask=mask,
            causal=self.causal,
            drop=partial(Dropout(self.dropout), train=train),
            replace=partial(tap, self),
        )
        init = self.output_init or init
        output = Conv(
            x.shape[-1],
            (1,),
            feature_group_count=groups.output,
            dtype=dtype,
            kernel_init=init,
            name="output",
        )
        attended = attend_groups(query, key, value, heads=self.heads, attend=attention)
        context = attended.context
        if self.shuffle or not is_grouped(context, groups.output):
            context = join_groups(context)
        if self.shuffle and groups.output > 1:
            context = shuffle_channels(context, groups.value, groups.output)
        return output(context), attended._replace(context=context)


def shuffle_channels(x: jax.Array, before: int, after: int) -> jax.Array:
    """Reorders channels between two grouped convolutions, so that each group of the second reads every group of the first.

    Each group of the second convolution gets the same number of neighbouring channels from each group of the first. This is
    the channel shuffle of ShuffleNet (arXiv 1707.01083, section 3.1), except for the order of channels inside the groups.
    That order does not matter, because the weights are learned for it. Whole blocks of channels are faster to move. If
    before * after does not divide c, the order is ShuffleNet's own, and the numbers of channels differ by up to one.

    Args:
      x: [..., c].
      before: number of groups of the first convolution; divides c.
      after: number of groups of the second convolution; divides c.
    """
    channels = x.shape[-1]
    blocks = channels // before if channels % (before * after) else after
    y = x.reshape(*x.shape[:-1], before, blocks, -1)
    return y.swapaxes(-2, -3).reshape(x.shape)
