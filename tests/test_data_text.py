"""Batches of token sequences: every example, once an epoch, in the width it needs; a function of seed and position."""

import itertools
import time

import numpy as np
import pytest

from squeeze_jax.data import text, tokens
from squeeze_jax.errors import UserError


def sequences(count, longest=60, seed=0):
    """`count` sequences whose tokens say which they are: 1000 n, 1000 n + 1, …"""
    lengths = np.random.default_rng(seed).integers(3, longest + 1, count)
    rows = [1000 * n + np.arange(length) for n, length in enumerate(lengths)]
    rows = [(row, np.arange(len(row)) >= 2) for row in rows]
    fields = {"label": np.arange(count, dtype=np.float32) / 2}
    return text.pack(rows, **fields, pairs=np.arange(2 * count).reshape(count, 2))


def reader(count, buckets=(16, 32), **options):
    return text.SequenceReader(sequences(count), 64, buckets, pad=7, **options)


def check(batch, source):
    """Every row is the sequence that its index names, padded."""
    rows, width = batch["tokens"].shape
    for row in range(rows):
        n, fields = batch["index"][row], source.fields
        assert batch["mask"][row] == (n >= 0)
        length = source.lengths[n] if n >= 0 else 0
        want = np.full(width, 7)
        want[:length] = 1000 * n + np.arange(length)
        assert batch["tokens"][row].tolist() == want.tolist()
        segments = np.arange(width) >= 2
        assert (batch["segments"][row] == segments * (np.arange(width) < length)).all()
        assert (batch["attended"][row] == (np.arange(width) < length)).all()
        assert batch["label"][row] == (fields["label"][n] if n >= 0 else 0)
        assert (batch["pairs"][row] == (fields["pairs"][n] if n >= 0 else 0)).all()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def index(batches):
    return np.concatenate([b["index"] for b in batches])


@pytest.mark.parametrize("buckets", [(), (16, 32)])
@pytest.mark.parametrize(("count", "batch"), [(1000, 8), (37, 8), (5, 8), (801, 100)])
def test_an_epoch_has_every_example_once(count, batch, buckets):
    source = reader(count, buckets)
    epochs = 3 if count < 1000 else 2
    batches = take(source.train(batch, seed=4), -(-epochs * count // batch))
    for each in batches:
        check(each, source.sequences)
    stream = index(batches)[: epochs * count].reshape(epochs, count)
    assert (np.sort(stream, 1) == np.arange(count)).all()
    assert (stream[0] != stream[1]).any()


def test_batches_have_the_width_their_longest_sequence_needs():
    source = reader(2000)
    batches = take(source.train(8, seed=1), 250)
    longest = [source.sequences.lengths[b["index"]].max() for b in batches]
    widths = [b["tokens"].shape[1] for b in batches]
    want = [16 if n <= 16 else 32 if n <= 32 else 64 for n in longest]
    assert widths == want
    # Lengths are even between 3 and 60: 14 of 58 fit into 16, 30 into 32; sorted, few batches straddle a bound.
    share = [widths.count(w) / 250 for w in (16, 32, 64)]
    assert np.allclose(share, [14 / 58, 16 / 58, 28 / 58], atol=0.04)
    # Unsorted, a batch of eight almost never fits into the smallest.
    plain = [b["attended"].any(0).sum() for b in take(reader(2000, ()).train(8, 1), 250)]  # fmt: skip
    assert np.mean(np.array(plain) <= 16) < 0.01
    # Lengths do not come in order.
    assert len(set(widths[:10])) > 1
    assert np.abs(np.corrcoef(np.arange(250), longest)[0, 1]) < 0.2


@pytest.mark.parametrize("buckets", [(), (16, 32)])
def test_resuming_anywhere_and_sharing_over_processes(buckets):
    source = reader(997, buckets)
    whole = take(source.train(12, seed=3), 200)
    for start in (0, 1, 49, 50, 51, 82, 83, 84, 150):
        resumed = take(source.train(12, seed=3, start=start * 12), 3)
        for a, b in zip(whole[start:], resumed, strict=False):
            assert all((a[key] == b[key]).all() for key in a)
    parts = [take(source.train(12, 3, 0, (i, 3)), 200) for i in range(3)]
    for step, together in enumerate(whole):
        each = [part[step] for part in parts]
        for key in together:
            assert (np.concatenate([p[key] for p in each]) == together[key]).all()


def test_seeds_differ():
    source = reader(500)
    a, b = (index(take(source.train(10, seed), 50)) for seed in (0, 1))
    assert (a == b).mean() < 0.05


def test_evaluation_sees_everything_once():
    for buckets, count in ((), 37), ((16, 32), 37), ((16, 32), 40):
        source = reader(count, buckets)
        batches = list(source.eval(8))
        assert len(batches) == 5
        for batch in batches:
            check(batch, source.sequences)
        order = index(batches)
        assert sorted(order[order >= 0]) == list(range(count))
        assert (order[:count] >= 0).all()
        lengths = source.sequences.lengths[order[:count]]
        assert (lengths == np.sort(lengths)).all() == bool(buckets)
        parts = [list(source.eval(8, (i, 2))) for i in range(2)]
        for step, together in enumerate(batches):
            for key in together:
                both = [part[step][key] for part in parts]
                assert (np.concatenate(both) == together[key]).all()
    assert list(reader(0).eval(4)) == []


def test_specs_are_the_shapes_of_batches():
    source = reader(300)
    specs = source.specs(6)
    assert [s["tokens"].shape for s in specs] == [(6, 16), (6, 32), (6, 64)]
    seen = {}
    for batch in source.eval(6):
        seen[batch["tokens"].shape[1]] = batch
    for spec in specs:
        batch = seen[spec["tokens"].shape[1]]
        assert batch.keys() == spec.keys() | {"index"}
        for key, value in spec.items():
            assert (batch[key].shape, batch[key].dtype) == (value.shape, value.dtype)


def test_close_ends_the_stream():
    stream = reader(20).train(4, 0)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_taking_some():
    source = sequences(20)
    some = source.take(np.array([7, 3, 3]))
    assert (some.lengths == source.lengths[[7, 3, 3]]).all()
    check(
        next(text.SequenceReader(some, 64, pad=7).eval(1)) | {"index": np.array([7])},
        source,
    )
    assert some.fields["label"].tolist() == [3.5, 1.5, 1.5]


def test_tokenizing(vocabulary, capfd, monkeypatch):
    tokenizer = tokens.load(vocabulary)
    monkeypatch.setattr(text, "CHUNK", 2)
    monkeypatch.setattr(text, "PATIENCE", 0.0)
    found = text.tokenize(
        tokenizer, ["a dog", "the", "dogs bark loudly"], ["", "cat", "a dog"], 7,
        label=np.arange(3),
    )  # fmt: skip
    # [CLS] 101, [SEP] 102, a 1037, dog 3899, the 1996, cat 4937, dogs 6077, bark 11286.
    rows = np.split(found.tokens, found.begins[1:-1])
    assert [r.tolist() for r in rows] == [
        [101, 1037, 3899, 102, 102],
        [101, 1996, 102, 4937, 102],
        [101, 6077, 11286, 102, 1037, 3899, 102],
    ]
    assert found.segments.tolist() == [0, 0, 0, 0, 1] + [0, 0, 0, 1, 1] + [0] * 4 + [1] * 3  # fmt: skip
    assert found.fields["label"].tolist() == [0, 1, 2]
    assert capfd.readouterr().err == "tokenized 2 of 3 texts\ntokenized 3 of 3 texts\n"
    tell = text.Progress("lines")
    tell(5)
    assert capfd.readouterr().err == "tokenized 5 lines\n"
    one = text.tokenize(tokenizer, ["a dog"], None, 7)
    assert one.tokens.tolist() == [101, 1037, 3899, 102]
    with pytest.raises(UserError, match="length = 3 leaves no room"):
        text.tokenize(tokenizer, [], [], 3)
    with pytest.raises(UserError, match="1 first texts and 2 second ones"):
        text.tokenize(tokenizer, ["a"], ["b", "c"], 9)


def test_mistakes():
    source = reader(20)
    with pytest.raises(UserError, match="batch = 4 is not divisible by 3"):
        source.train(4, 0, process=(0, 3))
    with pytest.raises(UserError, match="cannot resume after 6 examples with batch 4"):
        source.train(4, 0, start=6)
    with pytest.raises(UserError, match="seed = -1"):
        source.train(4, -1)
    with pytest.raises(UserError, match="no examples to train on"):
        reader(0).train(4, 0)
    for buckets in (32, 16), (0, 16), (16, 64), (16, 16):
        with pytest.raises(UserError, match=r"config.data.buckets = .* ascending"):
            text.check_widths(64, buckets)
    text.check_widths(64, (16, 32))


def test_a_batch_takes_far_less_than_a_millisecond():
    stream = reader(20_000).train(32, 0)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - begin)
    assert np.median(times) < 5e-4
