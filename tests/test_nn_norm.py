"""Batch normalisation, pooling and widths are those of PyTorch and torchvision; 4 devices are 1 device."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.errors import ModifyScopeVariableError
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv, lowering
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean, max_pool, mean_pool
from squeeze_jax.nn.width import scaled

pytestmark = pytest.mark.usefixtures("optimized")  # as users run it


def batch(seed=0, shape=(3, 5, 4, 6)):
    """Images whose channels have means far from zero."""
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=shape) * rng.uniform(0.1, 3, shape[-1])
        + rng.normal(size=shape[-1]) * 4
    )
    return x.astype(np.float32)


def torch_norm(x, steps):
    """PyTorch's layer after some steps on x: (output, gradient of x, of scale, of bias, running mean, variance)."""
    layer = torch.nn.BatchNorm2d(x.shape[-1])
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, x.shape[-1]))
        layer.bias.copy_(torch.linspace(3, 1, x.shape[-1]))
    for _ in range(steps):
        layer.zero_grad()
        image = torch.tensor(x, requires_grad=True)
        y = layer(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.sin(y).sum().backward()
    layer.eval()
    evaluated = layer(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    found = (y, image.grad, layer.weight.grad, layer.bias.grad)
    found += (layer.running_mean, layer.running_var, evaluated)
    return [t.detach().numpy() for t in found]


def test_training_and_evaluation_equal_pytorch():
    x = batch()
    y, dx, dscale, dbias, mean, var, evaluated = torch_norm(x, steps=2)
    layer = BatchNorm(momentum=0.9, unbiased=True)
    params = {"scale": jnp.linspace(-1, 2, 6), "bias": jnp.linspace(3, 1, 6)}
    stats = layer.init(jax.random.key(0), x, True)["batch_stats"]

    def loss(params, x, stats):
        variables = {"params": params, "batch_stats": stats}
        y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
        return jnp.sin(y).sum(), (y, new["batch_stats"])

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    for _ in range(2):
        (dp, dx_ours), (y_ours, stats) = gradient(params, x, stats)
    ours = layer.apply({"params": params, "batch_stats": stats}, x, True)
    np.testing.assert_allclose(y_ours, y, atol=2e-5)
    np.testing.assert_allclose(dx_ours, dx, atol=2e-4)
    np.testing.assert_allclose(dp["scale"], dscale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dp["bias"], dbias, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    np.testing.assert_allclose(ours, evaluated, atol=2e-5)


def test_bfloat16_in_is_bfloat16_out_with_statistics_in_float32():
    x = jnp.bfloat16(batch(shape=(32, 8, 8, 6)))
    layer = BatchNorm(momentum=0.0, dtype=jnp.bfloat16, unbiased=True)
    variables = layer.init(jax.random.key(0), x, True)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
    assert y.dtype == layer.apply(variables, x, True).dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-4)


def test_gradients_in_bfloat16_are_those_of_pytorch_in_float32():
    # Whole numbers, so that the input is the same in both.
    x = np.rint(batch(shape=(8, 4, 3, 6)) * 4)
    _, dx, dscale, dbias, *_ = torch_norm(x, steps=1)
    params = {"scale": jnp.linspace(-1, 2, 6), "bias": jnp.linspace(3, 1, 6)}
    layer = BatchNorm(False, dtype=jnp.bfloat16)
    stats = layer.init(jax.random.key(0), x)["batch_stats"]

    def loss(params, x):
        variables = {"params": params, "batch_stats": stats}
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.sin(y.astype(jnp.float32)).sum()

    ours, ours_x = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.bfloat16(x))
    assert ours_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours_x.astype(jnp.float32), dx, atol=0.02)
    np.testing.assert_allclose(ours["scale"], dscale, atol=0.6)
    np.testing.assert_allclose(ours["bias"], dbias, atol=0.6)


def test_training_without_mutable_statistics_is_an_error_as_in_flax():
    x = batch()
    for layer in (nn.BatchNorm(False), BatchNorm(False)):
        variables = layer.init(jax.random.key(0), x)
        assert not np.any(variables["batch_stats"]["mean"])
        error = UserError if isinstance(layer, BatchNorm) else ModifyScopeVariableError
        with pytest.raises(error, match="batch_stats"):
            layer.apply(variables, x)


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (8, 2, 3, 3), (9, 3), (4, 5, 3)])
def test_derivatives_of_second_order_and_under_vmap_are_those_of_the_formula(shape):
    x = jnp.asarray(batch(shape=shape))
    layer = BatchNorm(False)
    variables = layer.init(jax.random.key(0), x)

    def ours(x):
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.sin(y).sum()

    def formula(x):
        over = range(x.ndim - 1)
        mean, var = x.mean(over), x.var(over)
        return jnp.sin((x - mean) / jnp.sqrt(var + 1e-5)).sum()

    def derivatives(f):
        curvature = jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1]
        twice = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), jnp.cos(x)))(x)
        return curvature, twice, jax.vmap(jax.grad(f))(jnp.stack([x, x**2]))

    run = jax.jit(derivatives, static_argnums=0)
    for a, b in zip(run(ours), run(formula), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(BatchNorm(False)(Conv(8, (1, 1))(x)))
        x = nn.relu(BatchNorm(False)(Conv(8, (3, 3), feature_group_count=8)(x)))
        return BatchNorm(False)(Conv(4, (3, 3), 2, feature_group_count=2)(x))


@pytest.mark.usefixtures("four_devices")
def test_four_devices_are_one_under_jit_and_inside_shard_map():
    axes = ("data", "more")
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3)) * 3 + 1
    variables = jax.jit(Net().init)(jax.random.key(1), x)

    def step(params, stats, x, axes=()):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, new = Net().apply(variables, x, mutable=["batch_stats"])
            value = jnp.sum(jnp.sin(y)) / 8
            whole = jax.lax.psum(value, axes) if axes else value
            return whole, new["batch_stats"]

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new, gradient

    specs = dict(in_specs=(P(), P(), P(axes)), out_specs=P())
    manual = jax.shard_map(lambda *a: step(*a, axes), mesh=mesh, **specs)
    weights = variables["params"], variables["batch_stats"]
    one = jax.jit(step)(*weights, x)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(one[2])) > 0.1
    spread = jax.device_put(x, NamedSharding(mesh, P(axes)))
    for way, run in {"shard_map": manual, "jit": step}.items():
        compiled = jax.jit(run).lower(*weights, spread).compile()
        four = tree.flatten(compiled(*weights, spread))
        for name, a in tree.flatten(one).items():
            text = f"{way} {name}"
            np.testing.assert_allclose(
                a, four[name], rtol=1e-4, atol=1e-4, err_msg=text
            )
        # No device sends more than parameters and statistics: 3x3x4x4 of the last kernel at most.
        sent = re.findall(
            "(.*) (?:all-reduce|all-gather|all-to-all|collective-permute)[(]",
            compiled.as_text(),
        )
        sizes = [
            math.prod(int(n) for n in shape.split(",") if n)
            for line in sent
            for shape in re.findall("f32.([0-9,]*)]", line)
        ]
        assert sizes, way
        assert max(sizes) <= 144, way


@pytest.mark.parametrize("size", [(7, 8), (9, 6), (3, 3)])
@pytest.mark.parametrize(
    ("window", "strides", "padding"), [(3, 2, 0), (3, 2, 1), (2, 3, 1), (2, 1, 0)]
)
@pytest.mark.parametrize("ceil", [True, False])
def test_max_pool_equals_pytorch(size, window, strides, padding, ceil):
    x = -np.abs(batch(shape=(2, *size, 3)))
    expected = torch.nn.functional.max_pool2d(
        torch.tensor(x).permute(0, 3, 1, 2), window, strides, padding, ceil_mode=ceil
    )
    found = max_pool(x, window, strides, padding, ceil=ceil)
    np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"),
    [((9, 8), 3, 2, 1), ((7, 9), 3, 2, 0), ((6, 7), 2, 3, 1), ((5, 6), 3, 1, 1)],
)
def test_max_pool_has_the_derivatives_of_pytorch_and_xla(
    size, window, strides, padding
):
    """Also among equally large values: the first of a window has the gradient."""
    x = np.rint(batch(shape=(2, *size, 3)))
    theirs = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    y = torch.nn.functional.max_pool2d(theirs, window, strides, padding)
    weight = np.random.default_rng(1).normal(size=y.permute(0, 2, 3, 1).shape)
    weight = weight.astype(np.float32)
    y.backward(torch.tensor(weight).permute(0, 3, 1, 2))

    def loss(x):
        return jnp.sum(weight * max_pool(x, window, strides, padding) ** 2) / 2

    def weighted(x):
        return jnp.sum(weight * max_pool(x, window, strides, padding))

    def derivatives():  # a function of its own each time, as jit remembers its trace
        two = jnp.stack([x, -x])
        return jax.jit(
            lambda x, two: (
                jax.grad(loss)(x),
                jax.jvp(loss, (x,), (x + 1,)),
                jax.jvp(jax.grad(loss), (x,), (x + 1,)),
                jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), x))(x),
                jax.vmap(jax.grad(loss))(two),
                jax.vmap(jax.jvp, (None, 0, 0))(loss, (two,), (two + 1,)),
            )
        )(x, two)

    ours = jax.jit(jax.grad(weighted))(x)
    np.testing.assert_allclose(ours, theirs.grad.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    found = derivatives()
    with lowering("native"):
        expected = derivatives()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_max_pool_is_one_operation_where_files_are_made():
    run = jax.jit(lambda x: max_pool(x, 3, 2))
    x = jnp.ones((1, 7, 7, 2))
    assert "reduce_window" not in run.lower(x).as_text()
    with lowering("native"):
        assert run.lower(x).as_text().count("stablehlo.reduce_window") == 1


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"), [((7, 8), 3, 2, 1), ((6, 5), 2, 1, 0)]
)
def test_mean_pool_equals_pytorch(size, window, strides, padding):
    x = batch(shape=(2, *size, 3))
    theirs = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    y = torch.nn.functional.avg_pool2d(theirs, window, strides, padding)
    (y**2).sum().backward()

    def run(x):
        return mean_pool(x, window, strides, padding)

    gradient = jax.grad(lambda x: (run(x) ** 2).sum())
    for name in ("auto", "native"):
        with lowering(name):
            ours = jax.jit(run)(x), jax.jit(gradient)(x)
        for a, b in zip(ours, (y.detach(), theirs.grad), strict=True):
            np.testing.assert_allclose(a, b.permute(0, 2, 3, 1), atol=1e-5)


def test_max_pool_has_gradients_and_keeps_bfloat16():
    x = jnp.bfloat16(batch())
    gradient = jax.grad(lambda x: max_pool(x, 3, 2, ceil=True).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    # Of 5x4 positions 2x2 windows each pass a gradient of 1 to their largest.
    assert float(gradient.astype(jnp.float32).sum()) == 3 * 6 * 4


def test_global_mean_is_float32():
    x = jnp.full((1, 64, 64, 2), 1.0078125, jnp.bfloat16)
    assert global_mean(x).dtype == jnp.float32
    np.testing.assert_array_equal(global_mean(x), 1.0078125)


def test_scaled_widths_follow_the_published_rule():
    # The MobileNet papers' code: multiples of 8, at least nine tenths of the exact width.
    assert [scaled(c, 0.35) for c in (32, 16, 24, 64, 96, 160, 320)] == [
        16,
        8,
        8,
        24,
        32,
        56,
        112,
    ]
    assert [scaled(c, 1.4) for c in (32, 16, 24, 64, 96, 160, 320)] == [
        48,
        24,
        32,
        88,
        136,
        224,
        448,
    ]
    assert scaled(10, 1.0) == 16
    assert scaled(9, 1.0) == 16


def test_a_window_larger_than_the_image_is_an_error():
    with pytest.raises(UserError, match="smaller than a window"):
        max_pool(jnp.ones((1, 2, 3, 1)), 3, 2)
