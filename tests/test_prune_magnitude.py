"""Magnitude pruning: the schedule and masks by hand, exact zeros, and PyTorch's masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn.utils import prune as torch_prune

from squeeze_jax.errors import UserError
from squeeze_jax.prune import magnitude

# Six weights in two kernels, and a bias that no rule matches.
PARAMS = {
    "a": {
        "kernel": jnp.array([[0.5, -0.1, 0.3]]),
        "bias": jnp.array([0.01, 0.0]),
    },
    "b": {"kernel": jnp.array([[0.2], [-0.4], [0.05]])},
}


@functools.partial(jax.jit, static_argnums=0)
def one_update(tx, grads, state, params, step):
    updates, state = tx.update(grads, state, params, grads=grads, step=step)
    return optax.apply_updates(params, updates), updates, state


def train(update, params, grads_of, steps, optimizer=None):
    """Yields (parameters, state of magnitude) after each update."""
    tx = optax.chain(optimizer or optax.sgd(0.1), update.tx)
    state = tx.init(params)
    for step in range(steps):
        params, _, state = one_update(tx, grads_of(step), state, params, step)
        yield params, state[1]


def zeros(_):
    return jax.tree.map(jnp.zeros_like, PARAMS)


def pruned(params):
    return sorted(
        float(w)
        for old, new in zip(
            jax.tree.leaves(magnitude_kernels(PARAMS)),
            jax.tree.leaves(magnitude_kernels(params)),
            strict=True,
        )
        for w, n in zip(np.abs(old).ravel(), np.ravel(new), strict=True)
        if n == 0
    )


def magnitude_kernels(params):
    return {name: layer["kernel"] for name, layer in params.items()}


def test_six_weights_follow_the_schedule():
    """Equation 1 with s_f = 0.8 at steps 0, 2, 4: 0, 0.8 (1 - 0.5^3) = 0.7, 0.8; of 6 weights 0, 4.2 and 4.8."""
    update = magnitude.make(0.8, begin=0, end=4, every=2)
    counts = [len(pruned(p)) for p, _ in train(update, PARAMS, zeros, 6)]
    assert counts == [0, 0, 4, 4, 5, 5]
    *_, (params, _) = train(update, PARAMS, zeros, 4)
    assert pruned(params) == pytest.approx([0.05, 0.1, 0.2, 0.3])
    np.testing.assert_array_equal(params["a"]["bias"], PARAMS["a"]["bias"])
    np.testing.assert_array_equal(params["a"]["kernel"], np.float32([[0.5, 0, 0]]))


def test_schedule_begins_at_the_initial_sparsity():
    """Equation 1: 0.8 + (0.5 - 0.8) (1 - t / 4)^3 at t = 0, 2, 4."""
    shares = magnitude.schedule(0.8, 10, 14, 2, 0.5)
    np.testing.assert_allclose(shares, [0.5, 0.7625, 0.8])


def test_layer_scope_prunes_each_kernel_alike():
    """2 of 3 weights in each kernel: all but 0.5 and 0.4."""
    update = magnitude.make(2 / 3, 0, 1, 1, scope="layer")
    *_, (params, _) = train(update, PARAMS, zeros, 2)
    np.testing.assert_array_equal(params["a"]["kernel"], np.float32([[0.5, 0, 0]]))
    np.testing.assert_array_equal(params["b"]["kernel"], np.float32([[0], [-0.4], [0]]))


def test_ranks_the_weights_after_the_update():
    """0.5 - 0.1 * 4.9 = 0.01 is the smallest weight once it is updated; its magnitude before was the largest."""
    grads = zeros(0)
    grads["a"]["kernel"] = jnp.array([[4.9, 0.0, 0.0]])
    update = magnitude.make(1 / 6, 0, 1, 1, initial=1 / 6)
    params, _ = next(train(update, PARAMS, lambda _: grads, 1))
    np.testing.assert_array_equal(params["a"]["kernel"], np.float32([[0, -0.1, 0.3]]))


def test_equal_magnitudes_are_pruned_in_order():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": -jnp.ones((2, 2))}}
    update = magnitude.make(0.7, 0, 1, 1)
    *_, (params, _) = train(
        update, params, lambda _: jax.tree.map(jnp.zeros_like, params), 2
    )
    assert np.all(params["a"]["kernel"] == 0)
    np.testing.assert_array_equal(params["b"]["kernel"], [[0, -1], [-1, -1]])


def test_zeros_stay_exact_zeros_under_momentum():
    """Also a weight that is -0.0 becomes +0.0, and no pruned weight returns."""
    start = PARAMS | {"c": {"kernel": jnp.array([[-0.0, 1e-30, 3.0]])}}
    keys = jax.random.split(jax.random.key(0), 12)

    def grads(step):
        return jax.tree.map(lambda w: jax.random.normal(keys[step], w.shape), start)

    update = magnitude.make(0.6, 0, 4, 2)
    optimizer = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9))
    before = None
    for params, state in train(update, start, grads, 12, optimizer):
        for name, mask in state.masks.items():
            weight = np.asarray(params[name.split("/")[0]]["kernel"])
            dead = weight[~np.asarray(mask)]
            assert np.all(dead == 0)
            assert not np.signbit(dead).any()
            if before:
                assert not np.any(mask & ~before[name])
        before = state.masks
    counts = [int(np.sum(~np.asarray(m))) for m in state.masks.values()]
    assert sum(counts) == 5  # 0.6 * 9 = 5.4


def test_every_pruning_removes_exactly_the_weight():
    """w + (-w) is +0.0 for every finite float32."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64)
    weights = bits.astype(np.uint32).view(np.float32)
    weights = jnp.asarray(weights[np.isfinite(weights)])
    params = {"kernel": weights}
    update = magnitude.make(0.99, 0, 1, 1)
    grads = {"kernel": jnp.ones_like(weights)}
    tx = optax.chain(optax.sgd(1e-3), update.tx)
    state = tx.init(params)
    after, _, state = one_update(tx, grads, state, params, 1)
    dead = np.asarray(after["kernel"])[~np.asarray(state[1].masks["kernel"])]
    assert len(dead) == round(0.99 * len(weights))
    assert np.all(dead.view(np.uint32) == 0)


def test_project_makes_averaged_weights_as_sparse():
    update = magnitude.make(0.5, 0, 1, 1)
    *_, (params, state) = train(update, PARAMS, zeros, 2)
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, PARAMS, params)
    assert magnitude.sparsity(average)["b/kernel"] == 0
    shares = magnitude.sparsity(update.project(average, state))
    assert shares == pytest.approx(
        {"a/bias": 0.5, "a/kernel": 1 / 3, "b/kernel": 2 / 3}
    )


def test_a_second_phase_keeps_the_masks():
    """Its steps begin at 0 again, where its schedule would have no zeros."""
    update = magnitude.make(0.5, 0, 2, 1)
    *_, (params, state) = train(update, PARAMS, zeros, 3)
    _, after = jax.jit(lambda s, p: update.tx.update(zeros(0), s, p, step=0))(
        state, params
    )
    for name, mask in state.masks.items():
        np.testing.assert_array_equal(after.masks[name], mask)


def test_masks_are_those_of_pytorch():
    """torch.nn.utils.prune.global_unstructured removes the same 60 % of two random layers."""
    rng = np.random.default_rng(0)
    conv = rng.normal(size=(8, 3, 3, 3)).astype(np.float32)
    dense = 0.3 * rng.normal(size=(10, 32)).astype(np.float32)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(32, 10)
    for layer, weight in zip(layers, (conv, dense), strict=True):
        layer.weight.data = torch.from_numpy(weight)
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers],
        pruning_method=torch_prune.L1Unstructured,
        amount=0.6,
    )
    params = {
        "conv": {"kernel": jnp.array(conv)},
        "dense": {"kernel": jnp.array(dense)},
    }
    update = magnitude.make(0.6, 0, 1, 1)
    *_, (_, state) = train(
        update, params, lambda _: jax.tree.map(jnp.zeros_like, params), 2
    )
    for name, layer in zip(("conv", "dense"), layers, strict=True):
        theirs = layer.weight_mask.numpy() == 1
        np.testing.assert_array_equal(state.masks[f"{name}/kernel"], theirs)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "four devices"])
def test_marks_are_those_of_a_stable_sort(sharded):
    """Of 96 values among 10 different ones, so most are tied, in two arrays; numpy sorts the concatenation."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 10, np.uint64).astype(np.uint32)
    keys = [rng.choice(values, shape) for shape in ((8, 4), (4, 16))]
    order = np.argsort(np.concatenate([k.ravel() for k in keys]), kind="stable")
    if sharded:
        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        place = jax.NamedSharding(mesh, jax.P("x"))
        keys = [jax.device_put(key, place) for key in keys]
    mark = jax.jit(magnitude.smallest)
    for count in (0, 1, 37, 95, 96):
        expected = np.zeros(96, bool)
        expected[order[:count]] = True
        marks = np.concatenate([np.ravel(m) for m in mark(keys, jnp.int32(count))])
        np.testing.assert_array_equal(marks, expected)


def test_rules_choose_and_methods_own_parameters_stay():
    params = PARAMS | {"methods": {"lsq": {"kernel": jnp.array([0.001])}}}
    update = magnitude.make(0.5, 0, 1, 1, rules=(("^a/", False), ("kernel$", True)))
    assert list(update.tx.init(params).masks) == ["b/kernel"]
    assert "methods/lsq/kernel" not in magnitude.sparsity(params)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sparsity=1.0), "sparsity = 1.0 should lie in"),
        (dict(sparsity=-0.1), "sparsity = -0.1 should lie in"),
        (dict(initial=0.6), "initial = 0.6 should lie in"),
        (dict(begin=-1), "begin = -1 should not be negative"),
        (dict(end=0), "end = 0 should be at least 1"),
        (dict(every=3), "every = 3 should divide end - begin = 4"),
        (dict(every=0), "every = 0 should be at least 1"),
        (dict(rules=(("kernel", 0.5),)), "= 0.5 .float. should be bool"),
    ],
)
def test_refuses_bad_values_at_construction(options, words):
    with pytest.raises(UserError, match=words):
        magnitude.make(**dict(sparsity=0.5, begin=0, end=4, every=2) | options)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("kernle$", True),), "'kernle\\$' matches no parameter"),
        ((("kernel$", False),), "prunes no parameter"),
    ],
)
def test_refuses_rules_without_effect(rules, words):
    with pytest.raises(UserError, match=words):
        magnitude.make(0.5, 0, 1, 1, rules=rules).tx.init(PARAMS)


def test_refuses_to_stand_before_the_optimizer():
    tx = optax.chain(magnitude.make(0.5, 0, 1, 1).tx, optax.sgd(0.1))
    with pytest.raises(UserError, match='list it after "optim"'):
        one_update(tx, zeros(0), tx.init(PARAMS), PARAMS, 0)
