"""Which tokens are masked and what stands in their places, against the shares of BERT's paper."""

import jax
import numpy as np

from squeeze_jax.data import masking, tokenizer
from squeeze_jax.data.tokenizer import BERT

PAD, CLS, SEP, MASK = 0, 2, 3, 4
SIZE, ROWS, LENGTH = 1000, 3000, 40


def masks(**options):
    return masking.Masking(MASK, SIZE, (PAD, CLS, SEP, MASK), 0.15, 6)._replace(
        **options
    )


def batch():
    """Rows of 3 to 40 tokens between [CLS] and [SEP]."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, SIZE, (ROWS, LENGTH), np.int32)
    sizes = rng.integers(3, LENGTH + 1, ROWS)
    places = np.arange(LENGTH)
    ids[:, 0] = CLS
    ids[places == sizes[:, None] - 1] = SEP
    attended = places < sizes[:, None]
    return np.where(attended, ids, PAD), attended, sizes - 2


def apply(ids, attended, how, draws=None):
    draws = np.arange(len(ids), dtype=np.int32) if draws is None else draws
    found = jax.jit(lambda *a: masking.apply(*a, how))(draws, ids, attended)
    return [np.asarray(a) for a in found]


def test_how_many_and_which():
    ids, attended, counts = batch()
    masked, at, targets, chosen = apply(ids, attended, masks())
    assert at.shape == targets.shape == chosen.shape == (ROWS, 6)
    expected = np.maximum(np.round(0.15 * counts), 1)
    np.testing.assert_array_equal(chosen.sum(1), expected)
    # What was there, nowhere twice, and nothing else is changed.
    row = np.arange(ROWS)[:, None]
    np.testing.assert_array_equal(targets, ids[row, at])
    assert (targets[chosen] >= 5).all()
    marks = np.zeros_like(ids)
    np.add.at(marks, (np.broadcast_to(row, at.shape)[chosen], at[chosen]), 1)
    assert marks.max() == 1
    assert not (marks.astype(bool) & ~attended).any()
    np.testing.assert_array_equal(masked[marks == 0], ids[marks == 0])


def test_eight_tenths_are_masked_and_a_tenth_is_random():
    ids, attended, _ = batch()
    masked, at, targets, chosen = apply(ids, attended, masks())
    new = np.take_along_axis(masked, at, 1)[chosen]
    old = targets[chosen]
    n = len(new)
    is_mask, same = new == MASK, new == old
    other = new[~is_mask & ~same]
    # Five standard deviations of a binomial distribution; a random token is the old one or [MASK] once in a thousand.
    for count, p in (
        (is_mask.sum(), 0.8 + 0.1 / SIZE),
        (same.sum(), 0.1 + 0.1 / SIZE),
        (len(other), 0.1 - 0.2 / SIZE),
    ):
        assert abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))
    # Uniform: the mean of m numbers below 1000 lies by 1000 / sqrt(12 m) around the middle.
    assert abs(other.mean() - 499.5) < 5 * 1000 / np.sqrt(12 * len(other))


def test_every_place_is_chosen_alike():
    ids = np.full((ROWS, 22), 7, np.int32)
    ids[:, 0], ids[:, -1] = CLS, SEP
    _, at, _, chosen = apply(ids, np.ones_like(ids, bool), masks())
    counts = np.bincount(at[chosen], minlength=22)
    assert counts[[0, -1]].tolist() == [0, 0]
    # Three of twenty.
    expected, sigma = 0.15 * ROWS, np.sqrt(ROWS * 0.15 * 0.85)
    assert np.abs(counts[1:-1] - expected).max() < 5 * sigma


def test_no_more_than_there_is_room_for_and_none_of_nothing():
    ids = np.array([[CLS] + [7] * 38 + [SEP], [CLS, SEP] + [PAD] * 38], np.int32)
    how = masks(positions=4)
    masked, at, _, chosen = apply(ids, ids != PAD, how)
    assert at.shape == (2, 4)
    assert chosen.sum(1).tolist() == [4, 0]
    np.testing.assert_array_equal(masked[1], ids[1])


def test_a_row_depends_on_its_number_alone():
    ids, attended, _ = batch()
    draws = np.random.default_rng(1).integers(0, 2**31, ROWS).astype(np.int32)
    whole = apply(ids, attended, masks(), draws)
    part = apply(ids[7:9], attended[7:9], masks(), draws[7:9])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[7:9], b)
    other = apply(ids, attended, masks(), draws + 1)
    assert (other[0] != whole[0]).any(1).mean() > 0.9


def test_words_are_chosen_whole_or_not_at_all():
    # From 500 on tokens go on with the word before.
    ids, attended, counts = batch()
    how = masks(continues=np.arange(SIZE) >= 500)
    _, at, targets, chosen = apply(ids, attended, how)
    special = ids < 5
    begins = (ids < 500) | np.roll(special, 1, 1)
    word = np.cumsum(begins, 1)
    marks = np.zeros(ids.shape, bool)
    marks[np.broadcast_to(np.arange(ROWS)[:, None], at.shape)[chosen], at[chosen]] = (
        True
    )
    assert not (marks & (special | ~attended)).any()
    for row in range(ROWS):
        mine = set(word[row][marks[row]])
        assert set(word[row][~marks[row]]).isdisjoint(mine)
    most = np.maximum(np.round(0.15 * counts), 1)
    left = most - marks.sum(1)
    assert (left >= 0).all()
    # What more is wanted no word is short enough for.
    for row in np.flatnonzero(left):
        rest = word[row][~marks[row] & ~special[row] & attended[row]]
        assert np.unique(rest, return_counts=True)[1].min() > left[row]
    np.testing.assert_array_equal(
        targets[chosen], np.take_along_axis(ids, at, 1)[chosen]
    )


def test_words_are_told_by_marks():
    words = [*BERT.values(), "play", "##ing", "##s", "#"]
    numbers = {word: n for n, word in enumerate(words)}
    found = masking.continuations(tokenizer.bert(numbers, lower=True))
    assert [words[n] for n in np.flatnonzero(found)] == ["##ing", "##s"]
