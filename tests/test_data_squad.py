"""Extractive question answering: batches, answers read off, files, predictions, errors."""

import gzip
import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import tokenizers

from squeeze_jax.data import answers, questions
from squeeze_jax.data.tasks import squad
from squeeze_jax.errors import UserError
from squeeze_jax.train.metrics import _answers
from squeeze_jax.train.metrics import squad as metric

RIVER = "The Rhine rises in the Alps. It flows north, past Basel and Cologne, and ends in the sea."


def question(id, text, *given, document=RIVER, **more):
    """A row of a file; `given` are answers, or (answer, where it is said to begin)."""
    pairs = [(a, document.find(a)) if isinstance(a, str) else a for a in given]
    rows = [{"text": text, "answer_start": begin} for text, begin in pairs]
    return {"id": id, "question": text, "answers": rows} | more


SOURCE = question("source", "Where does the Rhine rise?", "the Alps", "Alps")
CITY = question("city", "Which city is past Basel?", "Cologne")
NONE = question("none", "Who swam in the Rhine?", is_impossible=True)


def write(path, *rows, document=RIVER, **more):
    """A file in the format of SQuAD, of one document."""
    paragraph = {"context": document, "qas": list(rows)}
    content = {"data": [{"title": "x", "paragraphs": [paragraph]}]} | more
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="session")
def dev(shared) -> str:
    return str(shared / "data/text/squad/dev-v1.1.json.gz")


@pytest.fixture(scope="session")
def whole(dev, vocabulary) -> squad.Squad:
    return squad.make(dev, vocabulary)


@pytest.fixture
def river(tmp_path, vocabulary):
    """Makes data of a few questions about a short text, in windows of 24 tokens."""

    def make(*rows, **more):
        path = write(tmp_path / "river.json", *rows)
        return squad.make(path, vocabulary, **dict(length=24, stride=4) | more)

    return make


def pointing(data, at=None, high=9.0):
    """Rows of logits that point at the labels of the evaluation's windows, or at spans `at`: {window: (start, end)}."""
    fields, count = data.eval_split.reader.sequences.fields, data.num_eval
    rows = {side: np.zeros((count, data.length), np.float32) for side in answers.SIDES}
    for window in range(count):
        span = at.get(window) if at else [fields[side][window] for side in rows]
        for side, place in zip(rows, span or (), strict=bool(span)):
            rows[side][window, place] = high
    return rows | {"index": np.arange(count)}


def test_all_windows_of_the_set_have_the_published_number(whole):
    # As in Hugging Face's course: 10,784 windows of 384 tokens, 128 shared, of bert-base-uncased's vocabulary.
    assert (len(whole.eval_split.questions), whole.num_eval) == (10570, 10784)
    said = "10,570 test questions of SQuAD 1.1, in windows of 384 tokens"
    assert whole.describe == said


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_what_the_specs_say(river, tmp_path):
    train = write(tmp_path / "train.json", SOURCE, CITY, NONE)
    data = river(SOURCE, CITY, train=train, length=24, buckets=(20,))
    batch = next(data.train(2, seed=0))
    for spec in data.specs(2):
        assert spec.keys() == batch.keys() - {"index"}
    spec = data.specs(2)[-1]
    assert {k: v.dtype for k, v in spec.items()} == {k: batch[k].dtype for k in spec}
    assert spec["tokens"].shape == (2, 24)
    inputs = data.inputs(batch)
    np.testing.assert_array_equal(inputs["attended"], batch["attended"])
    example = data.example()
    assert example["attended"].dtype == bool
    assert {k: v.shape for k, v in example.items()} == dict.fromkeys(inputs, (1, 24))
    assert (data.num_train, data.vocabulary) == (6, 30522)


# --- answers read off ------------------------------------------------------------------------------------------------


def test_scores_at_the_labels_give_the_answers_that_tokens_can_give(whole):
    rows, split = pointing(whole), whole.eval_split
    said, possible = whole.predictions(rows), 0
    scores = _answers.evaluate(whole.golds, said, False)
    assert scores["exact"] > 99.69
    assert scores["f1"] > 99.75
    places = questions.answer_places(whole.eval_content)
    for row, (begin, end) in zip(split.questions, places, strict=True):
        first, last = split.documents[row.document].locate(begin, end)
        offsets = split.documents[row.document].offsets
        if (offsets[first, 0], offsets[last, 1]) != (begin, end) or last - first >= 30:
            continue
        possible += 1
        assert said[row.id] == row.answers[0].text
    # The others are parts of words, or longer than 30 tokens.
    assert possible == 10529


def brute(split, start, end, n_best, max_answer):
    """{question: [(score, begin, end)]} by trying everything."""
    found = {}
    for w, (number, begin, stop, place) in enumerate(zip(*split.windows, strict=True)):
        offsets = split.documents[split.document_of[number]].offsets
        there = range(place, place + stop - begin)
        firsts = sorted(there, key=lambda i, w=w: -start[w, i])[:n_best]
        lasts = sorted(there, key=lambda i, w=w: -end[w, i])[:n_best]
        scores = found.setdefault(number, {})
        for a, b in itertools.product(firsts, lasts):
            if a <= b < a + max_answer:
                span = (
                    offsets[a - place + begin][0],
                    offsets[b - place + begin][1],
                )
                score = start[w, a] + end[w, b]
                scores[span] = max(score, scores.get(span, -np.inf))
    return {
        number: sorted(((v, *k) for k, v in scores.items()), reverse=True)[:n_best]
        for number, scores in found.items()
    }


@pytest.mark.parametrize(("n_best", "max_answer"), [(4, 3), (20, 30), (1, 2)])
def test_the_best_answers_are_those_of_a_search_through_everything(
    river, n_best, max_answer
):
    data = river(SOURCE, CITY, length=20, stride=4)
    rng = np.random.default_rng(0)
    split, shape = data.eval_split, (data.num_eval, 20)
    logits = {s: rng.normal(size=shape).astype(np.float32) for s in answers.SIDES}
    limits = dict(n_best=n_best, max_answer=max_answer)
    found = answers.search(
        split.windows, split.documents, split.document_of, *logits.values(), **limits
    )
    expected = brute(split, *logits.values(), **limits)
    for number, rows in expected.items():
        which = found.question == number
        columns = (found.score[which], found.begin[which], found.end[which])
        assert list(zip(*columns, strict=True)) == rows


def test_version_2_says_nothing_where_the_odds_are_above_the_threshold(river):
    made = {t: river(SOURCE, CITY, NONE, length=64, null_threshold=t) for t in (0, 5)}
    data = made[0]
    assert data.version2
    # One window a question: answers at 9 + 9 against 10, 12 and 20 (twice 5, 6, 10) for nothing.
    rows = pointing(data)
    # [CLS] who swam in the rhine ? [SEP] the rhine rises in the alps
    rows["start"][2, 13] = rows["end"][2, 13] = 9
    for side in answers.SIDES:
        rows[side][:, 0] = [5, 6, 10]
    assert data.null_odds(rows) == pytest.approx({"source": -8, "city": -6, "none": 2})
    assert data.predictions(rows) == {
        "source": "the Alps",
        "city": "Cologne",
        "none": "",
    }
    assert made[5].predictions(rows)["none"] == "Alps"
    scores = metric.make(made[5]).score(
        {
            "examples": 2,
            "start_loss": 3.0,
            "start_count": 2,
            "end_loss": 1.5,
            "end_count": 1,
        },
        rows,
    )
    assert scores == pytest.approx(
        {
            "eval_loss": 1.5,
            "eval_exact": 200 / 3,
            "eval_f1": 200 / 3,
            "eval_has_answer_exact": 100,
            "eval_has_answer_f1": 100,
            "eval_no_answer_exact": 0,
            "eval_no_answer_f1": 0,
            "eval_best_exact": 100,
            "eval_best_exact_threshold": -6,
            "eval_best_f1": 100,
            "eval_best_f1_threshold": -6,
        }
    )


def test_nothing_is_the_least_of_all_windows(river):
    data = river(NONE, length=20, stride=4)
    rows = pointing(data, {0: (0, 0), 1: (0, 0)}, high=3.0)
    assert data.num_eval == 3
    found = data.answers(rows)
    assert found.no_answer == {"none": 0}
    rows["start"][2, 0] = 1
    assert data.answers(rows).no_answer == {"none": 1}


def test_scores_that_are_not_finite_give_no_answer(river):
    data = river(SOURCE, length=64)
    rows = pointing(data)
    rows["start"][:] = np.nan
    assert data.predictions(rows) == {"source": ""}
    with pytest.raises(ValueError, match="not each of 1 windows"):
        data.predictions({key: value[:0] for key, value in rows.items()})


# --- files -----------------------------------------------------------------------------------------------------------


def test_answers_that_are_not_where_the_file_says_train_nothing_but_count(
    river, tmp_path, caplog
):
    wrong = question("wrong", "Which sea?", ("the sea", 3))
    spaced = question("spaced", "Which mountains?", " Alps")
    train = write(tmp_path / "train.json", wrong, spaced, CITY)
    with caplog.at_level(logging.WARNING):
        data = river(wrong, CITY, train=train, length=64)
    assert [q.id for q in data.train_split.questions] == ["spaced", "city"]
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 3 training questions left out")
    # "alps" alone, without its space: the sixth word.
    assert data.train_split.reader.sequences.fields["start"][0] == 1 + 3 + 1 + 5
    assert data.golds == {"wrong": ["the sea"], "city": ["Cologne"]}
    assert data.eval_split.reader.sequences.fields["start"][0] == 0


def test_version_is_that_of_the_evaluation_file(river, tmp_path):
    train = write(tmp_path / "train.json", SOURCE, NONE)
    assert not river(SOURCE, train=train, length=64).version2
    assert river(SOURCE, NONE, length=64).version2
    path = write(tmp_path / "v2.json", SOURCE, version="v2.0")
    assert questions.read(path).version2


FILES = {
    "empty": ("", r"bad.json is empty"),
    "text": ("Where?", r"bad.json is not JSON: "),
    "list": ("[]", r'bad.json has no "data"'),
    "key": ('{"version": "1.1"}', r'bad.json has no "data"'),
    "articles": ('{"data": [{}]}', r"bad.json: .data\[0\].paragraphs should be a list"),
    "nothing": ('{"data": []}', r"bad.json holds no question"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none_of_squad(kind, tmp_path, vocabulary):
    content, message = FILES[kind]
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        squad.make(str(path), vocabulary)
    assert "\n" not in str(caught.value)


ROWS = {
    "text": (
        question("q", "?") | {"answers": [{"text": 3, "answer_start": 0}]},
        r"\.qas\[1\].answers\[0\].text should be a text",
    ),
    "place": (
        question("q", "?") | {"answers": [{"text": "a"}]},
        r"\.answers\[0\].answer_start should be a whole number",
    ),
    "question": (question("q", "  ", "Alps"), "'q' has no text"),
    "none": (question("q", "Who?"), "'q' has no answers; .* \"is_impossible\": true"),
    "twice": (SOURCE, "two questions with the id 'source'"),
    "no id": ({"question": "Who?"}, r"\.qas\[1\].id should be a text"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_questions_that_are_none(kind, river):
    row, message = ROWS[kind]
    with pytest.raises(UserError, match=message):
        river(SOURCE, row)


def test_a_compressed_file_that_is_none(tmp_path, vocabulary):
    for name, content in ("plain.json.gz", b"{}"), ("cut.json.gz", gzip.compress(b"{}" * 99)[:-9]):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            squad.make(str(path), vocabulary)
    with pytest.raises(UserError, match=r"cannot read .*absent.json: No such file"):
        squad.make(str(tmp_path / "absent.json"), vocabulary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=128, stride=128), "length = 128 should be more than .*stride"),
        (
            dict(length=16, stride=9),
            r"leaves 7 tokens .*question of 6.*stride = 9; raise length",
        ),
        (dict(stride=-1), "stride = -1 should be 0 or more"),
        (dict(max_answer=0), "max_answer = 0 should be 1 or more"),
        (dict(buckets=(64,)), "config.data.buckets"),
        (dict(length=3, stride=0), "length = 3"),
    ],
)
def test_options_that_cannot_be(river, options, message):
    with pytest.raises(UserError, match=message):
        assert river(SOURCE, **options).num_eval


def test_a_tokenizer_without_a_first_token(tmp_path):
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(
        [RIVER], 400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    made.save_model(str(tmp_path))
    path = write(tmp_path / "river.json", SOURCE)
    with pytest.raises(UserError, match=r"config.data.tokenizer should be that of"):
        squad.make(path, str(tmp_path))


def test_a_tokenizer_that_cuts_off_the_beginning(tmp_path, vocabulary):
    shutil.copy(vocabulary, tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    path = write(tmp_path / "river.json", SOURCE)
    with pytest.raises(UserError, match=r'truncation_side = "left" in tokenizer_c'):
        squad.make(path, str(tmp_path))


def test_training_needs_a_file(river):
    data = river(SOURCE)
    assert data.num_train == 0
    with pytest.raises(UserError, match=r"config.data.train names no file"):
        data.train(1, 0)


# --- predict ---------------------------------------------------------------------------------------------------------


def finder(data, words):
    """A network that knows the answers: high scores at the first of `words` and at the last."""
    first, last = data.cutter.tokenizer.encode(words)[0][[0, -1]]

    def run(batch):
        assert batch.keys() == data.exported.keys()
        for key, spec in data.exported.items():
            assert batch[key].shape[1:] == spec.shape
            assert batch[key].dtype == spec.dtype
        # Also at the question's words and in padding, which are no answers.
        at = {"start": batch["tokens"] == first, "end": batch["tokens"] == last}
        return {
            k: 6.0 * v + 9.0 * (batch["segments"] == 0) * (batch["attended"] == 0)
            for k, v in at.items()
        }

    return run


def test_predict_finds_answers_in_a_document_of_any_length(river, tmp_path):
    data = river(SOURCE, length=32, stride=8)
    text = "Nothing is said here.\n" * 60 + RIVER + " And so on, and so on." * 50
    path = tmp_path / "river.txt"
    path.write_text(text)
    asked = ["Where does it rise?", "Which mountains?"]
    for document in (str(path), text):
        lines = list(
            data.predict([document, *asked], finder(data, "Basel and Cologne"))
        )
        assert [line for line in lines if not line.startswith(" ")] == asked
        begin = text.index("Basel")
        assert f"Basel and Cologne  (characters {begin} to {begin + 17}," in lines[1]
        assert lines[1].endswith("score 12.00)")
        assert len(lines) == 2 * (1 + 3)


def test_an_answer_over_the_end_of_a_line_is_shown_in_one(river):
    data = river(SOURCE, length=64)
    found = finder(data, "Basel and Cologne")
    document = RIVER.replace("Basel and", "Basel\r\nand")
    line = list(data.predict([document, "Where?"], found))[1]
    begin = document.index("Basel")
    assert f"Basel and Cologne  (characters {begin} to {begin + 18}, score" in line


def test_predict_gives_probabilities_of_answers_and_of_none(river):
    data = river(SOURCE, NONE, length=64, n_best=1)

    def run(batch):
        scores = {s: np.zeros(batch["tokens"].shape) for s in answers.SIDES}
        words = [data.cutter.tokenizer.token(t) for t in batch["tokens"][0]]
        for values in scores.values():
            values[:, words.index("alps")] = 1.0
            values[:, 0] = 0.5
        return scores

    lines = list(data.predict([RIVER, "Where?"], run))
    # Scores 2 and 1: the probability is 1 / (1 + exp(1 - 2)) = 0.7311.
    begin = RIVER.index("Alps")
    assert lines == [
        "Where?",
        f"   73.1%  Alps  (characters {begin} to {begin + 4}, score 2.00)",
        "   26.9%  no answer  (score 1.00)",
    ]


def test_predict_says_so_where_scores_are_not_finite(river):
    data = river(SOURCE, NONE, length=64)

    def run(batch):
        return dict.fromkeys(answers.SIDES, np.full(batch["tokens"].shape, np.nan))

    lines = list(data.predict([RIVER, "Where?"], run))
    assert lines[0] == "Where?"
    assert "not finite" in lines[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "needs a document.* and questions"),
        ([RIVER], "needs a document.* and questions"),
        (["absent.txt", "Who?"], "no such file: absent.txt"),
        ([" ", "Who?"], "the document is empty"),
        ([RIVER, " "], "has 0 tokens"),
        ([RIVER, "Who " * 80], "has 80 tokens.*max_question = 64"),
        ([str(squad.Path(squad.__file__).parent), "Who?"], "cannot read"),
    ],
)
def test_what_predict_cannot_use(river, given, message):
    data = river(SOURCE, length=128)
    with pytest.raises(UserError, match=message) as caught:
        list(data.predict(given, run=None))
    assert "\n" not in str(caught.value)
