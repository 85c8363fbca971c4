"""Self-attention of several heads, its projections convolutions with kernel 1."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import as_float, float_dtype
from squeeze_jax.nn.intercept import tap


class Attended(NamedTuple):
    """What attention gives: the mixed values, and how it came to them.

    Attributes:
      context: [b, l, d] in the dtype of the values.
      probabilities: [b, heads, l, l], after the softmax and before dropout; each row sums to one.
      scores: [b, heads, l, l], float32, before the softmax; the lowest float32 where a key may not be seen.
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
    """softmax(Q K^T / sqrt(d / heads)) V in each head; Vaswani et al. 2017, arXiv 1706.03762, equation 1.

    Args:
      query, key: [b, l, d]; a head has d / heads neighbouring channels.
      value: [b, l, d'].
      heads: divides d and d'.
      head_features: whose square root divides the products; None for d / heads.
      mask: bool [b, l], True where a key may be seen; None for everywhere. A position that may see none sees all alike.
      causal: a position sees none that come after it.
      drop: applied to the probabilities before they weigh the values.
      replace: (role, array) → an array; applied to the split query, key and value, the query divided by its scale, and
        to the probabilities before `drop`; `SelfAttention` passes its taps.

    Raises:
      UserError: channels that do not divide into heads, or queries of another width than keys.
    """
    if query.shape[-1] != key.shape[-1]:
        raise UserError(
            f"queries have {query.shape[-1]} features and keys {key.shape[-1]}: give both the same width"
        )
    query, key, value = map(as_float, (query, key, value))
    split = partial(_split, heads=heads)
    head_features = head_features or query.shape[-1] // heads
    scale = np.sqrt(head_features).astype(query.dtype)
    q = replace("query", split(query / scale))
    k, v = replace("key", split(key)), replace("value", split(value))
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    allowed = _allowed(mask, causal, query.shape[1])
    if allowed is not None:
        # A sum, because runtimes have no quick selection.
        lowest = jnp.finfo(jnp.float32).min
        scores = scores + jnp.where(allowed, 0, lowest).astype(jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    probabilities = replace("probabilities", probabilities)
    context = drop(probabilities) @ v  # [b, heads, l, d' / heads]
    context = context.swapaxes(1, 2).reshape(value.shape)
    return Attended(context, probabilities, scores)


def _split(x, heads):
    """[b, l, d] → [b, heads, l, d / heads]."""
    if x.shape[-1] % heads:
        raise UserError(
            f"{x.shape[-1]} features do not divide into heads={heads}: choose a divisor"
        )
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _allowed(mask, causal: bool, length: int):
    """bool [b or 1, 1, l or 1, l], or None where everything is allowed."""
    seen = None if mask is None else mask.astype(bool)[:, None, None, :]
    if causal:
        earlier = np.tri(length, dtype=bool)[None, None]
        seen = earlier if seen is None else seen & earlier
    return seen


class Groups(NamedTuple):
    """Groups of each convolution of an encoder's layer; all 1 is the dense layer.

    The first four are attention's, the last two of the position-wise feed-forward network, into and out of it.
    """

    query: int = 1
    key: int = 1
    value: int = 1
    output: int = 1
    ffn_in: int = 1
    ffn_out: int = 1


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, between convolutions query, key, value and output with kernel 1.

    Attributes:
      heads: of attention; they divide the channels.
      groups: of the convolutions.
      dropout: rate on the probabilities, 0 to 1; needs the rng "dropout" in training.
      causal: a position sees none that come after it.
      kernel_init: initializer of the kernels.
      output_init: of that of output; None for `kernel_init`.
      shuffle: where output has groups, each of them sees a part of every group of the values, see `shuffled`.
      features: of query, key and value; None for those of the input. The scale of the products is that of these features
        also where queries and keys have another width, so that channels of zeros can be cut off.
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
        """x: [b, l, d], mask: bool [b, l] → [b, l, d] and what `attend` gave."""
        features = self.features or x.shape[-1]
        dtype = float_dtype(x)
        project = partial(Conv, features, (1,), dtype=dtype)
        groups, init = self.groups, self.kernel_init
        alike = len(set(groups[:3])) == 1 and self.heads % groups.query == 0
        query, key, value = (
            project(
                feature_group_count=getattr(groups, name), kernel_init=init, name=name
            )(x, whole=not alike)
            for name in ("query", "key", "value")
        )
        heads = partial(
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
        if isinstance(query, tuple):  # heads do not mix, so groups stay apart
            each = [
                heads(*qkv, heads=self.heads // len(query))
                for qkv in zip(query, key, value, strict=True)
            ]
            context, *maps = zip(*each, strict=True)
            if self.shuffle or groups.output != len(query):
                context = jnp.concatenate(context, -1)
            attended = Attended(context, *(jnp.concatenate(m, 1) for m in maps))
        else:
            attended = heads(query, key, value, heads=self.heads)
        mixed = attended.context
        if self.shuffle and groups.output > 1:
            mixed = shuffled(mixed, groups.value, groups.output)
        return output(mixed), attended


def shuffled(x: jax.Array, before: int, after: int) -> jax.Array:
    """Gives every group of the next convolution as many neighbouring channels of each group of the one before.

    The channel shuffle of ShuffleNet (arXiv 1707.01083, section 3.1) but for the order inside the next groups, which
    their weights make up for; whole pieces of channels are quicker to move.

    Args:
      x: [b, l, c].
      before, after: groups of the convolutions; their product divides c.

    Raises:
      UserError: channels that do not divide.
    """
    check_shuffle(x.shape[-1], before, after)
    pieces = x.reshape(*x.shape[:-1], before, after, -1)
    return pieces.swapaxes(-2, -3).reshape(x.shape)


def check_shuffle(features: int, before: int, after: int) -> None:
    """Checks that channels of some groups divide among the next ones; see `shuffled`.

    Raises:
      UserError: they do not.
    """
    if after > 1 and features % (before * after):
        raise UserError(
            f"{features} features of {before} groups do not shuffle into {after} groups: the product should divide them"
        )
