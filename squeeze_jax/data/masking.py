"""Chooses tokens and masks them on the accelerator, for masked language models.

As in Devlin et al., arXiv 1810.04805, section 3.1, a share of the tokens is chosen; 80% of these become [MASK], 10% become a
random token, and 10% stay. The choice is made anew whenever a sequence is seen (Liu et al., arXiv 1907.11692, section 4.1).
Here it is a function of one number per row, so the same number chooses the same tokens on any machine and in any batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError


class Masking(NamedTuple):
    """The options of masking; `make` builds them.

    Attributes:
      mask: the id of the mask token.
      size: of the vocabulary, from which random tokens are drawn.
      special: ids that are never chosen.
      share: the fraction of the other tokens that is chosen, in (0, 1).
      positions: the largest number of chosen tokens in a sequence.
      masked, random: the fractions of the chosen tokens that become `mask`, and a random token; the others stay.
      continues: bool [size], whether a token continues the word before it, to choose whole words; None to choose single tokens.
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
    """Checks and returns the options of masking.

    Args:
      tokenizer: has the vocabulary and the special tokens.
      share, positions, masked, random: see `Masking`.
      whole_words: whether either all tokens of a word are chosen, or none.

    Raises:
      UserError: fractions out of range, a tokenizer without a mask token, or, for `whole_words`, a vocabulary that does not
        mark where words begin.
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
    """Returns whether each token of the vocabulary continues the word before it, bool [size].

    WordPiece marks such tokens with "##". Byte-level BPE marks the other tokens with a space, "Ġ".

    Raises:
      UserError: the vocabulary has neither mark.
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
    draws: jax.Array, tokens: jax.Array, attended: jax.Array, options: Masking
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses tokens of each row at random and masks them; runs under jit.

    In a row with n tokens that may be chosen it chooses max(1, round(share * n)), at most `positions`, and none twice. To keep
    words whole, it takes words in random order until that many tokens are chosen. It passes over words that have more tokens
    than are still wanted, and chooses fewer tokens if all words left are too long.

    Args:
      draws: int [b], the random number that decides the choice in each row.
      tokens: int32 [b, l].
      attended: bool [b, l], the padding mask; padding is never chosen, nor are special tokens.
      options: see `Masking`.

    Returns:
      The masked tokens [b, l]; then, with p = min(positions, l), the chosen positions int32 [b, p], the tokens that were there
      before, int32 [b, p], and whether each of the p entries counts, bool [b, p]. If fewer than p tokens are chosen, the
      entries that do not count hold arbitrary positions.
    """
    return jax.vmap(lambda *row: _mask_row(*row, options))(draws, tokens, attended)


def on_host(options: Masking) -> Callable[..., np.ndarray]:
    """Returns a function of numpy arrays (draws, tokens, attended) that returns the tokens as `apply` masks them.

    It computes on the CPU and may be called from any thread.
    """
    run = jax.jit(lambda *rows: apply(*rows, options)[0])

    def masked(*arrays):
        rows = len(arrays[0])
        # Padding to a power of two keeps the number of compiled shapes small.
        extra = (1 << (rows - 1).bit_length()) - rows
        padded = [np.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.array(run(*padded)[:rows])

    return masked


def _mask_row(draw, tokens, attended, options):
    length = len(tokens)
    special = jnp.array(options.special, jnp.int32)
    maskable = attended & (tokens[:, None] != special).all(-1)
    count = jnp.round(options.share * maskable.sum()).astype(jnp.int32)
    count = jnp.where(maskable.any(), jnp.maximum(count, 1), 0)
    count = jnp.minimum(count, options.positions)
    num_positions = min(options.positions, length)
    # All random numbers are drawn in one call, because each call takes long to compile.
    noise = jax.random.uniform(jax.random.key(draw), (length + 2 * num_positions,))
    noise, action, other = jnp.split(noise, [length, length + num_positions])
    if options.continues is None:
        _, positions = jax.lax.top_k(jnp.where(maskable, noise, -1.0), num_positions)
        chosen = jnp.arange(num_positions) < count
    else:
        positions, chosen = _choose_words(noise, tokens, maskable, count, options)
        positions, chosen = positions[:num_positions], chosen[:num_positions]
    targets = tokens[positions]
    random_tokens = jnp.floor(other * options.size).astype(tokens.dtype)
    new = jnp.where(action < options.masked + options.random, random_tokens, targets)
    new = jnp.where(action < options.masked, options.mask, new)
    # Positions that are not chosen point beyond the end, where `set` drops them.
    destinations = jnp.where(chosen, positions, length)
    masked = tokens.at[destinations].set(new, mode="drop")
    return masked, positions.astype(jnp.int32), targets, chosen


def _choose_words(noise, tokens, maskable, count, options):
    """Returns all positions, the chosen ones first, and whether each is chosen, both [l]."""
    length = len(tokens)
    first = ~jnp.roll(maskable, 1).at[0].set(False)
    word = jnp.cumsum(first | ~jnp.asarray(options.continues)[tokens]) - 1
    # The sort puts words in random order and keeps the tokens of a word together.
    rank = jnp.where(maskable, noise[word], 2.0)
    positions = jnp.argsort(rank, stable=True)
    word, maskable = word[positions], maskable[positions]

    def reduce_words(reduce, values):
        """Reduces values over the tokens of each word; returns the result for each token."""
        return getattr(jnp.zeros(length, jnp.int32).at[word], reduce)(values)[word]

    sizes = reduce_words("add", maskable.astype(jnp.int32))

    def fitting(chosen):
        return maskable & ~chosen & (sizes <= count - chosen.sum())

    def take(chosen):
        # Takes words in order until one exceeds the count. That word no longer fits, so the next iteration skips it.
        words = fitting(chosen)
        ends = reduce_words("max", jnp.cumsum(words))
        return chosen | (words & (ends <= count - chosen.sum()))

    start = jnp.zeros(length, bool)
    chosen = jax.lax.while_loop(lambda chosen: fitting(chosen).any(), take, start)
    order = jnp.argsort(~chosen, stable=True)
    return positions[order], chosen[order]
