"""Windows over documents against `transformers`, the labels in them, and that scores do not depend on their batches."""

import collections
import gzip
import json

import jax
import numpy as np
import pytest
import tokenizers

from squeeze_jax.data import answers, questions, spans, tokens
from squeeze_jax.data.tasks import squad
from squeeze_jax.train.metrics import squad as metric


@pytest.fixture(scope="module")
def dev(shared) -> str:
    return str(shared / "data/text/squad/dev-v1.1.json.gz")


def byte_level(folder, texts):
    """A small byte-level BPE with RoBERTa's special tokens."""
    made = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(
        texts, 1000, special_tokens=special, min_frequency=2, show_progress=False
    )
    made.save_model(str(folder))
    return tokens.load(folder)


@pytest.mark.parametrize(
    ("kind", "length", "stride"),
    [("bert", 384, 128), ("bert", 100, 30), ("roberta", 160, 64)],
)
def test_windows_are_those_of_transformers(
    kind, length, stride, transformers, dev, vocabulary, tmp_path
):
    content = questions.read(dev)
    rows = content.questions[::30]
    assert len(rows) == 353
    roberta = kind == "roberta"
    ours = (
        byte_level(tmp_path, content.documents[::40])
        if roberta
        else tokens.load(vocabulary)
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.backend, return_token_type_ids=True
    )
    expected = theirs(
        [row.text for row in rows],
        [content.documents[row.document] for row in rows],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    content = content._replace(questions=rows)
    cutter = spans.Cutter(ours, length, stride, 99, ())
    split = cutter.split(content, questions.answer_places(content))
    windows, packed = split.windows, split.reader.sequences
    assert windows.question.tolist() == expected["overflow_to_sample_mapping"]
    assert len(windows) > 353
    inside = 0
    for w, (number, begin, end, place) in enumerate(zip(*windows, strict=True)):
        row = slice(*packed.begins[w : w + 2])
        assert packed.tokens[row].tolist() == expected["input_ids"][w]
        assert packed.segments[row].tolist() == expected["token_type_ids"][w]
        offsets = split.documents[rows[number].document].offsets[begin:end].tolist()
        shown = expected["offset_mapping"][w]
        assert offsets == list(map(list, shown[place : place + end - begin]))
        text, first = rows[number].answers[0]
        ends = first, first + len(text) - 1
        where = [expected.char_to_token(w, c, sequence_index=1) for c in ends]
        label = [packed.fields[side][w].item() for side in answers.SIDES]
        if None not in where and shown[where[1]] == shown[label[1]]:
            # Of the tokens of one character's bytes theirs is the first, ours the last.
            assert label[1] == where[1] or roberta
            label[1] = where[1]
        assert label == (where if None not in where else [0, 0])
        inside += label != [0, 0]
    assert inside >= len(rows) - 5  # an answer may be longer than what windows share


def test_windows_overlap_by_the_stride():
    assert list(spans.window_bounds(10, room=4, stride=1)) == [(0, 4), (3, 7), (6, 10)]
    assert list(spans.window_bounds(9, room=4, stride=0)) == [(0, 4), (4, 8), (8, 9)]
    assert list(spans.window_bounds(4, room=4, stride=3)) == [(0, 4)]


def test_a_question_is_cut_and_an_answer_that_is_not_in_a_window_is_at_the_first_token(
    vocabulary,
):
    text = "The Rhine rises in the Alps. It flows north, past Basel and Cologne, and ends in the sea."
    begin = text.index("Cologne")
    asked = questions.Question("city", "Which city is past Basel?", 0, ())
    content = questions.Questions([text], [asked], False)
    cutter = spans.Cutter(tokens.load(vocabulary), 16, 2, 3, ())
    split = cutter.split(content, [(begin, begin + len("Cologne"))])
    # [CLS] which city is [SEP] and [SEP] leave 10 of 22 tokens, and the words begin at 5.
    # the rhine rises in the alps . it flows north , past basel and cologne , and ends in the sea .
    windows, fields = split.windows, split.reader.sequences.fields
    assert list(zip(windows.begin, windows.end, strict=True)) == [(0, 10), (8, 18), (16, 22)]  # fmt: skip
    # "cologne" is the word of number 14.
    assert fields["start"].tolist() == fields["end"].tolist() == [0, 5 + 14 - 8, 0]


def test_evaluation_does_not_depend_on_widths_and_order(dev, vocabulary, tmp_path):
    with gzip.open(dev) as file:
        content = json.load(file)
    content["data"] = content["data"][:1]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    found = []
    for buckets, rows in ((), 64), ((96, 128), 50):
        data = squad.make(str(path), vocabulary, length=160, stride=64, buckets=buckets)
        measured = metric.make(data)
        measure = jax.jit(measured.measure)
        sums, kept = collections.Counter(), []
        for batch in data.eval(rows):
            # Scores that are a function of the token and its neighbour alone.
            code = np.sin(batch["tokens"] + 2.0 * np.roll(batch["tokens"], 1, 1))
            each, parts = measure({"start": 9 * code, "end": 9 * np.cos(code)}, batch)
            sums.update({k: float(v) for k, v in each.items()})
            parts = {k: np.asarray(v)[batch["mask"]] for k, v in parts.items()}
            kept.append(parts | {"index": batch["index"][batch["mask"]]})
        rows = {k: np.concatenate([part[k] for part in kept]) for k in kept[0]}
        scores = measured.score(sums, rows)
        found.append((scores["eval_exact"], scores["eval_f1"], data.predictions(rows)))
        assert sums["examples"] == data.num_eval > len(data.golds)
    assert found[0] == found[1]
    assert 0 < found[0][1] < 50
