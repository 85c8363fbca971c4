"""The 8-bit exchange on simulated devices: its error bound, error feedback, unbiasedness, and the bytes it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from squeeze_jax import methods
from squeeze_jax.comm import int8
from squeeze_jax.cost import wire
from squeeze_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("four_devices")

AXES = ("data", "fsdp")


def mesh(devices):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(
        (devices, 1), AXES, axis_types=kinds, devices=jax.devices()[:devices]
    )


def mapped(method, devices, checked=True):
    """(gradients and states with a leading axis over the devices, key) → (shared gradients, states)."""

    def local(grads, state, key):
        grads, state = jax.tree.map(lambda x: x[0], (grads, state))
        key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
        own = methods.Own({}, state, key, jnp.int32(0), True)
        grads, state = method.exchange(grads, AXES, own)
        grads = grads if checked else jax.tree.map(lambda x: x[None], grads)
        return grads, jax.tree.map(lambda x: x[None], state)

    return jax.shard_map(
        local,
        mesh=mesh(devices),
        in_specs=(P(AXES), P(AXES), P()),
        out_specs=(P() if checked else P(AXES), P(AXES)),
        check_vma=checked,
    )


def begin(method, grads):
    if method.state is None:
        return None
    state = method.state(jax.tree.map(lambda x: x[0], grads))
    devices = len(jax.tree.leaves(grads)[0])
    return jax.tree.map(lambda x: jnp.stack([x] * devices), state)


def gradients(devices, seed=0):
    """Different on each device: a kernel whose size no block divides, and a small bias."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(devices, 5, 17)) * 10.0 ** rng.integers(-3, 3, (5, 17))
    return {
        "layer": {
            "bias": jnp.asarray(rng.normal(size=(devices, 4)), jnp.float32),
            "kernel": jnp.asarray(kernel, jnp.float32),
        }
    }


SMALL = dict(block=16, smallest=8)
DEVICES = pytest.mark.parametrize("devices", [1, 2, 4])


@DEVICES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_devices_agree_on_the_mean_within_the_rounding(devices, rounding):
    """Each rounding errs by less than one step, max / 127 of the block, and half a step to the nearest."""
    method = int8.make(rounding, **SMALL)
    grads = gradients(devices)
    run = jax.jit(mapped(method, devices, checked=False))
    shared, _ = run(grads, begin(method, grads), jax.random.key(0))
    for leaf in jax.tree.leaves(shared):
        for other in leaf:
            np.testing.assert_array_equal(leaf[0], other)
    mean = jax.tree.map(lambda g: np.asarray(g).mean(0), grads)
    bias = shared["layer"]["bias"][0]
    np.testing.assert_allclose(bias, mean["layer"]["bias"], rtol=1e-6)
    # Blocks of 16 of the 85 values; the second rounding is of the mean, at most as large as the largest.
    sent = np.zeros((devices, 96), np.float32)
    sent[:, :85] = np.asarray(grads["layer"]["kernel"]).reshape(devices, 85)
    step = np.abs(sent).reshape(devices, 6, 16).max((0, 2)) / 127
    step = np.repeat(step, 16)[:85].reshape(5, 17)
    error = np.abs(shared["layer"]["kernel"][0] - mean["layer"]["kernel"])
    bound = 2.02 if rounding == "stochastic" else 1.01
    assert np.all(error <= bound * step)
    assert error.max() > 0


def test_equal_gradients_on_the_grid_are_exact():
    """Integers up to 127 have scale 1 on every device and in the mean."""
    method = int8.make(**SMALL)
    row = np.arange(-127, 128, 2).astype(np.float32).reshape(8, 16)
    row[:, 0] = 127
    grads = {"kernel": jnp.asarray(np.stack([row] * 4))}
    run = jax.jit(mapped(method, 4))
    shared, state = run(grads, begin(method, grads), jax.random.key(0))
    np.testing.assert_array_equal(shared["kernel"], row)
    np.testing.assert_array_equal(state["kernel"], 0)


@DEVICES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_was_applied_and_the_mean_residual_are_all_gradients(devices, rounding):
    method = int8.make(rounding, **SMALL)
    run = jax.jit(mapped(method, devices))
    state = begin(method, gradients(devices))
    applied = total = 0.0
    for step in range(6):
        grads = gradients(devices, step)
        shared, state = run(grads, state, jax.random.key(step))
        applied += np.asarray(shared["layer"]["kernel"], np.float64)
        total += np.asarray(grads["layer"]["kernel"], np.float64).mean(0)
    residual = np.asarray(state["layer/kernel"], np.float64).mean(0)
    assert np.abs(applied - total).max() > 1e-2
    np.testing.assert_allclose(applied + residual, total, atol=1e-4)


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (4, 1)])
def test_no_gradient_is_lost_on_another_number_of_devices(before, now):
    """All applied gradients and the mean residual are all mean gradients, on whatever devices they were computed."""
    method, applied, total = int8.make(**SMALL), 0.0, 0.0
    state = begin(method, gradients(before))
    for step in range(6):
        devices = before if step < 3 else now
        if step == 3:
            state = jax.device_get(method.reshard(state, now))
            assert [len(x) for x in jax.tree.leaves(state)] == [now]
        grads = gradients(devices, step)
        shared, state = jax.jit(mapped(method, devices))(
            grads, state, jax.random.key(step)
        )
        applied += np.asarray(shared["layer"]["kernel"], np.float64)
        total += np.asarray(grads["layer"]["kernel"], np.float64).mean(0)
    residual = np.asarray(state["layer/kernel"], np.float64).mean(0)
    assert np.abs(applied - total).max() > 1e-2
    np.testing.assert_allclose(applied + residual, total, atol=1e-4)


def test_stochastic_rounding_is_unbiased():
    """The mean over 4000 keys of 0.3 steps is 0.3; its standard error is sqrt(0.3 * 0.7 / 4000) = 0.007."""
    block = jnp.array([[127.0, 0.3, -0.3, 2.75]])
    keys = jax.random.split(jax.random.key(0), 4000)
    numbers, scales = jax.vmap(lambda key: int8.quantize(block, key))(keys)
    assert numbers.dtype == jnp.int8
    np.testing.assert_array_equal(scales, 1.0)
    values = np.asarray(numbers, np.float32)
    np.testing.assert_allclose(values.mean(0), block, atol=0.035)
    assert set(np.unique(values[:, 0, 2])) == {-1.0, 0.0}


def test_the_shared_gradient_is_unbiased_without_feedback():
    method = int8.make("stochastic", feedback=False, **SMALL)
    grads = gradients(2)
    run = mapped(method, 2)
    keys = jax.random.split(jax.random.key(0), 2000)
    total = jax.jit(
        lambda: jax.lax.scan(
            lambda t, k: (t + run(grads, None, k)[0]["layer"]["kernel"], None),
            jnp.zeros((5, 17)),
            keys,
        )[0]
    )()
    kernel = np.asarray(grads["layer"]["kernel"])
    # Rounding up or down by less than a step has a standard deviation below half of it; two roundings, 2000 keys.
    step = np.abs(kernel).max() / 127
    np.testing.assert_allclose(total / 2000, kernel.mean(0), atol=4 * step / 2000**0.5)


@functools.cache
def distance(feedback):
    """Steps on 0.5 |w - 1|^2 of 64 weights, whose devices' gradients differ by ±1000 in the first of each block."""
    method = int8.make(block=16, smallest=8, feedback=feedback)
    run = mapped(method, 2)
    offset = jnp.zeros((2, 4, 16)).at[:, :, 0].set(jnp.array([[1000.0], [-1000.0]]))

    def step(carry, key):
        w, state = carry
        grads, state = run({"w": (w - 1)[None] + offset}, state, key)
        return (w - 0.05 * grads["w"], state), None

    start = jnp.zeros((4, 16))
    state = begin(method, {"w": offset})
    keys = jax.random.split(jax.random.key(0), 2000)
    (w, _), _ = jax.jit(lambda s: jax.lax.scan(step, (start, s), keys))(state)
    return float(jnp.abs(w - 1).mean())


def test_feedback_converges_where_rounding_alone_stalls():
    """One step of 8 bits is 1000 / 127 = 7.9: gradients below 1 round to 0, and nothing is learned without feedback."""
    assert distance(False) > 0.9
    assert distance(True) < 0.25


def test_int8_and_scales_travel_alone():
    """2 (n - 1) / n bytes a value, and 4 of a scale for each 64: 17 / 64 of the float32 ring's 8 (n - 1) / n."""
    method = int8.make(block=64)
    grads = {"kernel": jax.ShapeDtypeStruct((4, 64, 256), jnp.float32)}
    state = grads
    key = jax.eval_shape(lambda: jax.random.key(0))
    sent = wire.wire(mapped(method, 4), grads, state, key)
    values, share = 64 * 256, 3 / 4
    assert sent.sent == {
        ("all-to-all", "int8"): share * values,
        ("all-to-all", "float32"): share * values / 64 * 4,
        ("all-gather", "int8"): share * values,
        ("all-gather", "float32"): share * values / 64 * 4,
    }
    assert sent.total == 17 / 64 * (8 * share * values)


def test_a_gradient_that_is_not_finite_stays_so():
    method = int8.make(**SMALL)
    grads = {"kernel": jnp.ones((2, 16)).at[0, 3].set(jnp.inf)}
    shared, _ = jax.jit(mapped(method, 2))(
        grads, begin(method, grads), jax.random.key(0)
    )
    assert not np.isfinite(shared["kernel"]).all()


def test_parameters_of_methods_are_averaged_in_float32():
    """Their mean is exact to float32, and they have no residual."""
    grads = {"kernel": jnp.ones((2, 16)), "methods": {"lsq": gradients(2)}}
    method = int8.make(block=16, smallest=8)
    state = begin(method, grads)
    assert list(state) == ["kernel"]
    shared, _ = jax.jit(mapped(method, 2))(grads, state, jax.random.key(0))
    for ours, each in zip(
        jax.tree.leaves(shared["methods"]),
        jax.tree.leaves(grads["methods"]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, np.mean(each, 0), rtol=1e-6, atol=1e-6)


def test_refuses_what_would_do_nothing():
    with pytest.raises(UserError, match="block = 0 should be at least 1"):
        int8.make(block=0)
    with pytest.raises(UserError, match="smallest = 1024: no parameter has so many"):
        int8.make().state({"kernel": jnp.ones(9)})
