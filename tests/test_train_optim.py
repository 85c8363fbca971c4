"""Optimizers against PyTorch's on the same gradients; schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.train import optim

RNG = np.random.default_rng(0)
WEIGHTS = {"dense": {"kernel": RNG.normal(size=(5, 3)), "bias": RNG.normal(size=3)}}
WEIGHTS = jax.tree.map(lambda w: w.astype(np.float32), WEIGHTS)
GRADS = [
    jax.tree.map(lambda w: RNG.normal(size=w.shape).astype(np.float32), WEIGHTS)
    for _ in range(8)
]


def ours(**section):
    tx = optim.make(steps=100, schedule="constant", **section)
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    opt = tx.init(params)
    for grads in GRADS:
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
    return params["dense"]


def theirs(make, decay):
    kernel, bias = (
        torch.nn.Parameter(torch.tensor(WEIGHTS["dense"][k]))
        for k in ("kernel", "bias")
    )
    groups = [
        {"params": [kernel], "weight_decay": decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    for grads in GRADS:
        kernel.grad, bias.grad = (
            torch.tensor(grads["dense"][k]) for k in ("kernel", "bias")
        )
        optimizer.step()
    return {"kernel": kernel.detach().numpy(), "bias": bias.detach().numpy()}


@pytest.mark.parametrize(
    ("section", "make"),
    [
        (
            dict(name="sgd", momentum=0.9),
            lambda g: torch.optim.SGD(g, 0.05, momentum=0.9),
        ),
        (
            dict(name="sgd", nesterov=True),
            lambda g: torch.optim.SGD(g, 0.05, momentum=0.9, nesterov=True),
        ),
        (dict(name="adamw"), lambda g: torch.optim.AdamW(g, 0.05)),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_equals_pytorch_with_decay_on_kernels_only(section, make):
    expected = theirs(make, decay=0.1)
    for key, value in ours(lr=0.05, decay=0.1, **section).items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=1e-6)


def test_rmsprop_by_hand():
    """TensorFlow's RMSprop: v starts at 1, v = 0.9 v + 0.1 g², m = 0.9 m + g / sqrt(v + 0.001), w -= lr m."""
    v, m, w = (np.full(3, x, np.float64) for x in (1.0, 0.0, 0.0))
    w = w + WEIGHTS["dense"]["bias"]
    for grads in GRADS:
        g = grads["dense"]["bias"].astype(np.float64)
        v = 0.9 * v + 0.1 * g**2
        m = 0.9 * m + g / np.sqrt(v + 1e-3)
        w -= 0.05 * m
    result = ours(name="rmsprop", lr=0.05, b2=0.9, eps=1e-3, decay=0.1)["bias"]
    np.testing.assert_allclose(result, w, rtol=2e-5, atol=1e-6)


def test_lamb_first_step_by_hand():
    """After one step Adam's direction is sign(g) / (1 + eps'), decay adds 0.1 w, and the norm becomes that of w."""
    tx = optim.make("lamb", steps=10, lr=0.5, schedule="constant", decay=0.1, eps=1e-30)
    updates, _ = tx.update(GRADS[0], tx.init(WEIGHTS), WEIGHTS)
    w, g = WEIGHTS["dense"]["kernel"], GRADS[0]["dense"]["kernel"]
    direction = np.sign(g) + 0.1 * w
    expected = -0.5 * direction * np.linalg.norm(w) / np.linalg.norm(direction)
    np.testing.assert_allclose(updates["dense"]["kernel"], expected, rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    tx = optim.make(
        "sgd", steps=10, lr=1.0, schedule="constant", momentum=0.0, clip=0.5
    )
    updates, _ = tx.update(GRADS[0], tx.init(WEIGHTS), WEIGHTS)
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_decay_factors_follow_the_first_matching_rule():
    rules = (("bias$", 0.5), ("dense", 2.0))
    tx = optim.make(
        "sgd",
        steps=10,
        lr=1.0,
        schedule="constant",
        momentum=0.0,
        decay=0.1,
        decay_rules=rules,
    )
    zero = jax.tree.map(np.zeros_like, WEIGHTS)
    updates, _ = tx.update(zero, tx.init(WEIGHTS), WEIGHTS)
    np.testing.assert_allclose(
        updates["dense"]["bias"], -0.05 * WEIGHTS["dense"]["bias"], rtol=1e-6
    )
    np.testing.assert_allclose(
        updates["dense"]["kernel"], -0.2 * WEIGHTS["dense"]["kernel"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("section", "points"),
    [
        (
            dict(schedule="cosine"),
            {0: 1.0, 50: 0.5, 25: 0.5 + np.sqrt(0.125), 100: 0.0},
        ),
        (dict(schedule="linear", end=0.2), {0: 1.0, 50: 0.6, 100: 0.2}),
        (
            dict(schedule="step", boundaries=(0.3, 0.6), drop=0.1),
            {29: 1.0, 31: 0.1, 61: 0.01},
        ),
        (dict(schedule="constant", warmup=10), {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        (
            dict(schedule="step", boundaries=(0.5,), warmup=20),
            {10: 0.5, 49: 1.0, 51: 0.1},
        ),
        (dict(schedule="constant", warmup=0.1), {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        (dict(schedule="cosine", warmup=20), {10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
    ],
)
def test_schedule_passes_through_its_points(section, points):
    rate = optim.make_schedule(100, 1.0, **section)
    for at, value in points.items():
        assert float(rate(at)) == pytest.approx(value, abs=1e-6), at


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(lr=0.0), r"lr = 0\.0 should lie in \(0, 1000000\]"),
        (dict(lr=0.1, warmup=100), "warmup = 100 should lie in"),
        (dict(lr=0.1, warmup=2.5), "warmup = 2.5 should be a whole number"),
        (dict(lr=0.1, decay=-1.0), r"decay = -1\.0 should lie in \[0, 1000\]"),
        (dict(lr=0.1, schedule="step"), "boundaries is empty"),
        (
            dict(name="adamw", lr=0.1, momentum=0.8),
            "momentum = 0.8 has no effect on 'adamw', only on sgd, rmsprop",
        ),
        (dict(lr=0.1, drop=0.5), "drop = 0.5 has no effect on 'cosine', only on step"),
        (
            dict(lr=0.1, schedule="step", boundaries=(0.6, 0.3)),
            "should increase within",
        ),
    ],
)
def test_values_out_of_range_are_named(section, words):
    with pytest.raises(UserError, match=words):
        optim.make(steps=100, **section)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            dict(lr=0.1, momentun=0.9),
            "unknown key config.optim.momentun; did you mean 'momentum'",
        ),
        (dict(lr="fast"), r"config.optim.lr = 'fast' \(str\) should be float"),
        (
            dict(lr=0.1, schedule="cosin"),
            "should be one of 'cosine', 'linear', 'step', 'constant'",
        ),
        (dict(), "missing key config.optim.lr"),
        (dict(lr=0.1, nesterov=1), "nesterov = 1 .int. should be bool"),
        (dict(lr=0.1, warmup=True), "warmup = True .bool. should be float"),
    ],
)
def test_the_signature_is_the_schema(section, words):
    with pytest.raises(UserError, match=words):
        registry.check(optim.make, section, "config.optim", given=("steps",))


def test_what_is_frozen_stays_and_the_rest_is_trained_as_alone():
    found = ours(name="adamw", lr=0.1, freeze=("bias$",))
    np.testing.assert_array_equal(found["bias"], WEIGHTS["dense"]["bias"])
    alone = ours(name="adamw", lr=0.1)["kernel"]
    np.testing.assert_allclose(found["kernel"], alone, rtol=1e-5)


def test_what_is_frozen_takes_no_memory():
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    whole = optim.make("adamw", steps=9, lr=0.1).init(params)
    half = optim.make("adamw", steps=9, lr=0.1, freeze=("kernel",)).init(params)
    sizes = [sum(x.size for x in jax.tree.leaves(s) if x.ndim) for s in (whole, half)]
    assert sizes == [2 * (5 * 3 + 3), 2 * 3]


@pytest.mark.parametrize(
    ("freeze", "line"),
    [
        (("nothing",), "config.optim.freeze: the rule 'nothing' matches no parameter"),
        (("(",), "config.optim.freeze: '(' is not a regular expression"),
        (("dense/",), "config.optim.freeze = ('dense/',) finds every parameter"),
    ],
)
def test_bad_names_to_freeze(freeze, line):
    with pytest.raises(UserError) as error:
        ours(name="sgd", lr=0.1, freeze=freeze)
    assert str(error.value).startswith(line)
