"""Every loss and metric takes a user's batch: without a mask all examples count, and a missing entry is one line."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import squeeze_jax as sj
from squeeze_jax.errors import UserError

B, L, P, V, C = 4, 6, 2, 7, 3
rng = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def integers(high, *shape):
    return rng.integers(0, high, shape).astype(np.int32)


WORDS = {"targets": integers(V, B, P), "chosen": np.ones((B, P), np.int32)}
SIDES = {"start": integers(L, B), "end": integers(L, B)}
HEADS = {"masked_lm": floats(B, P, V), "replaced": floats(B, L), "next_sentence": floats(B, 2)}  # fmt: skip
REPLACED = {"is_replaced": integers(2, B, L)}
ENDPOINTS = {f"{kind}1": floats(B, 2, L, L) for kind in ("scores", "attention")}
ENDPOINTS |= {"layer1": floats(B, L, 8), "map": floats(B, 4, 4, 8)}
PAIRS = {"layers": (("map", "map"),)}

# {loss: (options, logits, endpoints, the entries that it needs)}
LOSSES = {
    "binary_cross_entropy": ({}, floats(B, C), {}, {"label": np.float32(integers(2, B, C))}),
    "causal_lm": ({}, floats(B, L, V), {}, {"tokens": integers(V, B, L)}),
    "cross_entropy": ({}, floats(B, C), {}, {"label": integers(C, B)}),
    "masked_lm": ({}, HEADS["masked_lm"], {}, WORDS),
    "next_token": ({}, floats(B, L, V), {}, {"targets": integers(V, B, L)}),
    "pretraining_loss": ({}, HEADS, {}, {**WORDS, "label": integers(2, B)}),
    "replaced": ({}, HEADS, REPLACED, WORDS),
    "span": ({}, {side: floats(B, L) for side in SIDES}, {}, SIDES),
    "squared_error": ({}, floats(B, 1), {}, {"label": np.float32(integers(9, B))}),
}  # fmt: skip
DISTILL = {
    "attention": {},
    "attention_transfer": PAIRS,
    "cosine": {},
    "feature_map": PAIRS,
    "hidden": {},
    "soft_logits": {},
}
# {metric: (data, logits, the entries that it needs)}
METRICS = {
    "classification": (None, floats(B, C), LOSSES["cross_entropy"][3]),
    "glue": (SimpleNamespace(task="sst2"), floats(B, C), LOSSES["cross_entropy"][3]),
    "labels": (None, floats(B, C), LOSSES["binary_cross_entropy"][3]),
    "perplexity": (None, floats(B, L, V), LOSSES["next_token"][3]),
    "pretraining": (SimpleNamespace(masked=lambda batch: batch), HEADS | REPLACED, LOSSES["pretraining_loss"][3]),
    "regression": (None, floats(B, 1), LOSSES["squared_error"][3]),
    "segmentation": (SimpleNamespace(label_names="abc"), floats(B, 2, 2, C), {"target": integers(C, B, 2, 2)}),
    "squad": (SimpleNamespace(length=L), LOSSES["span"][1], SIDES),
}  # fmt: skip


# Without targets these metrics read the labels of examples, and next tokens.
INSTEAD = {("segmentation", "target"): "label", ("pretraining", "targets"): "tokens"}


def of_a_loss(name):
    options, logits, endpoints, batch = LOSSES[name]
    loss = getattr(sj.losses, name).make(**options)
    return lambda batch: loss(logits, endpoints, batch), batch


def of_a_distillation(name):
    outputs = {**ENDPOINTS, "logits": floats(B, C)}
    shapes = jax.eval_shape(lambda: outputs)
    loss = getattr(sj.distill, name).make(**DISTILL[name]).bind(shapes, shapes).loss
    teacher = jax.tree.map(lambda x: 2 * x + 1, outputs)
    student = ENDPOINTS | {k: jnp.sin(v) for k, v in ENDPOINTS.items()}
    batch = {"teacher": (teacher,)}
    return lambda batch: loss(outputs["logits"], student, batch, {}), batch


def of_a_metric(name):
    data, logits, batch = METRICS[name]
    metric = getattr(sj.metrics, name).make(data)
    return lambda batch: metric.measure(logits, batch), batch


ALL = [
    (kind, name, make)
    for kind, table, make in (
        ("losses", LOSSES, of_a_loss),
        ("distill", DISTILL, of_a_distillation),
        ("metrics", METRICS, of_a_metric),
    )
    for name in table
]


def test_every_file_is_here():
    for kind in ("losses", "distill", "metrics"):
        package = getattr(sj, kind)
        names = {n for n in package.__all__ if hasattr(getattr(package, n), "make")}
        assert names == {name for k, name, _ in ALL if k == kind}


@pytest.mark.parametrize(("kind", "name", "make"), ALL)
def test_a_batch_needs_no_mask(kind, name, make):
    call, batch = make(name)
    without, of_all, of_some = (
        jax.tree.leaves(call(batch | mask))
        for mask in ({}, {"mask": np.ones(B, bool)}, {"mask": np.arange(B) < 2})
    )
    for a, b in zip(without, of_all, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(*pair) for pair in zip(of_all, of_some, strict=True))


@pytest.mark.parametrize(("kind", "name", "make"), ALL)
def test_a_missing_entry_is_named(kind, name, make):
    call, batch = make(name)
    readers = f"{kind}.{name}"
    for key in batch:
        others = {k: v for k, v in batch.items() if k != key} | {"extra": np.ones(B)}
        missing = INSTEAD.get((name, key), key)
        words = rf"^the batch has .*extra and no {missing}, which {readers} reads: \w"
        with pytest.raises(UserError, match=words) as caught:
            call(others)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"reads a batch, and got a list"):
        call([1, 2])


@pytest.mark.parametrize("name", ["span", "replaced", "soft_logits", "cosine"])
def test_outputs_that_a_loss_lacks_are_named(name):
    if name in DISTILL:
        call, batch = of_a_distillation(name)
        for teacher, words in (
            (batch["teacher"][0], "a tuple with one dict of outputs for each teacher"),
            (({"other": 1},), "the teacher has no endpoint '(logits|layer1)'"),
        ):
            with pytest.raises(UserError, match=words):
                call({"teacher": teacher})
        return
    _, logits, endpoints, batch = LOSSES[name]
    loss = getattr(sj.losses, name).make()
    words = "reads the network's start, and it gives one array"
    if name == "replaced":
        endpoints, words = (
            {},
            "reads the endpoint 'is_replaced', and the network gives none",
        )
    else:
        logits = floats(B, L)
    with pytest.raises(UserError, match=words):
        loss(logits, endpoints, batch)


def test_padding_is_left_out_under_both_of_its_names():
    logits, tokens = floats(B, L, V), integers(V, B, L)
    loss = sj.losses.causal_lm.make()
    half, _ = loss(logits[:, :3], {}, {"tokens": tokens[:, :3]})
    for name in ("attended", "attention_mask"):
        padding = np.tile(np.arange(L) < 3, (B, 1))
        found, _ = loss(logits, {}, {"tokens": tokens, name: padding})
        np.testing.assert_allclose(found, half, rtol=1e-6)
