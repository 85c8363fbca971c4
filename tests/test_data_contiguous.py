"""Contiguous text: which token comes when, in training and in evaluation, and what the vocabulary is."""

import gzip

import numpy as np
import pytest

from squeeze_jax import data
from squeeze_jax.errors import UserError

# 26 different characters and then some: 41 tokens.
TEXT = "abcdefghijklmnopqrstuvwxyzabcdefghijklmno"
EVALUATED = "thequickbrownfoxjumpsoverlazydogs"  # 33 tokens: 32 targets


@pytest.fixture
def letters(tmp_path):
    """Opens the two texts by character."""
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "eval.txt").write_text(EVALUATED)

    def make(length=3, **options):
        return data.make(
            "contiguous",
            train=str(tmp_path / "train.txt"),
            eval=str(tmp_path / "eval.txt"),
            length=length,
            level="characters",
            **options,
        )

    return make


def take(batches, count):
    return [next(batches) for _ in range(count)]


def spelt(found, ids):
    return "".join(found.words.tokens[i] for i in ids)


def test_each_row_of_training_reads_its_stream_in_order(letters):
    found = letters()
    # 41 // 2 = 20 tokens a stream, (20 - 1) // 3 = 6 windows.
    batches = take(found.train(2, seed=0), 6)
    for row, stream in enumerate((TEXT[:20], TEXT[20:40])):
        tokens = np.concatenate([b["tokens"][row] for b in batches])
        targets = np.concatenate([b["targets"][row] for b in batches])
        assert spelt(found, tokens) == stream[:18]
        assert spelt(found, targets) == stream[1:19]
    for batch in batches:
        assert batch["attended"].all()
        assert batch["mask"].all()
    index = np.stack([b["index"] for b in batches], 1)
    np.testing.assert_array_equal(index, np.arange(12).reshape(2, 6))


def test_streams_begin_again_and_afresh_after_an_epoch(letters):
    batches = take(letters().train(2, seed=0), 13)
    fresh = [b["fresh"].tolist() for b in batches]
    assert fresh == [[step % 6 == 0] * 2 for step in range(13)]
    np.testing.assert_array_equal(batches[12]["tokens"], batches[0]["tokens"])


def test_training_goes_on_at_any_batch(letters):
    found = letters()
    whole = take(found.train(4, seed=0), 9)
    for at in (1, 4, 8):
        rest = take(found.train(4, seed=0, start=4 * at), 9 - at)
        for batch, expected in zip(rest, whole[at:], strict=True):
            for key, values in expected.items():
                np.testing.assert_array_equal(batch[key], values)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_processes_share_rows(letters, split):
    found = letters()

    def batches(process=(0, 1)):
        if split == "train":
            return take(found.train(4, seed=0, process=process), 5)
        return list(found.eval(4, process))

    parts = [batches((index, 2)) for index in range(2)]
    whole = batches()
    for batch, first, second in zip(whole, *parts, strict=True):
        for key, values in batch.items():
            joined = np.concatenate([first[key], second[key]])
            np.testing.assert_array_equal(joined, values)


@pytest.mark.parametrize("streams", [1, 2, 3, None])
@pytest.mark.parametrize("length", [3, 4, 7, 40])
@pytest.mark.parametrize("warm_up", [0, 2])
def test_evaluation_predicts_each_token_but_the_first_once(
    letters, streams, length, warm_up
):
    found = letters(length, streams=streams, warm_up=warm_up)
    predicted, indices = [], []
    for batch in found.eval(5):
        counted = batch["attended"] & batch["mask"][:, None]
        for row in np.flatnonzero(batch["mask"]):
            indices.append(batch["index"][row])
            targets = batch["targets"][row][counted[row]]
            first = int(indices[-1]) * length
            assert spelt(found, targets) == EVALUATED[first + 1 :][: len(targets)]
            predicted.append((first, spelt(found, targets)))
    assert sorted(indices) == list(range(found.num_eval))
    assert "".join(part for _, part in sorted(predicted)) == EVALUATED[1:]


def test_evaluation_streams_read_what_stands_before_them(letters):
    # 32 targets in 11 windows of 3: 4 windows for each of 3 streams; the third has 3 of its own.
    found = letters(streams=3, warm_up=2)
    batches = list(found.eval(4))
    windows = [[0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]
    assert len(batches) == 6
    for row, expected in enumerate(windows):
        skipped = 2 if row == 0 else 0  # nothing stands before the text
        for window, batch in zip(expected, batches[skipped:], strict=False):
            begin = 3 * window
            text = EVALUATED[begin : begin + 3]
            assert spelt(found, batch["tokens"][row])[: len(text)] == text
    scored = np.stack([b["mask"] for b in batches], 1)
    expected = [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0] * 6]
    np.testing.assert_array_equal(scored, np.array(expected, bool))
    # The first stream begins with the text, the others with what they read before it.
    fresh = np.stack([b["fresh"] for b in batches], 1)
    assert np.flatnonzero(fresh[0]).tolist() == [0, 2]
    assert np.flatnonzero(fresh[1]).tolist() == [0]


def test_words_are_separated_by_white_space_and_lines_end(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b" the cat <unk> \nthe  dog\n\nsat\n"))
    found = data.make("contiguous", train=str(path), eval=str(path), length=2)
    # Four <eos>, two "the", the others once and in alphabetical order.
    assert found.words.tokens == ("<eos>", "the", "<unk>", "cat", "dog", "sat")
    assert found.train_tokens.tolist() == [1, 3, 2, 0, 1, 4, 0, 0, 5, 0]


def test_unknown_words_of_the_evaluation_are_unk_or_an_error(tmp_path):
    paths = {}
    for name, text in (
        ("with", "a b <unk>\n"),
        ("without", "a b\n"),
        ("eval", "a zebra b yak\n"),
    ):
        paths[name] = tmp_path / name
        paths[name].write_text(text)

    def make(train):
        return data.make(
            "contiguous", train=str(paths[train]), eval=str(paths["eval"]), length=2
        )

    found = make("with")
    words = [found.words.tokens[i] for i in found.eval_tokens]
    assert words == ["a", "<unk>", "b", "<unk>", "<eos>"]
    assert "40.0% of the test words are <unk>" in found.describe
    with pytest.raises(UserError, match=r"eval has 2 words .* such as 'zebra'.*<unk>"):
        make("without")


def test_penn_treebank_is_the_published_one(shared):
    """929,589 + 73,760 words and a vocabulary of 10,000; Mikolov et al. 2010 and Zaremba et al. have 929k, 73k and 10k."""
    folder = shared / "data" / "text" / "lm"
    train, valid = (str(folder / f"ptb.{s}.txt.gz") for s in ("train", "valid"))
    found = data.make("contiguous", train=train, eval=valid)
    assert (len(found.train_tokens), len(found.eval_tokens)) == (929_589, 73_760)
    assert found.vocabulary == 10_000
    batch = next(found.train(20, seed=0))
    assert [found.words.tokens[i] for i in batch["tokens"][0, :3]] == [
        *("aer", "banknote", "berlitz")
    ]


def test_tiny_shakespeare_is_the_published_one(shared):
    """1,115,394 characters, 65 different ones: Karpathy's char-rnn and nanoGPT."""
    path = str(shared / "data" / "text" / "lm" / "tinyshakespeare.txt.gz")
    found = data.make("contiguous", train=path, eval=path, level="characters")
    assert (len(found.train_tokens), found.vocabulary) == (1_115_394, 65)


def test_the_last_line_needs_no_end(tmp_path):
    for name, text in ("ended", "a b\nc\n"), ("open", "a b\nc"):
        (tmp_path / name).write_text(text)
    both = [
        data.make(
            "contiguous", train=str(tmp_path / n), eval=str(tmp_path / n), length=1
        )
        for n in ("ended", "open")
    ]
    assert both[0].train_tokens.tolist() == both[1].train_tokens.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=0), r"config\.data\.length = 0 should be at least 1"),
        (dict(warm_up=-1), r"config\.data\.warm_up = -1 should not be negative"),
        (dict(streams=0), r"config\.data\.streams = 0 should be at least 1"),
        (dict(length=41), r"train has 41 tokens: a window takes length \+ 1 = 42"),
        (dict(lenght=3), r"config\.data\.lenght.*'length'"),
    ],
)
def test_what_does_not_fit_is_named(letters, options, message):
    with pytest.raises(UserError, match=message):
        letters(**options)


def test_too_many_streams_are_named(letters):
    with pytest.raises(UserError, match=r"config\.batch = 11 streams .*than the 41"):
        letters().train(11, seed=0)
    with pytest.raises(UserError, match="not divisible by 2 processes"):
        letters().train(3, seed=0, process=(0, 2))
    with pytest.raises(UserError, match="4 is not a multiple"):
        letters().train(3, seed=0, start=4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.txt"):
        data.make("contiguous", train=str(tmp_path / "none.txt"), eval="none.txt")


def test_predict_tells_perplexity_and_the_likeliest_next_tokens(letters):
    found = letters(length=4)
    a, b, c = (found.words.tokens.index(letter) for letter in "abc")
    logits = np.full((1, 4, found.vocabulary), -100.0, np.float32)
    # After "a": b with 1/4; after "ab": c with 1/2 and b with 1/2.
    logits[0, 0, [a, b]] = np.log([0.75, 0.25])
    logits[0, 1, [b, c]] = np.log([0.5, 0.5])
    asked = []

    def run(batch):
        asked.append(batch["tokens"].tolist())
        return logits

    lines = list(found.predict(["ab"], run))
    assert asked == [[[a, b, 0, 0]]]
    assert lines[0] == "ab"
    assert lines[1].strip() == "perplexity 4.0 of 1 characters"
    assert lines[2].startswith("  next 'b' 50.0%, 'c' 50.0%, ")
    with pytest.raises(UserError, match="needs texts"):
        list(found.predict([], run))
    with pytest.raises(UserError, match="' ' is an empty text"):
        list(found.predict([" "], run))
    with pytest.raises(UserError, match=r"'A' has 1 characters .*lacks, such as 'A'"):
        list(found.predict(["A"], run))
