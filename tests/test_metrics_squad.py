"""Exact match and F1 against the official scripts' numbers, and the loss of spans against PyTorch's."""

import gzip
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.train.losses import span
from squeeze_jax.train.metrics import _answers, squad


def noisy(text: str, other: str, number: int) -> str:
    """One of eight ways in which a prediction differs from an answer."""
    words = text.split()
    return [
        text,
        " ".join(words[1:]),
        "the " + text,
        text.upper() + ".",
        other,
        ", ".join(words[::-1]),
        "An",
        f'"{text}" and more',
    ][number % 8]


@pytest.fixture(scope="module")
def dev(shared):
    """Answers, noisy predictions, and for each question's id a number that looks random."""
    with gzip.open(shared / "data/text/squad/dev-v1.1.json.gz") as file:
        articles = json.load(file)["data"]
    rows = [q for a in articles for p in a["paragraphs"] for q in p["qas"]]
    golds = {row["id"]: [answer["text"] for answer in row["answers"]] for row in rows}
    numbers = {id: zlib.crc32(id.encode()) for id in golds}
    firsts = [texts[0] for texts in golds.values()]
    said = map(noisy, firsts, firsts[1:] + firsts[:1], numbers.values())
    return golds, dict(zip(golds, said, strict=True)), numbers


def test_version_1_gives_the_numbers_of_the_official_script(dev):
    # evaluate-v1.1.py of these predictions.
    golds, predictions, _ = dev
    assert _answers.evaluate(golds, predictions, False) == pytest.approx(
        {"exact": 43.604541154210025, "f1": 65.54789773732136}
    )


def test_version_2_gives_the_numbers_of_the_official_script(dev):
    # evaluate-v2.0.py --na-prob-file, of the same predictions where a third of the questions has lost its answers.
    golds, predictions, numbers = dev
    golds = {id: [] if numbers[id] // 8 % 3 == 0 else golds[id] for id in golds}
    odds = {
        id: numbers[id] // 24 % 1000 / 100 - 5 + (-2 if golds[id] else 2)
        for id in golds
    }
    assert _answers.evaluate(golds, predictions, True) == pytest.approx(
        {
            "exact": 34.0964995269631,
            "f1": 48.419374453931454,
            "has_answer_exact": 43.54838709677419,
            "has_answer_f1": 65.15740622010476,
            "no_answer_exact": 15.516273849607183,
            "no_answer_f1": 15.516273849607183,
        }
    )
    assert _answers.thresholds(golds, predictions, odds) == pytest.approx(
        {
            "best_exact": 45.629139072847686,
            "best_exact_threshold": -2.64,
            "best_f1": 57.5205679624109,
            "best_f1_threshold": 2.94,
        }
    )


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("a U.S.  state", ["us state"], 1, 1),
        ("theatre", ["atre"], 0, 0),  # an article is a whole word
        ("Broncos", ["Denver Broncos", "the Denver football Broncos"], 0, 2 / 3),
        ("to be or not to be", ["to be"], 0, 2 * 2 / (6 + 2)),  # bags: "to" once
        ("Denver–Broncos", ["Denver Broncos"], 0, 0),  # a dash that is not ASCII stays
    ],
)
def test_words_are_compared_as_published(prediction, answers, exact, f1):
    for version2 in (False, True):
        assert _answers.exact(prediction, answers) == exact
        assert _answers.f1(prediction, answers, version2) == pytest.approx(f1)


def test_the_versions_differ_where_no_word_is_left():
    golds, predictions = {"q": ["the"]}, {"q": "a"}
    assert _answers.evaluate(golds, predictions, False) == {"exact": 100, "f1": 0}
    # In 2.0 that answer is none, so that only saying nothing is right.
    assert _answers.evaluate(golds, predictions, True)["f1"] == 100
    assert _answers.evaluate(golds, {"q": "a word"}, True)["exact"] == 0


def test_answering_nothing_is_best_where_no_answer_is_right():
    golds, said = {"a": ["x"], "b": [], "c": []}, {"a": "y", "b": "z", "c": "z"}
    best = _answers.thresholds(golds, said, {"a": 1.0, "b": 2.0, "c": 3.0})
    assert best["best_exact"] == pytest.approx(100 * 2 / 3)
    assert best["best_exact_threshold"] == 0


@pytest.fixture(scope="module")
def bert(transformers):
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    return transformers.BertForQuestionAnswering(config).eval()


@pytest.mark.parametrize("beyond", [False, True])
def test_loss_is_that_of_transformers(bert, beyond):
    import torch

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (6, 9))
    start = np.array([0, 3, 8, 2, 5, 1])
    end = np.array([0, 4, 8, 12 if beyond else 2, 7, 9 if beyond else 6])
    with torch.no_grad():
        theirs = bert(
            torch.tensor(tokens),
            start_positions=torch.tensor(start),
            end_positions=torch.tensor(end),
        )
    logits = {
        side: jnp.asarray(theirs[f"{side}_logits"].numpy()) for side in span.SIDES
    }
    # Two rows of padding, which no loss may see.
    logits = {k: jnp.concatenate([v, 9 * v[:2]]) for k, v in logits.items()}
    batch = {
        "start": jnp.asarray(np.r_[start, 1, 1]),
        "end": jnp.asarray(np.r_[end, 1, 1]),
        "mask": jnp.arange(8) < 6,
    }
    ours, metrics = jax.jit(span.make())(logits, {}, batch)
    assert float(ours) == pytest.approx(theirs.loss.item(), abs=1e-6)
    best = [theirs[f"{side}_logits"].argmax(-1).numpy() for side in span.SIDES]
    hits = (best[0] == start) & (best[1] == end)
    assert float(metrics["accuracy"]) == pytest.approx(hits.mean())


def test_accuracy_needs_begin_and_end():
    eye = 9.0 * jnp.eye(3)
    batch = {
        "start": jnp.arange(3),
        "end": jnp.array([0, 2, 1]),
        "mask": jnp.ones(3, bool),
    }
    _, metrics = span.make()({"start": eye, "end": eye}, {}, batch)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)


def test_rows_of_short_batches_are_as_long_as_others():
    # CE of equal logits over 4 positions is log 4; the second row is padding, and the third answer ends beyond the window.
    logits = {side: jnp.zeros((3, 4)) for side in span.SIDES}
    batch = {
        "start": jnp.array([1, 0, 3]),
        "end": jnp.array([2, 0, 5]),
        "mask": jnp.array([True, False, True]),
    }
    sums, rows = squad.measure(logits, batch, length=6)
    assert float(sums["examples"]) == 2
    assert float(sums["start_loss"]) == pytest.approx(2 * np.log(4))
    assert [float(sums[f"{side}_count"]) for side in span.SIDES] == [2, 1]
    assert float(sums["end_loss"]) == pytest.approx(np.log(4))
    loss, _ = span.make()(logits, {}, batch)
    assert float(loss) == pytest.approx(np.log(4))
    np.testing.assert_array_equal(rows["end"][0], [0, 0, 0, 0, -np.inf, -np.inf])
