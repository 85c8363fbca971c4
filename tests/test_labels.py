"""Labels that are no class give no number, in every loss and metric; labels that do not count may be anything."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.data import mix
from squeeze_jax.distill import soft_logits
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.train import optim
from squeeze_jax.train.losses import (
    causal_lm,
    cross_entropy,
    masked_lm,
    next_token,
    pretraining_loss,
    span,
    squared_error,
)
from squeeze_jax.train.metrics import (
    classification,
    glue,
    perplexity,
    regression,
    segmentation,
)

CLASSES, BATCH, LENGTH = 4, 3, 5
RNG = np.random.default_rng(0)


def scores(*shape):
    return jnp.asarray(RNG.normal(size=(*shape, CLASSES)), jnp.float32)


def loss_of(module):
    def run(logits, batch):
        value, metrics = module.make()(logits, {}, batch)
        return [value, *metrics.values()]

    return run


def sums_of(module, names):
    def run(logits, batch):
        sums, _ = module.measure(logits, batch)
        return [sums[name] for name in names]

    return run


class Labels:
    label_names = tuple("abcd")
    task = "mnli"
    matched = num_eval = 0


ROWS = np.ones((BATCH, LENGTH), np.int32)
# name: (function of logits and batch, logits, the batch without labels, where the labels stand)
CASES = {
    "cross_entropy": (loss_of(cross_entropy), scores(BATCH), {}, "label"),
    "a map": (loss_of(cross_entropy), scores(BATCH, 2, 2), {}, "target"),
    "masked_lm": (
        loss_of(masked_lm),
        scores(BATCH, LENGTH),
        {"chosen": ROWS, "tokens": ROWS},
        "targets",
    ),
    "next_token": (
        loss_of(next_token),
        scores(BATCH, LENGTH),
        {"attended": ROWS, "fresh": np.ones(BATCH, bool)},
        "targets",
    ),
    "causal_lm": (
        loss_of(causal_lm),
        scores(BATCH, LENGTH),
        {"attended": ROWS},
        "tokens",
    ),
    "segments": (
        loss_of(pretraining_loss),
        {"masked_lm": scores(BATCH, LENGTH), "next_sentence": scores(BATCH)},
        {"targets": 0 * ROWS, "chosen": ROWS, "tokens": ROWS},
        "label",
    ),
    "classification": (
        sums_of(classification, ("loss", "top1")),
        scores(BATCH),
        {},
        "label",
    ),
    "segmentation": (
        lambda logits, batch: [
            segmentation.measure(logits, batch)[0]["loss"],
        ],
        scores(BATCH, 2, 2),
        {},
        "target",
    ),
    "glue": (
        lambda logits, batch: [glue.make(Labels).measure(logits, batch)[0]["loss"]],
        scores(BATCH),
        {},
        "label",
    ),
    "perplexity": (
        lambda logits, batch: [perplexity.make(None).measure(logits, batch)[0]["loss"]],
        scores(BATCH, LENGTH),
        {"attended": ROWS, "fresh": np.ones(BATCH, bool)},
        "targets",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_label_that_is_no_class_gives_no_number(name):
    run, logits, rest, key = CASES[name]
    shapes = {"label": (BATCH,), "target": (BATCH, 2, 2)}
    shape = shapes.get(key, (BATCH, LENGTH))
    labels = RNG.integers(0, CLASSES, shape).astype(np.int32)
    mask = np.array([True, True, False])
    compiled = jax.jit(run)

    def values(labels):
        return [float(v) for v in compiled(logits, {**rest, key: labels, "mask": mask})]

    def changed(row, label):
        other = labels.copy()
        other.reshape(BATCH, -1)[row, -1] = label
        return other

    good = values(labels)
    assert np.isfinite(good).all()
    assert good[0] > 0
    for label in (CLASSES, 100, -1):
        assert np.isnan(values(changed(0, label))[0]), label
        np.testing.assert_array_equal(values(changed(2, label)), good)  # not counted
    with pytest.raises(UserError, match="label 9 is none of the 4 classes, 0 to 3"):
        run(
            logits, {**rest, key: jnp.asarray(changed(1, 9)), "mask": jnp.asarray(mask)}
        )


def test_hits_of_such_a_label_are_no_number_either():
    logits = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
    batch = {"label": np.array([1, 7]), "mask": np.ones(2, bool)}
    run = jax.jit(lambda b: loss_of(cross_entropy)(logits, b))
    assert np.isnan(run(batch)).all()
    sums, _ = jax.jit(lambda b: classification.measure(logits, b))(batch)
    assert np.isnan([sums[k] for k in ("loss", "top1", "top5")]).all()


@pytest.mark.parametrize("classes", [5, 6])
def test_the_top_5_of_5_classes_say_nothing(classes):
    data = types.SimpleNamespace(label_names=tuple("abcdef"[:classes]))
    metric = classification.make(data)
    batch = {"label": np.array([classes - 1]), "mask": np.ones(1, bool)}
    sums, rows = metric.measure(-jnp.arange(classes, dtype=jnp.float32)[None], batch)
    values = metric.score(jax.device_get(sums), rows)
    assert values["eval_accuracy"] == 0
    # The label is the least likely of the classes.
    assert values.get("eval_top5") == (0 if classes == 6 else None)
    assert ("eval_top5" in metric.names) == (classes == 6)


def test_the_map_label_that_does_not_count_is_255():
    """PyTorch's `ignore_index`, by hand: without the pixel the mean is over the others."""
    logits = scores(1, 2, 2)
    target = np.array([[[0, 1], [2, 255]]])
    mask = np.ones(1, bool)
    value = loss_of(cross_entropy)(
        logits, {"target": jnp.asarray(target), "mask": mask}
    )
    each = -jax.nn.log_softmax(logits)[0].reshape(4, CLASSES)[
        jnp.arange(3), jnp.arange(3)
    ]
    np.testing.assert_allclose(value[0], each.mean(), rtol=1e-6)
    run = jax.jit(lambda t: segmentation.measure(logits, {"target": t, "mask": mask}))
    sums, _ = run(target)
    np.testing.assert_allclose(sums["loss"], each.sum(), rtol=1e-6)
    sums, _ = run(np.array([[[0, 1], [2, 4]]]))
    found = segmentation.score(("a", "b", "c", "d"), sums, {})
    assert np.isnan(list(found.values())).all()


def test_positions_before_the_sequence():
    logits = {side: scores(2) for side in span.SIDES}
    mask = np.ones(2, bool)

    def value(position):
        batch = {
            "start": jnp.array([0, position]),
            "end": jnp.array([1, 2]),
            "mask": mask,
        }
        return float(loss_of(span)(logits, batch)[0])

    assert np.isnan(value(-1))
    # Beyond the sequence it does not count, as in BERT's code.
    assert np.isfinite(value(CLASSES))


def test_mixed_labels():
    batch = {
        "image": np.zeros((4, 2, 2, 1), np.uint8),
        "label": np.array([0, 1, 4, 9]),
        "mask": np.array([True, True, True, False]),
    }
    key = jax.random.key(0)
    mixed = mix.augment(key, batch, num_classes=CLASSES, mixup=0.2, cutmix=0)
    logits = scores(4)
    run = jax.jit(lambda b: loss_of(cross_entropy)(logits, b)[0])
    assert np.isnan(run(mixed))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros(3, np.float32), r"float32 \[3\] for logits \[3, 4\]"),
        (np.zeros((3, 1), np.int32), r"int32 \[3, 1\].*integers \[3\]"),
        (np.zeros((3, 5), np.float32), r"the share of each class.*\[3, 4\]"),
    ],
)
def test_labels_of_another_shape(label, message):
    batch = {"label": label, "mask": np.ones(3, bool)}
    with pytest.raises(UserError, match=message):
        jax.jit(lambda b: loss_of(cross_entropy)(scores(3), b))(batch)


def test_a_regression_needs_one_number():
    batch = {"label": np.zeros(3), "mask": np.ones(3, bool)}
    with pytest.raises(UserError, match=r"one number an example.*num_classes=1"):
        loss_of(squared_error)(scores(3), batch)


@pytest.mark.parametrize(
    ("label", "mask", "message"),
    [
        (np.zeros((4, 2), np.float32), None, "a regression of 4 examples needs one number"),
        (np.zeros(3, np.float32), None, "a regression of 4 examples needs one number"),
        (np.zeros(4, np.float32), np.ones((4, 1), bool), r"mask is \[4, 1\]: give one"),
        (None, None, "has mask and no label"),
    ],
)  # fmt: skip
def test_labels_and_masks_of_a_regression_have_one_number_an_example(label, mask, message):  # fmt: skip
    batch = {} if label is None else {"label": label}
    batch["mask"] = np.ones(4, bool) if mask is None else mask
    for fn in (squared_error.make(), lambda x, _, batch: regression.make().measure(x, batch)):  # fmt: skip
        with pytest.raises(UserError, match=message):
            fn(np.zeros((4, 1), np.float32), {}, batch)


def test_a_column_of_labels_is_one_number_an_example():
    logits, label = np.arange(4.0)[:, None], np.arange(4.0)[:, None] + 2
    loss, _ = squared_error.make()(logits, {}, {"label": label})
    assert float(loss) == 4
    sums, _ = regression.make().measure(
        logits, {"label": label, "mask": np.ones(4, bool)}
    )
    assert float(sums["loss"]) == 16


def test_shares_of_classes_add_up_to_one():
    logits = np.zeros((3, 2), np.float32)
    batch = {"label": np.array([[0.25, 0.75], [1, 1], [-1, 2]], np.float32)}
    good, _ = cross_entropy.make()(logits, {}, batch | {"mask": np.array([1, 0, 0])})
    assert float(good) == pytest.approx(np.log(2))
    for which in (1, 2):
        mask = np.arange(3) == which
        assert np.isnan(cross_entropy.make()(logits, {}, batch | {"mask": mask})[0])


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (cross_entropy.make, dict(label_smoothing=1.5), r"label_smoothing = 1.5 should lie in \[0, 1\)"),
        (cross_entropy.make, dict(label_smoothing=True), "label_smoothing = True .bool. should be float"),
        (cross_entropy.make, dict(label_smothing=0.1), "has no argument 'label_smothing'; did you mean 'label_smoothing'"),
        (optim.make, dict(steps=5, lr=float("nan")), "lr = nan should be a finite number"),
        (soft_logits.make, dict(kind="k"), "kind = 'k' .str. should be one of"),
    ],
)  # fmt: skip
def test_arguments_from_python_are_checked(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)
    assert "label_smoothing" in inspect.signature(cross_entropy.make).parameters


def test_a_mean_has_one_weight_for_each_value():
    with pytest.raises(UserError, match=r"values \[4\] has weights \[4, 1\]"):
        means.mean(np.ones(4), np.ones((4, 1)))
