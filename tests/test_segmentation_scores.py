"""Loss and scores of maps of labels against PyTorch and scikit-learn."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from squeeze_jax.errors import UserError
from squeeze_jax.train import loop
from squeeze_jax.train.losses import cross_entropy
from squeeze_jax.train.metrics import segmentation

NAMES = types.SimpleNamespace(label_names=("sky", "tree top", "road", "car", "sign"))


def batches(count=3, classes=5, never=4):
    """Maps in which one class never comes, neither as a target nor as a prediction; the last row is padding."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        logits = rng.normal(size=(4, 6, 7, classes)).astype(np.float32)
        logits[..., never] = -9
        target = rng.integers(0, never, (4, 6, 7)).astype(np.uint8)
        target[rng.random(target.shape) < 0.2] = 255
        mask = np.array([True, True, True, False])
        yield {"logits": logits, "target": target, "mask": mask}


def counted(batch):
    keep = (batch["target"] != 255) & batch["mask"][:, None, None]
    return batch["target"][keep].astype(int), batch["logits"][keep]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_pytorchs(smoothing):
    import torch

    (batch,) = batches(1)
    labels, logits = (torch.from_numpy(a) for a in counted(batch))
    expected = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=smoothing
    )
    loss = cross_entropy.make(smoothing)
    found, scores = loss(jnp.asarray(batch["logits"]), {}, batch)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    right = (logits.argmax(-1) == labels).float().mean().item()
    np.testing.assert_allclose(scores["accuracy"], right, rtol=1e-6)


def test_pixels_that_do_not_count_have_no_gradient():
    (batch,) = batches(1)
    loss = cross_entropy.make()
    gradient = jax.grad(lambda x: loss(x, {}, batch)[0])(jnp.asarray(batch["logits"]))
    keep = (batch["target"] != 255) & batch["mask"][:, None, None]
    assert not np.any(np.asarray(gradient)[~keep])
    assert np.any(np.asarray(gradient)[keep], axis=-1).all()
    nothing = batch | {"mask": np.zeros(4, bool)}
    assert loss(jnp.asarray(batch["logits"]), {}, nothing)[0] == 0


def test_a_map_of_another_size_is_an_error():
    (batch,) = batches(1)
    for logits in jnp.zeros((4, 3, 7, 5)), jnp.zeros((4, 5)):
        with pytest.raises(UserError, match="one row of class scores per pixel"):
            cross_entropy.make()(logits, {}, batch)


def test_scores_are_scikit_learns():
    metric = segmentation.make(NAMES)
    step = jax.jit(lambda variables, batch: metric.measure(batch["logits"], batch))
    scores = loop.evaluate(step, {}, batches(), lambda batch: batch, metric.score)
    pairs = [counted(batch) for batch in batches()]
    labels = np.concatenate([labels for labels, _ in pairs])
    logits = np.concatenate([logits for _, logits in pairs])
    predicted = logits.argmax(-1)
    iou = sklearn_metrics.jaccard_score(labels, predicted, average=None)
    expected = {
        "eval_loss": sklearn_metrics.log_loss(
            labels, jax.nn.softmax(logits, -1), labels=range(5)
        ),
        "eval_pixel_accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        # scikit-learn leaves out the class that never comes, too.
        "eval_mean_iou": iou.mean(),
        **dict(
            zip(
                ("eval_iou_sky", "eval_iou_tree_top", "eval_iou_road", "eval_iou_car"),
                iou,
                strict=True,
            )
        ),
    }
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("low+", "low-", "low"), ("low_", "low__2", "low")),
        (("a b", "a-b", "a b_2", "a_b"), ("a_b", "a_b_3", "a_b_2", "a_b_4")),
        (("a", "3", "b"), ("a", "3", "b", "3_2")),  # the network has one more class
        (("+", "-"), ("_", "__2")),
    ],
)
def test_each_class_has_its_own_score(classes, expected):
    score = segmentation.make(types.SimpleNamespace(label_names=classes)).score
    # Class i has one hit, and i of its pixels are predicted as the first class: IoU_i = 1 / (1 + i).
    confusion = np.eye(len(expected), dtype=int)
    confusion[:, 0] += np.arange(len(expected))
    scores = score({"loss": 0.0, "confusion": confusion, "examples": 1.0}, {})
    wrong = sum(range(len(expected)))
    ious = [1 / (1 + wrong), *(1 / (1 + i) for i in range(1, len(expected)))]
    found = {k: v for k, v in scores.items() if k.startswith("eval_iou_")}
    names = [f"eval_iou_{name}" for name in expected]
    assert found == pytest.approx(dict(zip(names, ious, strict=True)))
    assert scores["eval_mean_iou"] == pytest.approx(np.mean(ious))


def test_the_matrix_is_scikit_learns():
    (batch,) = batches(1)
    sums, _ = segmentation.measure(jnp.asarray(batch["logits"]), batch)
    labels, logits = counted(batch)
    expected = sklearn_metrics.confusion_matrix(
        labels, logits.argmax(-1), labels=range(5)
    )
    np.testing.assert_array_equal(sums["confusion"], expected)


def test_counts_beyond_what_float32_and_int32_hold_are_exact():
    """2**24 + 1 is no float32, and three times 2**30 is no int32."""
    parts = [np.array([[2**24 + 1, 2**30]], np.int32)] * 3
    steps = iter([({"confusion": part}, {}) for part in parts])
    sums = loop.evaluate(
        lambda variables, batch: next(steps),
        {},
        iter([{}] * 3),
        lambda batch: batch,
        lambda sums, rows: sums,
    )
    assert sums["confusion"].tolist() == [[3 * (2**24 + 1), 3 * 2**30]]


def test_nothing_counted_scores_zero():
    score = partial(segmentation.score, ("eval_iou_a", "eval_iou_b"))
    sums = {"loss": 0.0, "confusion": np.zeros((2, 2), int), "examples": 0.0}
    assert score(sums, {})["eval_mean_iou"] == 0.0
