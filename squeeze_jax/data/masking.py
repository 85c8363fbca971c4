"""Masked tokens, chosen on the accelerator: which, and what stands in their places.

Devlin et al., arXiv 1810.04805, section 3.1: of the tokens a share is chosen; of these 80% become [MASK], 10% a random
token, and 10% stay. They are chosen anew whenever a sequence is seen (Liu et al., arXiv 1907.11692, section 4.1), here as a
function of one number of each row, so that the same number chooses the same tokens on any machine and in any batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError


class Masking(NamedTuple):
    """How tokens are masked; see `make`.

    Attributes:
      mask: the id that stands for a masked token.
      size: of the vocabulary, from which random tokens come.
      special: ids that are never chosen.
      share: of the tokens that may be chosen, in (0, 1).
      positions: at most so many of a sequence.
      masked, random: shares of those chosen that become `mask`, and a random token.
      continues: bool [size], whether a token goes on with the word before it, or None to choose tokens by themselves.
    """

    mask: int
    size: int
    special: tuple[int, ...]
    share: float
    positions: int
    masked: float = 0.8
    random: float = 0.1
    continues: np.ndarray | None = None


def make(
    tokenizer: Tokenizer,
    *,
    share: float,
    positions: int,
    masked: float,
    random: float,
    whole_words: bool,
) -> Masking:
    """Checks how tokens shall be masked.

    Raises:
      UserError: shares out of range, a tokenizer without a mask, or words that cannot be told.
    """
    if not 0 < share < 1:
        raise UserError(f"config.data.share = {share} should lie between 0 and 1")
    if min(masked, random) < 0 or masked + random > 1:
        raise UserError(
            f"config.data.masked = {masked} and random = {random} should be shares that are at most 1 together"
        )
    if tokenizer.mask is None:
        raise UserError(
            "config.data.tokenizer has no token that stands for a masked one, such as [MASK]: choose another, or"
            " kind = 'causal'"
        )
    special = (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask)
    return Masking(
        tokenizer.mask,
        tokenizer.size,
        tuple(sorted({id for id in special if id is not None})),
        share,
        positions,
        masked,
        random,
        continuations(tokenizer) if whole_words else None,
    )


def continuations(tokenizer: Tokenizer) -> np.ndarray:
    """Whether each token goes on with the word before it, bool [size].

    WordPiece marks those that do with "##", byte-level pairs those that do not with a space, "Ġ".

    Raises:
      UserError: a vocabulary with neither mark.
    """
    tokens = [tokenizer.token(id) for id in range(tokenizer.size)]
    for mark, continues in ("##", True), ("Ġ", False):
        marked = np.array([token.startswith(mark) for token in tokens])
        if marked.any():
            return marked == continues
    raise UserError(
        "config.data.whole_words: the tokenizer's vocabulary marks neither beginnings of words (Ġ) nor what follows (##)"
    )


def apply(
    draws: jax.Array, tokens: jax.Array, attended: jax.Array, how: Masking
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses max(1, round(share n)) of the n tokens that may be, at most `positions`, without repetition; under jit.

    Where words are kept whole it takes words in random order until so many tokens are chosen, and passes over those of
    more tokens than are still wanted; fewer are chosen where all that are left have more.

    Args:
      draws: int [b], the number of each row.
      tokens, attended: [b, l]; what is not attended is not chosen, nor are special tokens.
      how: see `make`.

    Returns:
      The masked tokens [b, l], and of p = min(positions, l) places: where they are int32 [b, p], what was there int32
      [b, p], and which count, bool [b, p]: where there are fewer to choose the others point to anything.
    """
    return jax.vmap(lambda *row: _apply(*row, how))(draws, tokens, attended)


def on_host(how: Masking) -> Callable[..., np.ndarray]:
    """Returns `(draws, tokens, attended) → tokens` as `apply` masks them, numpy, on the CPU and for any thread."""
    run = jax.jit(lambda *rows: apply(*rows, how)[0])

    def masked(*arrays):
        rows = len(arrays[0])
        # As few shapes as there are powers of two.
        more = (1 << (rows - 1).bit_length()) - rows
        padded = [np.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.array(run(*padded)[:rows])

    return masked


def _apply(draw, tokens, attended, how):
    length = len(tokens)
    special = jnp.array(how.special, jnp.int32)
    may = attended & (tokens[:, None] != special).all(-1)
    count = jnp.round(how.share * may.sum()).astype(jnp.int32)
    count = jnp.where(may.any(), jnp.maximum(count, 1), 0)
    count = jnp.minimum(count, how.positions)
    places = min(how.positions, length)
    # All at once, as each call takes long to compile.
    noise = jax.random.uniform(jax.random.key(draw), (length + 2 * places,))
    noise, action, other = jnp.split(noise, [length, length + places])
    if how.continues is None:
        _, at = jax.lax.top_k(jnp.where(may, noise, -1.0), places)
        chosen = jnp.arange(places) < count
    else:
        at, chosen = _words(noise, tokens, may, count, how)
        at, chosen = at[:places], chosen[:places]
    targets = tokens[at]
    fresh = jnp.floor(other * how.size).astype(tokens.dtype)
    new = jnp.where(action < how.masked + how.random, fresh, targets)
    new = jnp.where(action < how.masked, how.mask, new)
    # Beyond the end is nowhere.
    where = jnp.where(chosen, at, length)
    return tokens.at[where].set(new, mode="drop"), at.astype(jnp.int32), targets, chosen


def _words(noise, tokens, may, count, how):
    """Positions, those that are chosen before the others, and which these are, both [l]."""
    length = len(tokens)
    first = ~jnp.roll(may, 1).at[0].set(False)
    word = jnp.cumsum(first | ~jnp.asarray(how.continues)[tokens]) - 1
    # The sort keeps the tokens of a word together.
    rank = jnp.where(may, noise[word], 2.0)
    at = jnp.argsort(rank, stable=True)
    word, may = word[at], may[at]

    def of_words(reduce, values):
        """What is reduced over the tokens of a word, for each of its tokens."""
        return getattr(jnp.zeros(length, jnp.int32).at[word], reduce)(values)[word]

    sizes = of_words("add", may.astype(jnp.int32))

    def fitting(chosen):
        return may & ~chosen & (sizes <= count - chosen.sum())

    def take(chosen):
        # One after the other up to the first that does not fit: it will not come again.
        words = fitting(chosen)
        ends = of_words("max", jnp.cumsum(words))
        return chosen | (words & (ends <= count - chosen.sum()))

    start = jnp.zeros(length, bool)
    chosen = jax.lax.while_loop(lambda chosen: fitting(chosen).any(), take, start)
    order = jnp.argsort(~chosen, stable=True)
    return at[order], chosen[order]
