"""Text to pretrain on: how it is cut, and that all that is random is decided by seed and position."""

import gzip
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from squeeze_jax import data
from squeeze_jax.data import documents, tokens
from squeeze_jax.errors import UserError

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Words are w0 to w199, so that every token of a text can be told; some go on: ##x0 to ##x9.
WORDS = [*(f"w{n}" for n in range(200)), *(f"##x{n}" for n in range(10)), ".", "!"]
FIRST, MORE, DOT = 5, 205, 215
# Quick to compile: here compiling takes all the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return tokens.load(vocabulary)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four documents of 10 lines of 1 to 5 words, each word in ascending order but for the ends of documents."""
    rng = np.random.default_rng(0)
    number, lines = itertools.cycle(range(200)), []
    for _ in range(4):
        for _ in range(10):
            lines.append(words(*itertools.islice(number, int(rng.integers(1, 6)))))
        lines.append("")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return str(path)


def make(text, vocabulary, **options):
    return data.make(
        "pretraining", files=text, tokenizer=vocabulary, **{"eval": 0.25} | options
    )


def some(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def device(made, batch):
    """What of a batch goes to the devices."""
    return {key: batch[key] for key in made.specs(1)[0]}


class TestDocuments:
    def read(self, tmp_path, content, tokenizer, name="a.txt", **options):
        path = tmp_path / name
        opened = gzip.open if name.endswith("gz") else open
        with opened(path, "wt") as file:
            file.write(content)
        found = documents.read([path], tokenizer, **options)
        return found.tokens.tolist(), found.sentences.tolist(), found.documents.tolist()

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
    def test_lines_are_sentences_and_blank_lines_end_documents(
        self, tmp_path, tokenizer, name
    ):
        content = "\n\nw0 w1x2 .\n w3  \n \n\nw4\n"
        found = self.read(tmp_path, content, tokenizer, name)
        ids = [FIRST, FIRST + 1, MORE + 2, DOT, FIRST + 3, FIRST + 4]
        assert found == (ids, [0, 4, 5, 6], [0, 2, 3])

    def test_marks_end_sentences_too(self, tmp_path, tokenizer):
        found = self.read(tmp_path, "w0 . w1 !\nw2 ! w3", tokenizer, sentences="marks")
        assert found[1:] == ([0, 2, 4, 6, 7], [0, 4])

    @pytest.mark.parametrize("space", [False, True])
    def test_marks_of_byte_pairs_end_sentences(self, tmp_path, space):
        # Alone, "." is another token where a text gets a space before it.
        made = tokenizers.ByteLevelBPETokenizer()
        text = "He came . She saw! They left."
        made.train_from_iterator(
            [text] * 9, 400, special_tokens=["<|endoftext|>"], show_progress=False
        )
        made.save_model(str(tmp_path))
        config = tmp_path / "tokenizer_config.json"
        config.write_text(f'{{"add_prefix_space": {str(space).lower()}}}')
        loaded, path = tokens.load(tmp_path), tmp_path / "text"
        path.write_text("She saw! They left. Who")
        found = documents.read([path], loaded, sentences="marks")
        parts = np.split(found.tokens, found.sentences[1:-1])
        sentences = [loaded.decode(part).strip() for part in parts]
        assert sentences == ["She saw!", "They left.", "Who"]

    def test_documents_do_not_depend_on_how_many_lines_are_read_at_once(
        self, tmp_path, tokenizer, monkeypatch
    ):
        content = "\nw0 . w1\n\n\nw2 w3\nw4 !\n\nw5\n\n"
        found = []
        for lines in 1, 2, 3, 99:
            monkeypatch.setattr(documents, "LINES", lines)
            found.append(self.read(tmp_path, content, tokenizer, sentences="marks"))
        assert found[0][1:] == ([0, 2, 3, 5, 7, 8], [0, 2, 4, 5])
        assert all(each == found[0] for each in found)

    def test_a_file_ends_a_document(self, tmp_path, tokenizer):
        paths = [tmp_path / "a", tmp_path / "b"]
        for path in paths:
            path.write_text("w0\nw1\n")
        assert documents.read(paths, tokenizer).documents.tolist() == [0, 2, 4]

    def test_every_so_many_th_document_is_held_out(self):
        # Documents of 1, 2, … 8 sentences of one token, which is the document's number.
        sizes = np.arange(1, 9)
        text = documents.Documents(
            np.repeat(np.arange(8), sizes),
            np.arange(sizes.sum() + 1),
            np.concatenate([[0], np.cumsum(sizes)]),
        )
        train, held = documents.hold_out(text, 0.25)
        assert held.tokens.tolist() == [3] * 4 + [7] * 8
        assert held.sentences.tolist() == list(range(13))
        assert held.documents.tolist() == [0, 4, 12]
        assert train.documents.tolist() == [0, 1, 3, 6, 11, 17, 24]
        assert set(train.tokens) == {0, 1, 2, 4, 5, 6}

    @pytest.mark.shared
    def test_blocks_of_real_text_are_the_text(self, shared):
        folder = shared / "data" / "text"
        path = folder / "lm" / "tinyshakespeare.txt.gz"
        loaded = tokens.load(folder / "bert_uncased_vocab.txt")
        blocks = documents.Blocks(documents.read([path], loaded), loaded, 128, False)
        ids = np.concatenate([blocks(n, None)[0][1:-1] for n in range(len(blocks))])
        found = "".join(
            loaded.token(i).removeprefix("##") for i in ids if i != loaded.sep
        )
        expected = gzip.decompress(path.read_bytes()).decode().lower()
        assert found == "".join(expected.split())
        # Speeches end with blank lines.
        ends = sum(ids == loaded.sep)
        assert ends == len(expected.strip().split("\n\n")) - 1


class TestBlocks:
    def test_a_block_has_special_tokens_and_goes_over_the_ends_of_documents(
        self, tmp_path, vocabulary
    ):
        path = tmp_path / "text"
        path.write_text("w0 w1\nw2\n\nw3 w4 w5")
        made = make(str(path), vocabulary, eval=str(path), length=6)
        (batch,) = some(made.eval(4), 1)
        a, b, c, d, e, f = range(FIRST, FIRST + 6)
        expected = [[CLS, a, b, c, SEP, SEP], [CLS, d, e, f, SEP, PAD]]
        assert batch["original"][:2].tolist() == expected
        assert batch["attended"].sum(1).tolist() == [6, 5, 0, 0]
        assert batch["mask"].tolist() == [True, True, False, False]
        assert batch["index"].tolist() == [0, 1, -1, -1]
        assert not batch["segments"].any()

    def test_text_to_read_from_left_to_right_is_bare(self, tmp_path, vocabulary):
        path = tmp_path / "text"
        path.write_text("w0 w1\nw2\n\nw3 w4 w5")
        made = make(str(path), vocabulary, eval=str(path), length=4, kind="causal")
        (batch,) = some(made.eval(2), 1)
        a, b, c, d, e, f = range(FIRST, FIRST + 6)
        assert batch["tokens"].tolist() == [[a, b, c, SEP], [d, e, f, PAD]]
        assert made.model == {"task": "causal_lm"}
        assert made.fixed
        assert made.augment(None, batch).keys() == batch.keys()


class TestPairs:
    def segments(self, batch, row):
        ids = batch["tokens"][row][batch["attended"][row]]
        segments = batch["segments"][row][batch["attended"][row]]
        assert ids[0] == CLS
        a, b = ids[1:][segments[1:] == 0], ids[segments == 1]
        assert a[-1] == b[-1] == SEP
        return a[:-1], b[:-1]

    def of(self, text):
        """{(token, next token)} within documents, and those that are the ends of lines."""
        follow, ends, document = set(), set(), []
        for line in [*Path(text).read_text().split("\n"), ""]:
            ids = [FIRST + int(word[1:]) for word in line.split()]
            document += ids
            ends |= set(ids[-1:])
            if not ids:
                follow |= set(itertools.pairwise(document))
                document = []
        return follow, ends

    def test_the_order_of_sentences_is_told(self, text, vocabulary):
        made = make(text, vocabulary, eval=text, length=16, order="sentence_order")
        assert made.model == {"task": "pretraining"}
        assert not made.fixed
        follow, ends = self.of(text)
        told = []
        for batch in some(made.train(10, 0), 40):
            for row in range(10):
                a, b = self.segments(batch, row)
                if batch["label"][row]:
                    a, b = b, a
                # What follows is the text's, and it is cut where a line ends.
                assert set(itertools.pairwise([*a, *b])) <= follow
                assert a[-1] in ends
                told.append(batch["label"][row])
        # Of 400 draws 5 standard deviations are 50.
        assert 150 < sum(told) < 250

    def test_an_epoch_cuts_anew(self, text, vocabulary):
        made = make(text, vocabulary, eval=text, length=16, order="sentence_order")
        cuts = {}
        count = made.num_train
        for batch in some(made.train(2, 0), 4 * count):
            for row, index in enumerate(batch["index"]):
                how = (*batch["segments"][row], batch["label"][row])
                cuts.setdefault(int(index), set()).add(how)
        assert len(cuts) == count
        # Those of two sentences alone can be cut in one place.
        assert sum(len(each) > 2 for each in cuts.values()) > count / 2

    def test_the_next_sentence_is_of_the_same_document_or_of_another(
        self, text, vocabulary
    ):
        made = make(text, vocabulary, eval=text, length=16, order="next_sentence")
        follow, _ = self.of(text)
        number = {}
        for n, document in enumerate(Path(text).read_text().split("\n\n")):
            number |= {FIRST + int(word[1:]): n for word in document.split()}
        told = []
        for batch in some(made.train(10, 0), 40):
            for row in range(10):
                a, b = self.segments(batch, row)
                other = batch["label"][row]
                assert ((a[-1], b[0]) not in follow) == other
                assert {number[i] for i in a} != {number[i] for i in b} or not other
                told.append(other)
        assert 150 < sum(told) < 250

    def test_long_sentences_are_cut_and_lonely_ones_left_out(
        self, tmp_path, vocabulary
    ):
        path = tmp_path / "text"
        # Room for 5 tokens beside three special ones: pieces of 2, 1 and 2 tokens of the first document.
        path.write_text("w0 w1 w2 w3 w4\n\nw5\n\nw6 w7\nw8")
        made = make(
            str(path), vocabulary, eval=str(path), length=8, order="sentence_order"
        )
        (batch,) = some(made.eval(3), 1)
        found = {tuple(sorted(ids[ids >= FIRST] - FIRST)) for ids in batch["original"]}
        assert found == {(0, 1, 2, 3, 4), (6, 7, 8), ()}


class TestData:
    def test_masks_are_a_function_of_seed_and_position(self, text, vocabulary):
        made = make(text, vocabulary, length=12)
        count = made.num_train
        mask = jit(made.augment)

        def run(seed, start=0, process=(0, 1), batches=count):
            stream = made.train(4, seed, start, process)
            found = some(stream, batches)
            masked = [mask(jax.random.key(len(found)), device(made, b)) for b in found]
            return [b["index"] for b in found], [
                np.asarray(m["tokens"]) for m in masked
            ]

        index, whole = run(0)
        later = run(0, start=4 * 5, batches=4)[1]
        np.testing.assert_array_equal(later, whole[5:9])
        halves = [run(0, process=(n, 2), batches=5)[1] for n in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(halves, 1), whole[:5])
        # Four epochs: the same example is not masked the same.
        seen = {}
        for i, row in zip(np.concatenate(index), np.concatenate(whole), strict=True):
            seen.setdefault(int(i), []).append(tuple(row))
        assert {len(rows) for rows in seen.values()} == {4}
        assert all(len(set(rows)) > 1 for rows in seen.values())
        assert not np.array_equal(run(1, batches=3)[1], whole[:3])

    def test_evaluation_masks_the_same_every_time(self, text, vocabulary):
        made = make(text, vocabulary, eval=text, length=12, order="sentence_order")
        inputs = jit(made.inputs)

        def run(rows):
            batches = list(made.eval(rows))
            parts = [(b["mask"], inputs(device(made, b))) for b in batches]
            for (_, x), batch in zip(parts, batches, strict=True):
                # A file that is run outside of here sees the same.
                np.testing.assert_array_equal(x["tokens"], batch["tokens"])
            keys = parts[0][1].keys()
            return {k: np.concatenate([p[k][m] for m, p in parts]) for k in keys}

        first, again, other = run(4), run(4), run(3)
        assert first["tokens"].shape == (made.num_eval, 12)
        assert (first["tokens"] == MASK).any()
        for key, array in first.items():
            np.testing.assert_array_equal(array, again[key])
            np.testing.assert_array_equal(array, other[key])

    def test_scoring_all_positions_chooses_the_same(self, text, vocabulary):
        few, every = (
            make(text, vocabulary, length=12, predictions=n) for n in (None, 0)
        )
        (batch,) = some(few.train(4, 0), 1)
        few, every = (jit(d.augment)(None, device(d, batch)) for d in (few, every))
        # ⌈0.15 · 12⌉ = 2.
        assert few["positions"].shape == few["targets"].shape == (4, 2)
        assert "positions" not in every
        np.testing.assert_array_equal(few["tokens"], every["tokens"])
        np.testing.assert_array_equal(every["targets"], batch["tokens"])
        for row in range(4):
            at = few["positions"][row][few["chosen"][row]]
            assert sorted(at.tolist()) == np.flatnonzero(every["chosen"][row]).tolist()

    def test_replaced_tokens_need_the_originals(self, text, vocabulary):
        made = make(text, vocabulary, length=12, kind="replaced")
        (batch,) = some(made.train(4, 0), 1)
        x = jit(made.inputs)(device(made, batch))
        assert {"targets", "chosen", "positions"} < x.keys()
        assert made.objective == {"name": "losses.replaced"}
        assert made.masking.masked == 0.85
        assert made.masking.random == 0
        assert jax.tree.map(jnp.shape, made.example())["targets"] == (1, 2)

    def test_what_an_exported_file_takes_is_not_masked(self, text, vocabulary):
        made = make(text, vocabulary, length=12)
        batch = {k: np.ones((1, *s.shape), s.dtype) for k, s in made.exported.items()}
        x = made.inputs(batch)
        assert x.keys() == {"tokens", "segments", "attended"}
        assert x["tokens"].tolist() == [[1] * 12]
        assert x["attended"].dtype == bool
        assert made.vocabulary == 217

    def test_what_is_said_of_a_text(self, text, vocabulary):
        made = make(text, vocabulary, length=6)
        asked = []

        def run(batch):
            asked.append(batch)
            shares = np.full((1, 6, made.vocabulary), 1e-9)
            # At every place the word of its number is the likeliest.
            shares[0, np.arange(6), FIRST + np.arange(6)] = 0.75
            shares[0, :, DOT] = 0.25
            return np.log(shares)

        lines = list(made.predict(["w9 [MASK] w7"], run))
        assert asked[0]["tokens"].tolist() == [
            [CLS, FIRST + 9, MASK, FIRST + 7, SEP, PAD]
        ]
        assert asked[0]["attended"].tolist() == [[1, 1, 1, 1, 1, 0]]
        assert lines[0] == "w9 [MASK] w7"
        assert lines[1].startswith("  w2 75.0%, . 25.0%")
        with pytest.raises(UserError, match=r"'w1' has no \[MASK\]"):
            list(made.predict(["w1"], run))
        made = make(text, vocabulary, length=6, kind="causal")
        lines = list(made.predict(["w9 w8 w7"], run))
        assert asked[-1]["attended"].tolist() == [[1, 1, 1, 0, 0, 0]]
        assert lines[1].startswith("  w2 75.0%")
        # What follows the end of a longer text is told of its end.
        lines = list(made.predict([words(*range(9))], run))
        assert asked[-1]["tokens"].tolist() == [[FIRST + n for n in range(3, 9)]]
        assert lines[1].startswith("  w5 75.0%")
        with pytest.raises(UserError, match="'' is an empty text"):
            list(made.predict([""], run))
        made = make(text, vocabulary, length=6, kind="replaced")
        lines = list(made.predict(["w9"], lambda b: {"replaced": np.zeros((1, 6))}))
        assert lines[1:] == ["   50.0%  [CLS]", "   50.0%  w9", "   50.0%  [SEP]"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"files": "nowhere.txt"}, "cannot read nowhere.txt: No such file"),
            ({"files": ()}, "no text in no files"),
            ({"eval": 1.5}, r"config\.data\.eval = 1\.5 should be files, or a share"),
            ({"eval": 0.01}, r"eval = 0\.01 of 4 documents is none: name files"),
            ({"share": 0.0}, r"config\.data\.share = 0\.0 should lie in \(0, 1\]"),
            ({"masked": 0.95}, r"masked = 0\.95 and random = 0\.1 should be shares"),
            ({"predictions": 999}, "predictions = 999 should be 0 to length = 128"),
            (
                {"kind": "causal", "order": "sentence_order"},
                "order = 'sentence_order' is",
            ),
            ({"length": 2}, "length = 2 leaves no room"),
            ({"threads": -1}, r"threads = -1 should lie in \[0, 256\]"),
            ({"kind": "casual"}, r"config\.data\.kind = 'casual' .*one of 'masked'"),
            ({"order": "next_sentence"}, "documents: there is one to evaluate on;"),
        ],
    )
    def test_mistakes_are_named(self, text, vocabulary, options, message):
        # One document is left to evaluate on.
        with pytest.raises(UserError, match=message):
            make(options.pop("files", text), vocabulary, **options)

    def test_sentences_are_needed_for_their_order(self, tmp_path, vocabulary):
        path = tmp_path / "text"
        path.write_text("w1\n\nw2\n")
        with pytest.raises(
            UserError, match=r"needs documents of two sentences.* none to train"
        ):
            make(str(path), vocabulary, eval=str(path), order="sentence_order")
