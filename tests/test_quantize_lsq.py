"""Learned step sizes: values and gradients as the paper's equations, and when and what is quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Tap
from squeeze_jax.quantize import lsq
from squeeze_jax.train import forward


class Round(torch.autograd.Function):
    """Equations 1 to 3 of arXiv 1902.08153, written from the paper, with the gradient scale of section 2.2."""

    @staticmethod
    def forward(ctx, v, s, low, high, g):
        ctx.save_for_backward(v, s)
        ctx.limits = low, high, g
        return torch.clip(torch.round(torch.clip(v / s, low, high)), low, high) * s

    @staticmethod
    def backward(ctx, up):
        v, s = ctx.saved_tensors
        low, high, g = ctx.limits
        x = v / s
        inside = (x > low) & (x < high)
        ds = torch.where(inside, torch.round(x) - x, torch.clip(x, low, high))
        return up * inside, (up * ds).sum() * g, None, None, None


@pytest.mark.parametrize(("low", "high"), [(-127, 127), (-20, 235), (0, 3)])
def test_values_and_gradients_are_the_papers(low, high):
    rng = np.random.default_rng(0)
    # No value stands where the two definitions of the derivative at a border differ.
    x = rng.normal(size=(64,)).astype(np.float32) * high * 0.011
    up = rng.normal(size=x.shape).astype(np.float32)
    s = np.float32(0.01)
    g = 1 / np.sqrt(x.size * high)

    def ours(x, theta):
        return jnp.sum(
            up * lsq.fake(x, lsq.step_size(s, theta, x.size, high), low, high)
        )

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, jnp.float32(0))
    tx = torch.tensor(x, requires_grad=True)
    ts = torch.tensor(s, requires_grad=True)
    theirs = (torch.tensor(up) * Round.apply(tx, ts, low, high, g)).sum()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(grads[0], tx.grad.numpy(), rtol=1e-6)
    # A descent on θ changes s by the share that one on s with the paper's gradient does.
    np.testing.assert_allclose(grads[1], ts.grad.item() / s, rtol=1e-4)


def test_the_largest_weight_stands_inside_of_the_range():
    """Its gradient is 1, as of every weight that is not clipped."""
    kernel = jnp.array([[0.3, -7.0], [0.1, 2.0], [-0.2, 0.1]])
    grad = jax.grad(lambda w: lsq.quantized_weight(w, jnp.zeros(2), 8).sum())(kernel)
    np.testing.assert_allclose(grad, np.ones((3, 2)), rtol=1e-6)


def test_a_kernel_by_hand():
    """Two filters, 3 bits: levels -3..3; steps 0.6 / 3 and 3 / 3. 0.29 / 0.2 = 1.45 rounds to 1, -0.31 to -2 steps."""
    kernel = jnp.array([[0.6, 3.0], [0.29, -1.4], [-0.31, 0.4]])
    found = lsq.quantized_weight(kernel, jnp.zeros(2), 3)
    np.testing.assert_allclose(found, [[0.6, 3], [0.2, -1], [-0.4, 0]], atol=1e-6)
    # A learned factor of 1/2 halves the step: 0.6 and 3 are clipped at three steps.
    half = lsq.quantized_weight(kernel, jnp.full(2, np.log(0.5)), 3)
    np.testing.assert_allclose(half, [[0.3, 1.5], [0.3, -1.5], [-0.3, 0.5]], atol=1e-6)


def test_activations_by_hand():
    """2 bits over -1..2: step 1, zero point 1, levels -1, 0, 1, 2; zero stays zero, 5 is clipped."""
    known = {"low": jnp.float32(-1), "high": jnp.float32(2)}
    x = jnp.array([[-3.0, -0.6, 0.0, 0.4, 1.6, 5.0]])
    found = lsq.quantized_activation(x, jnp.float32(0), known, 2)
    np.testing.assert_allclose(found, [[-1, -1, 0, 0, 2, 2]], atol=1e-6)
    # After a ReLU nothing is below zero: all levels are above it.
    known = {"low": jnp.float32(0), "high": jnp.float32(3)}
    found = lsq.quantized_activation(x, jnp.float32(0), known, 2)
    np.testing.assert_allclose(found, [[0, 0, 0, 0, 2, 3]], atol=1e-6)


@functools.cache
def network(start=2):
    """(network as it is run, variables, images, the same module alone)."""
    net = models.make("squeezenet", variant="tiny", num_classes=10)
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    example = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    method = lsq.make(start=start, observe=1, bits=4, activation_bits=8)
    (taps,) = forward.accepted_taps(net, example, (method,))
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    own = method.init(jax.random.key(1), params, taps)
    variables = {
        "params": params | {METHODS: {"lsq": own}},
        "extra": {"lsq": method.state(params, taps)},
        "batch_stats": {},
    }
    run = forward.make(net, example, forwards={"lsq": method})
    return run, variables, x, net


def at(step, train=True, changes=None, seed=0):
    """((logits, endpoints), changed) of the network at a step."""
    run, variables, x, _ = network()
    variables = variables | (changes or {}) | {"step": jnp.int32(step)}
    key = jax.random.key(seed) if train else None
    call = jax.jit(lambda v: forward.run(run, v, x, train=train, key=key))
    return call(variables)


def test_before_its_start_the_network_is_in_float_and_ranges_are_observed():
    _, variables, x, net = network()
    (logits, _), changed = at(0, train=False)
    plain = {"params": {k: v for k, v in variables["params"].items() if k != METHODS}}
    expected = jax.jit(lambda v: net.apply(v, x, train=False)[0])(plain)
    np.testing.assert_array_equal(logits, expected)
    _, changed = at(0)  # of the steps before the start one observes
    assert not np.isfinite(changed["extra"]["lsq"]["conv1/inputs"]["high"])
    _, changed = at(1)
    known = changed["extra"]["lsq"]["conv1/inputs"]
    assert (known["low"], known["high"]) == (x.min(), x.max())
    assert len(changed["extra"]["lsq"]) == 8  # conv1, two fires of three, conv10
    # Later the range stays, whatever comes.
    _, later = at(5, changes={"extra": changed["extra"]})
    assert later["extra"]["lsq"]["conv1/inputs"] == known


def test_from_its_start_weights_and_activations_lie_on_their_levels():
    run, variables, _, _ = network()
    _, changed = at(1)
    state = {"extra": changed["extra"]}
    (logits, _), _ = at(2, train=False, changes=state)
    (before, _), _ = at(1, train=False, changes=state)
    assert np.abs(logits - before).max() > 1e-4
    folded, plain = forward.fold_reparametrizations(
        run, variables | state | {"step": jnp.int32(2)}
    )
    for name, kernel in tree.flatten(forward.parameters(plain["params"])).items():
        if name.endswith("/kernel"):
            columns = np.asarray(kernel).reshape(-1, kernel.shape[-1]).T
            assert max(len(np.unique(c)) for c in columns) <= 15, name
    # What is left intercepts the activations; the result is the same.
    assert list(folded.forwards) == ["lsq"]
    (again, _), _ = jax.jit(lambda v: forward.run(folded, v, network()[2]))(plain)
    np.testing.assert_allclose(again, logits, atol=1e-5)


def test_step_sizes_learn():
    run, variables, x, _ = network()
    _, changed = at(1)

    def loss(own):
        params = variables["params"] | {METHODS: {"lsq": own}}
        now = variables | {"params": params, "extra": changed["extra"]}
        now["step"] = jnp.int32(9)
        (logits, _), _ = forward.run(run, now, x, train=True, key=jax.random.key(0))
        return jnp.sum(jnp.sin(logits))

    grads = jax.jit(jax.grad(loss))(variables["params"][METHODS]["lsq"])
    assert len(grads) == 16
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0, name


def test_a_range_that_nobody_observed_quantizes_nothing():
    method = lsq.make()
    tap = Tap("a/inputs", (2,), jnp.float32)
    unseen = {"low": jnp.float32(np.inf), "high": jnp.float32(-np.inf)}
    own = forward.own(
        "lsq",
        {
            "params": {METHODS: {"lsq": {"a/inputs_step": jnp.float32(0)}}},
            "extra": {"lsq": {"a/inputs": unseen}},
        },
        train=False,
    )
    x = jnp.array([0.123, 4.567])
    np.testing.assert_array_equal(method.intercept(tap, x, own)[0], x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(bits=1), "bits = 1 should lie in .2, 16."),
        (dict(activation_bits=33), "activation_bits = 33"),
        (dict(start=-1), "start = -1 should not be negative"),
    ],
)
def test_bad_values_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        lsq.make(**arguments)


def test_a_rule_that_matches_nothing_is_named():
    method = lsq.make(weights=(("kernle$", True),))
    with pytest.raises(UserError, match=r"quantize\.lsq: weights: the rule 'kernle\$'"):
        method.init(jax.random.key(0), {"a": {"kernel": jnp.ones((2, 2))}}, ())
