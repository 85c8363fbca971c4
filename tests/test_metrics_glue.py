"""GLUE's scores against scikit-learn, SciPy's formulas and hand calculations; the loss of a regression."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from squeeze_jax.data import glue as tasks
from squeeze_jax.train.losses import squared_error
from squeeze_jax.train.metrics import glue


def rows(prediction, label, **more):
    return {"prediction": np.array(prediction), "label": np.array(label)} | more


def data(task, num_eval=8, matched=8):
    return types.SimpleNamespace(task=task, num_eval=num_eval, matched=matched)


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_classes_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    label = rng.random(200) < 0.3
    found = np.where(rng.random(200) < 0.6, label, rng.random(200) < 0.5).astype(int)
    label = label.astype(int)
    given = rows(found, label)
    want = sklearn.metrics.matthews_corrcoef(label, found)
    assert glue.scores("cola", given) == pytest.approx({"matthews": want, "score": want})  # fmt: skip
    accuracy = sklearn.metrics.accuracy_score(label, found)
    f1 = sklearn.metrics.f1_score(label, found)
    want = {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2}
    assert glue.scores("mrpc", given) == pytest.approx(want)
    assert glue.scores("qqp", given) == pytest.approx(want)
    for task in ("sst2", "qnli", "rte", "wnli"):
        want = {"accuracy": accuracy, "score": accuracy}
        assert glue.scores(task, given) == pytest.approx(want)


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_numbers_are_those_of_scipy(seed):
    stats = importlib.import_module("scipy.stats")  # it comes with scikit-learn
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 26, 300) / 5  # with many equal values
    found = label + rng.normal(size=300)
    found[:50] = found[50:100]
    pearson = stats.pearsonr(found, label)[0]
    spearman = stats.spearmanr(found, label)[0]
    want = {"pearson": pearson, "spearman": spearman, "score": (pearson + spearman) / 2}
    assert glue.scores("stsb", rows(found, label)) == pytest.approx(want)


def test_by_hand():
    # 3 right of 4. True positives 1, false 0, missed 1, true negatives 2: F1 = 2/3,
    # Matthews = (1*2 - 0*1) / sqrt(1 * 2 * 2 * 3) = 1/sqrt(3).
    given = rows([1, 0, 0, 0], [1, 1, 0, 0])
    assert glue.scores("mrpc", given)["f1"] == pytest.approx(2 / 3)
    assert glue.scores("mrpc", given)["score"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert glue.scores("cola", given)["matthews"] == pytest.approx(3**-0.5)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    given = rows([0.0, 1.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0])
    assert glue.scores("stsb", given)["spearman"] == pytest.approx(4.5 / 22.5**0.5)
    assert glue.ranks(np.array([5, 1, 5, 5])).tolist() == [3, 1, 3, 3]


def test_both_genres_of_mnli_are_told_apart_by_their_index():
    given = rows([0, 1, 2, 0], [0, 1, 1, 1], index=np.array([4, 0, 1, 3]))
    # Of 0 and 1, which are matched, one is right; of 3 and 4 one, too; of all but 4, one of three.
    assert glue.scores("mnli", given, 2) == {"accuracy": 0.5, "accuracy_mismatched": 0.5, "score": 0.5}  # fmt: skip
    found = glue.scores("mnli", given, 4)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_mismatched"] == 1
    assert found["score"] == pytest.approx(2 / 3)
    assert glue.scores("mnli", given, 9) == {"accuracy": 0.5, "score": 0.5}


def test_what_is_not_defined_is_zero():
    for constant in (0, 1):
        given = rows([constant] * 4, [1, 1, 0, 0])
        assert glue.scores("cola", given)["matthews"] == 0
        want = sklearn.metrics.matthews_corrcoef(given["label"], given["prediction"])
        assert want == 0
    assert glue.scores("mrpc", rows([0, 0], [1, 0]))["f1"] == 0
    assert glue.scores("mrpc", rows([0, 0], [0, 0]))["f1"] == 0
    labels = [1.0, 2.0, 3.0]
    for found in ([2.5] * 3, [np.nan] * 3, [1.0, np.inf, 2.0]):
        want = {"pearson": 0, "spearman": 0, "score": 0}
        assert glue.scores("stsb", rows(found, labels)) == want
    assert glue.scores("stsb", rows([1.0], [1.0]))["score"] == 0
    assert glue.scores("sst2", rows([], [])) == {"accuracy": 0, "score": 0}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_metric_has_its_headline(task):
    metric = glue.make(data(task, matched=4))
    classes = max(1, len(tasks.TASKS[task].names))
    label = np.arange(8) % classes if classes > 1 else np.arange(8) / 2
    logits = np.random.default_rng(0).normal(size=(8, classes))
    batch = {"label": label, "mask": np.ones(8, bool)}
    sums, kept = jax.jit(metric.measure)(logits, batch)
    found = metric.score(
        {k: float(v) for k, v in sums.items()},
        {k: np.asarray(v) for k, v in kept.items()} | {"index": np.arange(8)},
    )
    assert set(found) == {"eval_loss", *metric.names}
    several = ("mrpc", "qqp", "stsb", "mnli")
    first = {"cola": "eval_matthews"}.get(task, "eval_accuracy")
    assert metric.headline == ("eval_score" if task in several else first)
    assert all(type(value) is float for value in found.values())


def test_mnli_of_one_genre():
    assert glue.make(data("mnli")).headline == "eval_accuracy"
    assert glue.make(data("mnli", matched=0)).names == ("eval_accuracy", "eval_score")


def test_padding_counts_nothing():
    mask = np.array([True, True, False])
    batch = {"label": np.array([0, 1, 0]), "mask": mask}
    logits = np.log(np.array([[1, 1], [1, 3], [0.001, 1]]))
    sums, kept = glue.make(data("sst2")).measure(jnp.array(logits), batch)
    # -log 1/2 - log 3/4
    assert float(sums["loss"]) == pytest.approx(np.log(2) + np.log(4 / 3))
    assert float(sums["examples"]) == 2
    assert np.asarray(kept["prediction"]).tolist() == [0, 1, 1]
    batch = {"label": np.array([1.0, 2.0, 9.0], np.float32), "mask": mask}
    logits = jnp.array([[1.5], [0.0], [0.0]])
    sums, kept = glue.make(data("stsb")).measure(logits, batch)
    assert float(sums["loss"]) == 0.25 + 4
    assert kept["prediction"].tolist() == [1.5, 0, 0]
    loss, metrics = squared_error.make()(logits, {}, batch)
    assert float(loss) == (0.25 + 4) / 2
    assert float(metrics["absolute_error"]) == (0.5 + 2) / 2
    gradient = jax.grad(lambda x: squared_error.make()(x, {}, batch)[0])(logits)
    # d/dx (x - y)^2 / 2 = x - y, padding 0.
    assert gradient.tolist() == [[0.5], [-2.0], [0.0]]
