"""From tokens to vectors, and back to scores of tokens."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.nn.composite import exported_as
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.layer_norm import Normalization, norm


class Text(NamedTuple):
    """A batch of token sequences: tokens int [b, l], segments int [b, l] or None, mask bool [b, l] or None."""

    tokens: jax.Array
    segments: jax.Array | None
    mask: jax.Array | None


def text(x: Mapping[str, Any], *, choices: bool = False) -> Text:
    """Takes apart what an encoder is called with.

    Args:
      x: {"tokens": int [b, l], "segments": int [b, l], "mask": bool [b, l]}; the last two may be left out, which means
        segment 0, and all tokens real.
      choices: arrays are [b, choices, l]; the result has b * choices sequences.

    Raises:
      UserError: no tokens, no integers, or arrays of other shapes.
    """
    if not isinstance(x, Mapping) or "tokens" not in x:
        raise UserError(
            'an encoder is called with a mapping {"tokens": int [b, l], "segments": int [b, l], "mask": bool [b, l]}'
        )
    axes = "[b, choices, l]" if choices else "[b, l]"
    dtype = getattr(x["tokens"], "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        kind = type(x["tokens"]).__name__ if dtype is None else dtype
        raise UserError(f"tokens should be an array of integers {axes}, not {kind}")
    shape = tuple(x["tokens"].shape)
    if len(shape) != (3 if choices else 2) or 0 in shape:
        raise UserError(f"tokens should be {axes}, their shape is {shape}")
    arrays = {key: x.get(key) for key in Text._fields}
    for key, array in arrays.items():
        if array is not None and tuple(array.shape) != shape:
            raise UserError(
                f"{key} has the shape {tuple(array.shape)}, tokens have {shape}: they should be equal"
            )

    def rows(a):
        return None if a is None else a.reshape(-1, shape[-1])

    return Text(*map(rows, arrays.values()))


def positions(x: Mapping[str, Any]) -> jax.Array | None:
    """The positions whose tokens alone shall be scored, int [b, p], or None for all.

    Args:
      x: what an encoder is called with; "positions" int [b, p] may be left out.

    Raises:
      UserError: an array of another shape.
    """
    array = x.get("positions")
    if array is not None and (array.ndim != 2 or len(array) != len(x["tokens"])):
        raise UserError(
            f"positions should be [b, p], a row for each of {len(x['tokens'])} sequences: their shape is {tuple(array.shape)}"
        )
    return array


def _rows(ids, table):
    return jnp.asarray(table).at[ids].get(mode="clip", wrap_negative_indices=False)


_lookup = exported_as("odml.embedding_lookup", _rows)


class Embed(nn.Module):
    """A table of vectors, named as in `flax.linen.Embed`: embedding [size, features].

    Attributes:
      size: rows; an index beyond them means the last.
      features: of a row.
    """

    size: int
    features: int
    embedding_init: Callable = nn.initializers.truncated_normal(0.02)

    def setup(self):
        shape = (self.size, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: int [...] → [..., features], float32."""
        return _lookup(ids.reshape(-1), self.embedding).reshape(*ids.shape, -1)

    def first(self, length: int, after: int = 0) -> jax.Array:
        """The first rows after some, [length, features]."""
        return self.embedding[after : after + length]

    def scores(self, x: jax.Array) -> jax.Array:
        """x: [..., features] → products with every row [..., size], float32."""
        x = as_float(x)
        table = self.embedding.astype(x.dtype)
        # One matrix product over all positions: on a CPU much quicker than a batched one.
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.matmul(rows, table.T, preferred_element_type=jnp.float32)
        return y.reshape(*x.shape[:-1], -1)


class Embeddings(nn.Module):
    """The sum of embeddings of tokens, positions and segments, normalised; BERT's Figure 2.

    Attributes:
      vocabulary: tokens.
      features: of the embeddings.
      positions: the longest sequence.
      segments: rows of the table of segments; 0 for none.
      dropout: rate after the normalisation, 0 to 1; needs the rng "dropout" in training.
      epsilon: of the normalisation; None for no normalisation.
      dtype: of the result.
      before: rows of the table of positions before that of the first token.
      token_features: of the tokens' table, where a convolution takes them to `features`; None for those.
      window: tokens that this convolution sees, the others at both sides; beyond the ends they are zero.
      normalization: which one.
    """

    vocabulary: int
    features: int
    positions: int
    segments: int = 2
    dropout: float = 0.0
    epsilon: float | None = 1e-12
    dtype: Any = jnp.float32
    before: int = 0
    token_features: int | None = None
    window: int = 1
    normalization: Normalization = "layer_norm"

    def setup(self):
        self.tokens = Embed(self.vocabulary, self.token_features or self.features)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        *,
        at: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """tokens, segments: int [b, l] → [b, l, features].

        `at` gives each token's row in the table of positions, int [b, l]; by default they count from `before`. No
        segments are segment 0.

        Raises:
          UserError: sequences longer than there are positions.
        """
        length = tokens.shape[-1]
        if length > self.positions:
            raise UserError(
                f"sequences of {length} tokens are longer than the {self.positions} positions: cut them, or make the"
                f" encoder with positions={length}"
            )
        rows = self.before + self.positions
        table = Embed(rows, self.features, name="positions")
        where = table.first(length, self.before) if at is None else table(at)
        y = self.tokens(tokens)
        if self.token_features is not None:
            init = nn.initializers.truncated_normal(0.02)
            y = Conv(
                self.features,
                (self.window,),
                dtype=y.dtype,
                kernel_init=init,
                fixed=True,
                name="widen",
            )(y)
        y = y + where
        if self.segments:
            table = Embed(self.segments, self.features, name="segments")
            y = y + (table.first(1) if segments is None else table(segments))
        if self.epsilon is not None:
            y = norm(self.normalization, self.epsilon, name="norm")(y)
        drop = partial(Dropout(self.dropout), train=train)
        return drop(y.astype(self.dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """x: [..., token_features] → scores of each token [..., vocabulary], float32: the output tied to the input."""
        return self.tokens.scores(x)
