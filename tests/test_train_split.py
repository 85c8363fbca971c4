"""A batch in parts, accumulated or on devices, has the loss and the gradients of the whole batch, whatever a loss counts."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from squeeze_jax import methods
from squeeze_jax.comm import mean
from squeeze_jax.distill import attention, hidden, soft_logits
from squeeze_jax.errors import UserError
from squeeze_jax.nn import means
from squeeze_jax.prune import group_lasso
from squeeze_jax.train import sharding, state, step
from squeeze_jax.train.losses import (
    causal_lm,
    cross_entropy,
    masked_lm,
    next_token,
    pretraining_loss,
    replaced,
    span,
)

pytestmark = pytest.mark.usefixtures("four_devices")

ROWS, LENGTH, WORDS, CLASSES = 8, 12, 7, 5
EXAMPLE = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
SPLITS = {
    "parts": dict(accumulate=4),
    "devices": dict(exchange=mean.make(), devices=4),
    "both": dict(accumulate=2, exchange=mean.make(), devices=2),
}


class Net(nn.Module):
    """Scores of words for each token; `heads` names its outputs, None for one."""

    heads: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, tokens, *, train=False):
        x = nn.Embed(WORDS, 8, name="embed")(tokens)
        x = nn.tanh(nn.Dense(8, name="dense")(x))
        scores = jnp.einsum("bld,bmd->blm", x, x)[:, None]
        endpoints = {
            "layer1": x,
            "scores1": scores,
            "is_replaced": tokens % 2,
        }
        if self.heads is None:
            return nn.Dense(WORDS, name="head")(x), endpoints
        sizes = {"masked_lm": WORDS, "next_sentence": 2}
        logits = {k: nn.Dense(sizes.get(k, 1), name=k)(x) for k in self.heads}
        for name in self.heads:
            if name == "next_sentence":
                logits[name] = logits[name][:, 0]
            elif name != "masked_lm":
                logits[name] = logits[name][..., 0]
        return logits, endpoints


def batch():
    """Rows that count 1 and 8 tokens by turns, and one row that does not count."""
    rng = np.random.default_rng(0)
    lengths = np.array([2, 12, 3, 12, 2, 11, 4, 9])
    chosen = np.arange(LENGTH) < np.array([1, 8, 1, 8, 1, 8, 1, 8])[:, None]

    def words():
        return rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)

    return {
        "tokens": words(),
        "targets": words(),
        "target": np.where(chosen, words(), 255)[:, :, None].astype(np.int32),
        "chosen": chosen,
        "attended": np.arange(LENGTH) < lengths[:, None],
        "fresh": np.ones(ROWS, bool),
        "label": rng.integers(0, 2, ROWS).astype(np.int32),
        "start": np.array([0, 3, 99, 4, 99, 99, 2, 1], np.int32),
        "end": np.array([1, 99, 99, 5, 99, 7, 3, 2], np.int32),
        "mask": np.arange(ROWS) != 3,
        "teacher": (
            {
                "logits": rng.normal(size=(ROWS, LENGTH, WORDS)).astype(np.float32),
                "layer1": rng.normal(size=(ROWS, LENGTH, 8)).astype(np.float32),
                "scores1": rng.normal(size=(ROWS, 1, LENGTH, LENGTH)).astype(
                    np.float32
                ),
            },
        ),
    }


def of_pixels():
    """Cross-entropy of maps one pixel wide."""
    loss = cross_entropy.make()
    return lambda logits, endpoints, batch: loss(logits[:, :, None], endpoints, batch)


def compared(unbound):
    """A loss against a teacher, bound to the shapes of the network."""
    shapes = {
        "logits": jax.ShapeDtypeStruct((ROWS, LENGTH, WORDS), jnp.float32),
        "layer1": jax.ShapeDtypeStruct((ROWS, LENGTH, 8), jnp.float32),
        "scores1": jax.ShapeDtypeStruct((ROWS, 1, LENGTH, LENGTH), jnp.float32),
    }
    bound = unbound.bind(shapes, (shapes,))
    return lambda logits, endpoints, batch: bound.loss(logits, endpoints, batch, {})


def penalised():
    """A mean over tokens, and what no batch decides: it must not count once a part."""
    loss = masked_lm.make()

    def both(logits, endpoints, batch, params):
        value, metrics = loss(logits, endpoints, batch)
        return value + 0.1 * jnp.sum(params["dense"]["kernel"] ** 2), metrics

    return both


LOSSES = {
    "masked_lm": (masked_lm.make, None),
    "causal_lm": (causal_lm.make, None),
    "next_token": (next_token.make, None),
    "pretraining_loss": (pretraining_loss.make, ("masked_lm", "next_sentence")),
    "replaced": (replaced.make, ("masked_lm", "replaced")),
    "span": (span.make, ("start", "end")),
    "cross_entropy": (of_pixels, None),
    "soft_logits": (lambda: compared(soft_logits.make()), None),
    "hidden": (lambda: compared(hidden.make(((1, 1),))), None),
    "attention": (lambda: compared(attention.make("scores", ((1, 1),))), None),
    "with a penalty": (penalised, None),
}


def mesh_of(devices):
    return jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1, 1), sharding.AXES
    )


def stepped(objective, heads, *, accumulate=1, devices=1, **plugs):
    """The parameters and metrics after one step of SGD."""
    mesh = mesh_of(devices)
    model, tx = Net(heads), optax.sgd(1.0)
    begin = state.create(model, tx, EXAMPLE, jax.random.key(0))
    update = step.make(
        model,
        tx,
        objective,
        inputs=lambda batch: batch["tokens"],
        mesh=mesh,
        accumulate=accumulate,
        **plugs,
    )
    after, metrics = jax.jit(update)(begin, batch(), jax.random.key(1))
    return jax.device_get((after.params, metrics)), jax.device_get(begin.params)


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_are_the_whole(loss):
    make, heads = LOSSES[loss]
    (whole, metrics), _ = stepped(make(), heads)
    (parts, others), _ = stepped(make(), heads, **SPLITS["both"])
    chex.assert_trees_all_close(parts, whole, atol=2e-6)
    assert others.keys() == metrics.keys()
    for name, value in metrics.items():
        assert others[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("way", SPLITS)
def test_gradient_of_masked_tokens_is_that_of_pytorch(way):
    (after, metrics), before = stepped(masked_lm.make(), None, **SPLITS[way])
    weights = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), before)
    data = batch()
    x = weights["embed"]["embedding"][torch.tensor(data["tokens"]).long()]
    x = torch.tanh(x @ weights["dense"]["kernel"] + weights["dense"]["bias"])
    logits = x @ weights["head"]["kernel"] + weights["head"]["bias"]
    chosen = torch.tensor(data["chosen"] & data["mask"][:, None])
    targets = torch.tensor(data["targets"]).long()[chosen]
    loss = torch.nn.functional.cross_entropy(logits[chosen], targets)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = jax.tree.map(lambda w: (w - w.grad).detach().numpy(), weights)
    chex.assert_trees_all_close(after, expected, atol=2e-6)


def test_terms_divide_each_by_its_own():
    """A mean over tokens, one over examples, and a penalty on weights."""
    tokens = masked_lm.make()
    terms = (
        step.Term("both", 0.5, methods.objective(pretraining_loss.make())),
        step.Term(
            "tokens",
            1.0,
            methods.objective(
                lambda logits, endpoints, batch: tokens(
                    logits["masked_lm"], endpoints, batch
                )
            ),
        ),
        step.Term("lasso", 0.1, group_lasso.make(rules=(("dense/kernel", True),))),
    )
    heads = LOSSES["pretraining_loss"][1]
    (whole, _), _ = stepped(terms, heads)
    for split in SPLITS["both"], SPLITS["parts"]:
        (parts, _), _ = stepped(terms, heads, **split)
        chex.assert_trees_all_close(parts, whole, atol=2e-6)


def test_few_examples_in_many_parts_keep_their_size():
    """Two examples that count in four parts: their mean loss, by hand, and not half of it."""

    def loss(logits, endpoints, batch):
        return means.mean(jnp.full(batch["mask"].shape, 3.0), batch["mask"]), {}

    for split in SPLITS.values():
        assert loss_of(loss, [0, 5], **split) == pytest.approx(3.0)
        assert loss_of(loss, [], **split) == 0
    for split in {}, SPLITS["both"]:  # weights below 1 count as all others
        assert loss_of(loss, [0, 5], 0.05, **split) == pytest.approx(3.0)


def loss_of(loss, counted, weight=True, **split):
    """The loss of one step in which some examples count."""
    model, tx = Net(), optax.sgd(1.0)
    begin = state.create(model, tx, EXAMPLE, jax.random.key(0))
    split = dict(split)
    mesh = mesh_of(split.pop("devices", 1))
    whole = step.make(model, tx, loss, inputs=lambda b: b["tokens"], mesh=mesh, **split)
    data = batch() | {"mask": np.isin(np.arange(ROWS), counted) * weight}
    return jax.jit(whole)(begin, data, jax.random.key(0))[1]["loss"]


@pytest.mark.parametrize("transform", [jax.vmap, jax.checkpoint, jax.jit])
def test_a_mean_inside_a_transform_is_named_where_a_batch_has_parts(transform):
    """In one part it is right."""

    def loss(logits, endpoints, batch):
        values = jnp.full((1, batch["mask"].size), 3.0)
        inner = transform(lambda v: means.mean(v.ravel(), batch["mask"]))
        return inner(values).sum(), {}

    assert loss_of(loss, [0, 5]) == pytest.approx(3.0)
    for split in SPLITS["parts"], SPLITS["devices"]:
        with pytest.raises(UserError, match=r"mean is called inside .*call it outside"):
            loss_of(loss, [0, 5], **split)


def test_counting_beforehand_runs_no_second_forward_pass():
    """The compiled step in parts multiplies as many matrices as the whole one."""

    def products(accumulate):
        model, tx = Net(), optax.sgd(1.0)
        begin = state.create(model, tx, EXAMPLE, jax.random.key(0))
        one = step.make(
            model,
            tx,
            masked_lm.make(),
            inputs=lambda b: b["tokens"],
            accumulate=accumulate,
        )
        compiled = jax.jit(one).lower(begin, batch(), jax.random.key(0)).compile()
        return compiled.as_text().count(" dot(")

    assert products(4) == products(1) > 0
