"""From tokens to vectors, and back to scores of tokens."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.composite import exported_as
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.layer_norm import Normalization, norm

# {the name in `transformers`: ours}.
NAMES = {
    "input_ids": "tokens",
    "token_type_ids": "segments",
    "attention_mask": "attended",
}
READS = ("tokens", "segments", "attended", "position_ids")


class Text(NamedTuple):
    """A batch of token sequences; all arrays are [b, l], and all but the tokens may be None.

    Attributes:
      tokens: int.
      segments: int.
      attended: bool, the padding mask: True for real tokens.
      position_ids: int, each token's row in the table of positions.
    """

    tokens: jax.Array
    segments: jax.Array | None = None
    attended: jax.Array | None = None
    position_ids: jax.Array | None = None


class Sizes(NamedTuple):
    """Rows of the tables of embeddings, which bound the integers that a network reads; None for no bound.

    Attributes:
      vocabulary, positions: rows.
      segments: rows; a network with 0 or 1 ignores segments.
    """

    vocabulary: int | None = None
    segments: int | None = None
    positions: int | None = None


UNBOUNDED = Sizes()


def named(
    x: Mapping[str, Any], reads: Sequence[str], network: str = "an encoder"
) -> dict[str, Any]:
    """Returns a network's inputs under our names, also from those of `transformers`; entries of None are left out.

    Args:
      x: {name: array}, such as {"input_ids": [b, l], "attention_mask": [b, l]}.
      reads: our names of all inputs that the network has.
      network: what an error calls it.

    Raises:
      UserError: no mapping, an unknown name, no tokens, or one input under both names.
    """
    if not isinstance(x, Mapping):
        arrays = ", ".join(f'"{name}"' for name in reads)
        raise UserError(
            f"{network} is called with a mapping from names to arrays, of {arrays}, not with {type(x).__name__}"
        )
    inputs = {}
    for key, array in x.items():
        if array is None:
            continue
        name = NAMES.get(key, key)
        if name not in reads:
            raise UserError(f"{network} has no input {key!r}{_hint(key, reads)}")
        if name in inputs:
            raise UserError(f"inputs have {name!r} twice, once as {key!r}: give one")
        inputs[name] = array
    if "tokens" not in inputs:
        present = ", ".join(map(repr, x)) or "nothing"
        raise UserError(
            f"{network} needs the input 'tokens' (or 'input_ids'): there is {present}"
        )
    return inputs


def _hint(key, reads) -> str:
    if "mask" in str(key) and "attended" in reads:
        return (
            ": the padding mask is 'attended' (or 'attention_mask'), [b, l], true for real tokens;"
            f" choose from {', '.join(reads)}"
        )
    return nearest(key, [*reads, *(k for k, ours in NAMES.items() if ours in reads)])


def text(
    x: Mapping[str, Any],
    *,
    choices: bool = False,
    sizes: Sizes = UNBOUNDED,
    others: Sequence[str] = (),
    reads: Sequence[str] = READS,
    network: str = "an encoder",
) -> Text:
    """Checks a network's inputs and returns its token sequences.

    Args:
      x: {"tokens": int [b, l], "segments": int [b, l], "attended": bool or int [b, l], "position_ids": int [b, l]}, or
        under the names of `transformers` in `NAMES`. All but the tokens may be left out: segments of 0, all tokens
        real, positions that count from the first token.
      choices: arrays are [b, choices, l]; the result has b * choices sequences.
      sizes: what bounds the integers. Arrays that are traced inside `jax.jit` have no values to check.
      others: names of inputs that the network reads besides.
      reads: which of the names in `READS` it has.
      network: what an error calls it.

    Raises:
      UserError: see `named`; arrays of other shapes or types, and integers beyond the tables.
    """
    inputs = named(x, (*reads, *others), network)
    if "token_type_ids" in x and sizes.segments == 0:
        raise UserError(
            f"{network} has no segments: leave out 'token_type_ids' ('segments' are ignored)"
        )
    axes = "[b, choices, l]" if choices else "[b, l]"
    shape = tuple(_integers("tokens", inputs["tokens"], axes).shape)
    if len(shape) != (3 if choices else 2) or 0 in shape:
        raise UserError(f"tokens should be {axes}, their shape is {shape}")
    arrays = {name: inputs[name] for name in Text._fields if name in inputs}
    for name, array in arrays.items():
        _integers(name, array, axes, also_bool=name == "attended")
        if tuple(array.shape) != shape:
            raise UserError(
                f"{name} has the shape {tuple(array.shape)}, tokens have {shape}: they should be equal"
            )
    _check_range("tokens", arrays, sizes.vocabulary, "vocabulary")
    # Our batches always have segments: networks with one or none ignore them.
    several = "token_type_ids" in x or (sizes.segments or 0) > 1
    _check_range("segments", arrays, sizes.segments if several else None, "segments")
    _check_range("position_ids", arrays, sizes.positions, "positions")
    if "attended" in arrays:
        arrays["attended"] = arrays["attended"] != 0
    rows = {name: array.reshape(-1, shape[-1]) for name, array in arrays.items()}
    return Text(**rows)


def _integers(name, array, axes, *, also_bool=False):
    """Returns an array of integers; a UserError names anything else."""
    kinds = (jnp.integer, jnp.bool_) if also_bool else (jnp.integer,)
    dtype, what = getattr(array, "dtype", None), type(array).__name__
    if isinstance(dtype, np.dtype):
        what = dtype
        if any(jnp.issubdtype(dtype, kind) for kind in kinds):
            return array
    wanted = "integers or booleans" if also_bool else "integers"
    raise UserError(f"{name} should be an array of {wanted} {axes}, not {what}")


def _check_range(name, arrays, size, table) -> None:
    """Checks the values of an array that has some: an index beyond a table would silently read its last row."""
    array = arrays.get(name)
    concrete = not isinstance(array, jax.core.Tracer)
    if array is None or size is None or not concrete:
        return
    if not getattr(array, "is_fully_addressable", True):
        return
    values = np.asarray(array)  # not an operation, which would be traced
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high >= size:
        raise UserError(
            f"{name} have {low if low < 0 else high}: the network's {table} are 0 to {size - 1}"
        )


def positions(x: Mapping[str, Any]) -> jax.Array | None:
    """The positions whose tokens alone shall be scored, int [b, p], or None for all.

    Args:
      x: what `named` returns; "positions" int [b, p] may be left out.

    Raises:
      UserError: an array of another shape.
    """
    array = x.get("positions")
    if array is None:
        return None
    _integers("positions", array, "[b, p]")
    rows = x["tokens"].shape[0]
    if array.ndim != 2 or array.shape[0] != rows:
        raise UserError(
            f"positions should be [b, p], a row for each of {rows} sequences: their shape is {tuple(array.shape)}"
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
