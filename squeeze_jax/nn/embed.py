"""Embeddings of tokens, and checks of the inputs of networks that read tokens."""

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
from squeeze_jax.nn.parameter import parameter

# {name of an input in `transformers`: our name}
TRANSFORMERS_NAMES = {
    "input_ids": "tokens",
    "token_type_ids": "segments",
    "attention_mask": "attended",
}
TEXT_INPUTS = ("tokens", "segments", "attended", "position_ids")


class Text(NamedTuple):
    """A batch of token sequences; all arrays are [b, l], and all except `tokens` may be None.

    Attributes:
      tokens: int, indices into the vocabulary.
      segments: int, the segment of each token.
      attended: bool, the padding mask: True for real tokens.
      position_ids: int, each token's row in the table of position embeddings.
    """

    tokens: jax.Array
    segments: jax.Array | None = None
    attended: jax.Array | None = None
    position_ids: jax.Array | None = None


class Sizes(NamedTuple):
    """The numbers of rows of the embedding tables; they bound the integers that a network accepts. None means no bound.

    Attributes:
      vocabulary: rows of the token table.
      segments: rows of the segment table; a network with 0 or 1 ignores segments.
      positions: rows of the position table.
    """

    vocabulary: int | None = None
    segments: int | None = None
    positions: int | None = None


UNBOUNDED = Sizes()


def named_inputs(
    x: Mapping[str, Any], reads: Sequence[str], network: str = "an encoder"
) -> dict[str, Any]:
    """Returns a network's inputs under this library's names; inputs that are None are left out.

    Args:
      x: {name: array} under our names or those of `transformers`, such as {"input_ids": [b, l], "attention_mask": [b, l]}.
      reads: our names of all inputs of the network.
      network: name of the network in error messages.

    Raises:
      UserError: `x` is not a mapping, a name is unknown, there are no tokens, or one input is there under both names.
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
        name = TRANSFORMERS_NAMES.get(key, key)
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
    foreign = (k for k, ours in TRANSFORMERS_NAMES.items() if ours in reads)
    return nearest(key, [*reads, *foreign])


def text_inputs(
    x: Mapping[str, Any],
    *,
    choices: bool = False,
    sizes: Sizes = UNBOUNDED,
    others: Sequence[str] = (),
    reads: Sequence[str] = TEXT_INPUTS,
    network: str = "an encoder",
) -> Text:
    """Checks a network's inputs and returns its token sequences.

    Args:
      x: {"tokens": int [b, l], "segments": int [b, l], "attended": bool or int [b, l], "position_ids": int [b, l]}, or the
        same under the names of `transformers` in `TRANSFORMERS_NAMES`. Everything except the tokens may be left out: then
        all segments are 0, all tokens are real, and positions count from the first token.
      choices: whether the arrays are [b, choices, l]; the result then has b * choices sequences.
      sizes: upper bounds of the integers. Arrays that `jax.jit` traces are not checked, because they have no values.
      others: names of further inputs that the network accepts.
      reads: names in `TEXT_INPUTS` that the network accepts.
      network: name of the network in error messages.

    Raises:
      UserError: See `named_inputs`; also if an array has a wrong shape or dtype, or integers beyond a table.
    """
    inputs = named_inputs(x, (*reads, *others), network)
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
    # This library's batches always have segments, and networks with at most one segment ignore them.
    reads_segments = "token_type_ids" in x or (sizes.segments or 0) > 1
    segments = sizes.segments if reads_segments else None
    _check_range("segments", arrays, segments, "segments")
    _check_range("position_ids", arrays, sizes.positions, "positions")
    if "attended" in arrays:
        arrays["attended"] = arrays["attended"] != 0
    rows = {name: array.reshape(-1, shape[-1]) for name, array in arrays.items()}
    return Text(**rows)


def _integers(name, array, axes, *, also_bool=False):
    """Returns the array if its dtype is an integer type; otherwise raises a UserError."""
    kinds = (jnp.integer, jnp.bool_) if also_bool else (jnp.integer,)
    dtype, description = getattr(array, "dtype", None), type(array).__name__
    if isinstance(dtype, np.dtype):
        description = dtype
        if any(jnp.issubdtype(dtype, kind) for kind in kinds):
            return array
    wanted = "integers or booleans" if also_bool else "integers"
    raise UserError(f"{name} should be an array of {wanted} {axes}, not {description}")


def _check_range(name, arrays, size, table) -> None:
    """Raises a UserError if an array has indices beyond a table, which would silently read the table's last row.

    Arrays without values on this host, such as traced ones, are not checked.
    """
    array = arrays.get(name)
    concrete = not isinstance(array, jax.core.Tracer)
    if array is None or size is None or not concrete:
        return
    if not getattr(array, "is_fully_addressable", True):
        return
    values = np.asarray(array)  # NumPy, because an operation of JAX could be traced
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high >= size:
        raise UserError(
            f"{name} have {low if low < 0 else high}: the network's {table} are 0 to {size - 1}"
        )


def scored_positions(x: Mapping[str, Any]) -> jax.Array | None:
    """Returns the positions at which a head computes logits of tokens, int [b, p]; None for all positions.

    Args:
      x: inputs as `named_inputs` returns them, with or without "positions".

    Raises:
      UserError: "positions" is not an array of integers [b, p].
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
    """An embedding table, the parameter embedding [size, features] as in `flax.linen.Embed`.

    Attributes:
      size: number of rows; an index beyond them reads the last row.
      features: number of channels of a row.
      embedding_init: initializer of the table.
    """

    size: int
    features: int
    embedding_init: Callable = nn.initializers.truncated_normal(0.02)

    def setup(self):
        """Creates the layers."""
        shape = (self.size, self.features)
        self.embedding = parameter(self, "embedding", self.embedding_init, shape)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns the rows of some indices: int [...] → float32 [..., features]."""
        return _lookup(ids.reshape(-1), self.embedding).reshape(*ids.shape, -1)

    def rows(self, length: int, start: int = 0) -> jax.Array:
        """Returns `length` consecutive rows from row `start` on, [length, features]."""
        return self.embedding[start : start + length]

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns the products of vectors with every row: [..., features] → float32 [..., size]."""
        x = as_float(x)
        table = self.embedding.astype(x.dtype)
        # One matrix product over all positions is much faster on a CPU than a batched product.
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.matmul(rows, table.T, preferred_element_type=jnp.float32)
        return y.reshape(*x.shape[:-1], -1)


class Embeddings(nn.Module):
    """The input layer of an encoder: the normalised sum of token, position and segment embeddings.

    Devlin et al. 2018 (BERT), arXiv 1810.04805, Figure 2.

    Attributes:
      vocabulary: number of tokens.
      features: number of channels of the embeddings.
      positions: length of the longest sequence.
      segments: rows of the segment table; 0 for no segments.
      dropout: dropout rate after the normalisation, 0 to 1; needs the rng "dropout" in training.
      epsilon: added to the variance of the normalisation; None for no normalisation.
      dtype: dtype of the result.
      before: rows of the position table that come before the first token's row.
      token_features: channels of the token table, which a convolution widens to `features`; None for a table with
        `features` channels and no convolution.
      window: kernel size of that convolution: how many neighbouring tokens it reads; tokens beyond the ends are zero.
      normalization: kind of normalisation.
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
        """Creates the layers."""
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
        """Returns the embeddings of token sequences, [b, l, features].

        Args:
          tokens: int [b, l].
          segments: int [b, l]; None for segment 0 everywhere.
          at: int [b, l], each token's row in the position table; None to count from row `before` on.
          train: whether to apply dropout.

        Raises:
          UserError: A sequence is longer than `positions`.
        """
        length = tokens.shape[-1]
        if length > self.positions:
            raise UserError(
                f"sequences of {length} tokens are longer than the {self.positions} positions: cut them, or make the"
                f" encoder with positions={length}"
            )
        row_count = self.before + self.positions
        table = Embed(row_count, self.features, name="positions")
        position = table.rows(length, self.before) if at is None else table(at)
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
        y = y + position
        if self.segments:
            table = Embed(self.segments, self.features, name="segments")
            y = y + (table.rows(1) if segments is None else table(segments))
        if self.epsilon is not None:
            y = norm(self.normalization, self.epsilon, name="norm")(y)
        drop = partial(Dropout(self.dropout), train=train)
        return drop(y.astype(self.dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns logits of all tokens by the transposed token table: [..., token_features] → float32 [..., vocabulary]."""
        return self.tokens.scores(x)
