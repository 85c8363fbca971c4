"""Group lasso: penalties by hand, homogeneity, PyTorch's gradients, and what it does to unused weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.prune import group_lasso

OWN = methods.Own({}, None, None, jnp.int32(0), True)
# [height 2, width 1, inputs 1, outputs 2]
KERNEL = jnp.array([[[[3.0, 0.0]]], [[[4.0, 12.0]]]])


def value(params, **options):
    return group_lasso.make(**options).loss(None, {}, {}, params, OWN)[0]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # outputs (3, 4) and (0, 12): sqrt(2) * (5 + 12)
        ("filters", np.sqrt(2) * 17),
        # one input with all four weights: sqrt(4) * sqrt(9 + 16 + 144)
        ("channels", 26.0),
        # rows (3, 0) and (4, 12): sqrt(2) * (3 + sqrt(160))
        ("shapes", np.sqrt(2) * (3 + np.sqrt(160))),
    ],
)
def test_penalty_by_hand(groups, expected):
    params = {"conv": {"kernel": KERNEL, "bias": jnp.ones(2)}}
    assert value(params, groups=groups) == pytest.approx(expected, rel=1e-6)


def test_dense_kernels_have_columns_and_rows():
    """[[3, 0], [4, 1]]: columns 5 and 1, rows 3 and sqrt(17), each of 2 weights."""
    params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}}
    rows = np.sqrt(2) * (3 + np.sqrt(17))
    assert value(params) == pytest.approx(np.sqrt(2) * 6, rel=1e-6)
    assert value(params, groups="channels") == pytest.approx(rows, rel=1e-6)
    assert value(params, groups="shapes") == pytest.approx(rows, rel=1e-6)


@pytest.mark.parametrize("groups", ["filters", "channels", "shapes"])
def test_doubled_weights_double_the_penalty(groups):
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 5))}
    doubled = jax.tree.map(lambda w: 2 * w, params)
    once, twice = value(params, groups=groups), value(doubled, groups=groups)
    assert twice == pytest.approx(2 * float(once), rel=1e-6)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [("filters", (1, 2, 3)), ("channels", (0, 2, 3)), ("shapes", (0,))],
)
def test_gradient_is_pytorchs(groups, axes):
    """Of the same sum over PyTorch's layout [outputs, inputs, height, width]."""
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    theirs = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    norms = torch.linalg.vector_norm(theirs, dim=axes)
    size = np.prod([theirs.shape[a] for a in axes])
    (np.sqrt(size) * norms.sum()).backward()
    ours = jax.grad(value)({"kernel": jnp.array(kernel)}, groups=groups)
    expected = theirs.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_gradient_at_zero_is_zero():
    grads = jax.grad(value)({"kernel": jnp.zeros((3, 3, 2, 4)).at[..., 1].set(1.0)})
    assert np.all(grads["kernel"][..., (0, 2, 3)] == 0)
    # d/dw sqrt(18) ||w|| = sqrt(18) w / ||w|| = 1 where all 18 weights are 1
    np.testing.assert_allclose(grads["kernel"][..., 1], 1.0, rtol=1e-6)


def test_unused_inputs_shrink_in_a_regression():
    """12 examples of 16 inputs, of which the target reads 2: only the penalty tells the other inputs to go."""
    x = jax.random.normal(jax.random.key(0), (12, 16))
    target = x[:, :2] @ jnp.array([[2.0, -1.0], [1.0, 2.0]])
    start = 0.3 * jax.random.normal(jax.random.key(1), (16, 2))
    lasso = group_lasso.make("channels")

    def trained(weight):
        def loss(params):
            error = jnp.mean(jnp.square(x @ params["kernel"] - target))
            return error + weight * lasso.loss(None, {}, {}, params, OWN)[0]

        def step(params, _):
            grads = jax.grad(loss)(params)
            return jax.tree.map(lambda w, g: w - 0.02 * g, params, grads), None

        run = jax.jit(lambda p: jax.lax.scan(step, p, None, length=1000)[0])
        return np.linalg.norm(run({"kernel": start})["kernel"], axis=1)

    without, norms = trained(0.0), trained(0.05)
    assert norms[:2].min() > 1.0
    assert norms[2:].max() < 0.05
    assert without[2:].max() > 0.3


def test_parameters_of_methods_and_excluded_ones_do_not_count():
    params = {
        "a": {"kernel": KERNEL},
        "b": {"kernel": KERNEL},
        "methods": {"kernel": 1},
    }
    rules = (("^a/", False), ("kernel$", True))
    assert value(params, rules=rules) == pytest.approx(np.sqrt(2) * 17, rel=1e-6)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("kernle", True),), "'kernle' matches no parameter"),
        ((("kernel", False),), "penalises no parameter"),
        (((".", True),), r"bias of shape \(2,\) has no groups"),
    ],
)
def test_refuses_rules_without_effect(rules, words):
    params = {"bias": jnp.ones(2), "kernel": KERNEL}
    with pytest.raises(UserError, match=words):
        group_lasso.make(rules=rules).init(jax.random.key(0), params)


def test_refuses_values_of_rules_that_are_no_bools():
    with pytest.raises(UserError, match=r"= 2 .int. should be bool"):
        group_lasso.make(rules=(("kernel", 2),))


def test_small_groups_are_counted():
    """Norms of the filters 1, 0.05 and 0.2 in one kernel, 4 and 0.3 in another: two of five are below a tenth."""
    first = jnp.array([[1.0, 0.05, 0.2]])
    second = jnp.array([[4.0, 0.3]])
    params = {"a": {"kernel": first}, "b": {"kernel": second}}
    _, metrics = group_lasso.make().loss(None, {}, {}, params, OWN)
    assert metrics["small_groups"] == pytest.approx(2 / 5)
