"""The counter against counts by hand, one equation at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from squeeze_jax import models
from squeeze_jax.cost.count import macs, parameters
from squeeze_jax.nn.conv import Conv, conv


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("x", "kernel", "options", "expected"),
    [
        # output positions x kernel positions x inputs of a group x outputs
        ((2, 9, 9, 6), (3, 3, 6, 8), {}, 2 * 81 * 9 * 6 * 8),
        ((1, 9, 9, 6), (3, 3, 6, 8), {"padding": "VALID"}, 49 * 9 * 6 * 8),
        ((1, 9, 9, 6), (3, 3, 6, 8), {"strides": 2}, 25 * 9 * 6 * 8),
        ((1, 9, 9, 6), (3, 3, 2, 9), {"groups": 3}, 81 * 9 * 2 * 9),
        ((1, 9, 9, 6), (3, 3, 1, 12), {"groups": 6}, 81 * 9 * 12),
        ((1, 9, 9, 6), (3, 3, 6, 8), {"dilation": 2, "padding": 0}, 25 * 9 * 6 * 8),
        ((1, 9, 9, 6), (1, 5, 6, 8), {"strides": (3, 1)}, 27 * 5 * 6 * 8),
        ((1, 9, 9, 6), (1, 1, 6, 8), {}, 81 * 6 * 8),
    ],
)
def test_convolutions(x, kernel, options, expected):
    count = macs(lambda x, k: conv(x, k, **options), ones(*x), ones(*kernel))
    assert count == (expected, {"": expected}, ())


def test_a_forced_lowering_of_a_layer_does_not_change_its_count():
    layer = Conv(8, (3, 3), feature_group_count=4, lowering="split")
    assert macs(layer, ones(1, 9, 9, 4)).total == 81 * 9 * 8


def test_a_transposed_convolution_counts_from_its_input():
    def run(x, k):
        return jax.lax.conv_transpose(x, k, (2, 2), "SAME")

    # Each of 5x5 positions of 3 channels meets 3x3 positions of 4 outputs.
    assert macs(run, ones(1, 5, 5, 3), ones(3, 3, 3, 4)).total == 25 * 3 * 9 * 4


def patches(x, window, **options):
    return jax.lax.conv_general_dilated_patches(
        x, window, options.pop("strides", (1, 1)), "VALID", **options
    )


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((2, 2), {}),
        ((3, 3), NHWC),
        ((3, 2), {**NHWC, "strides": (2, 1), "rhs_dilation": (2, 2)}),
        ((1, 1), NHWC),
    ],
)
def test_patches_move_numbers_and_multiply_none(window, options):
    """Neither do they in a gradient, which adds each number up where it came from; nor inside of a loop."""

    def run(x):
        return patches(x, window, **options)

    def summed(x):
        return (run(x) ** 2).sum()

    def looped(x):
        return jax.lax.scan(lambda _, x: (None, run(x)), None, x[None])[1]

    for fn in run, jax.jit(run), summed, jax.grad(summed), looped:
        assert macs(fn, ones(2, 9, 9, 6)) == (0, {}, ())


def test_a_local_convolution_counts_its_product_alone():
    """7x7 outputs of 5 channels, each the product of its own 3x3 window of 6 channels."""

    def run(x, k):
        return jax.lax.conv_general_dilated_local(
            x, k, (1, 1), "VALID", (3, 3), dimension_numbers=NHWC["dimension_numbers"]
        )

    assert macs(run, ones(1, 9, 9, 6), ones(7, 7, 54, 5)).total == 49 * 54 * 5


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: jnp.ones((3, 3, 1, 6)),  # sums of windows are computed as products
        lambda: 2 * jnp.eye(9).reshape(3, 3, 1, 9)[..., :6],
        lambda: jnp.tri(9)[:, :6].reshape(3, 3, 1, 6),
        lambda: jnp.tile(jnp.eye(3)[:, :, None, None], (1, 1, 1, 6)),
    ],
)
def test_other_constant_kernels_count(kernel):
    def run(x):
        return conv(x, kernel(), groups=6, padding=0)

    assert macs(run, ones(1, 9, 9, 6)).total == 49 * 9 * 6


def test_products():
    assert macs(jnp.matmul, ones(2, 7, 3, 4), ones(2, 7, 4, 5)).total == 14 * 3 * 4 * 5

    def attention(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    assert (
        macs(attention, ones(2, 6, 3, 4), ones(2, 5, 3, 4)).total == 2 * 3 * 6 * 5 * 4
    )
    assert macs(jnp.dot, ones(7), ones(7)).total == 7


def test_elementwise_work_reductions_and_random_numbers_are_free():
    def run(x, key):
        x = jax.nn.softmax(jnp.sin(x) * jax.random.normal(key, x.shape))
        x = nn.max_pool(x[None, ..., None], (2, 2), (2, 2))
        return jnp.sort(jnp.cumsum(x).reshape(-1))[:3]

    assert macs(run, ones(6, 6), jax.random.key(0)) == (0, {}, ())


def square(x):
    return x @ x  # 64 MACs for 4x4


def test_loops_branches_and_calls():
    x = ones(4, 4)

    def scanned(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, length=5)[0]

    assert macs(scanned, x).total == 5 * 64
    assert (
        macs(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: square(c), x), x).total
        == 3 * 64
    )
    branches = [lambda x: x, square, lambda x: square(square(x))]

    def chosen(i, x):
        return jax.lax.switch(i, branches, x)

    assert macs(chosen, jax.ShapeDtypeStruct((), jnp.int32), x).total == 128
    assert macs(jax.jit(jax.jit(square)), x).total == 64
    assert macs(jax.vmap(square), ones(3, 4, 4)).total == 3 * 64
    composite = jax.lax.composite(square, name="square")
    assert macs(composite, x).total == 64


def test_what_no_output_needs_counts_nothing():
    x = ones(4, 4)
    assert macs(lambda x: (square(x), x)[1], x).total == 0
    assert macs(jax.jit(lambda x: (square(x), square(x) + 1)[0]), x).total == 64

    def scanned(x):  # the first carry is never read
        def turn(carry, _):
            return (square(carry[0]), carry[1] + 1), None

        return jax.lax.scan(turn, (x, x), length=5)[0][1]

    assert macs(scanned, x).total == 0


def test_custom_derivatives_and_rematerialization():
    x = ones(4, 4)
    forward = jax.custom_jvp(square)
    forward.defjvp(lambda p, t: (square(*p), square(*t)))
    assert macs(forward, x).total == 64
    reverse = jax.custom_vjp(square)
    reverse.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x,))
    assert macs(reverse, x).total == 64
    gradient = jax.value_and_grad(lambda x: reverse(x).sum())
    assert macs(gradient, x).total == 128
    # Without the value nothing needs the forward product.
    assert macs(jax.grad(lambda x: reverse(x).sum()), x).total == 64

    # Forward and two products for the gradient; rematerialized one more forward.
    def kept(x):
        return jnp.sin(square(x)).sum()

    assert macs(jax.grad(kept), x).total == 3 * 64
    assert macs(jax.value_and_grad(jax.checkpoint(kept)), x).total == 4 * 64


def test_the_work_of_all_devices_counts():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    run = jax.shard_map(square, mesh=mesh, in_specs=spec, out_specs=spec)
    assert macs(run, ones(4, 4)).total == 64
    abstract = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(lambda x: x @ x.T, mesh=abstract, in_specs=spec, out_specs=spec)
    # Four devices, each with 2 of 8 rows: 2x2 of depth 4.
    assert macs(run, ones(8, 4)).total == 4 * 2 * 2 * 4


def test_what_cannot_be_counted_is_named():
    x = ones(4, 4)

    def endless(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, square, x)

    count = macs(endless, x)
    assert count.total == 64
    assert count.unknown == (
        "while loop, counted as one iteration, in the function itself",
    )
    assert macs(jnp.linalg.cholesky, x).unknown == ("cholesky in the function itself",)
    foreign = jax.ffi.ffi_call("my_kernel", x)
    assert macs(foreign, x).unknown == ("ffi_call my_kernel in the function itself",)

    def callback(x):
        return jax.pure_callback(square, x, x)

    assert macs(callback, x).unknown == ("pure_callback in the function itself",)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(jax.jit(square)(x)), None


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(Inner)(name="kept")(x)
        layers = nn.scan(
            Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(x)
        return square(x)


def test_layers_have_the_names_of_their_parameters():
    x = jnp.ones((4, 4))
    count = macs(Outer(), x)
    assert count.by_layer == {
        "kept": 64,
        "kept/dense": 64,
        "layers": 3 * 64,
        "layers/dense": 3 * 64,
        "Outer": 64,
    }
    assert count.total == 9 * 64
    assert parameters(Outer(), x) == 4 * (16 + 4)


def test_layers_keep_their_names_in_the_gradient():
    x = jnp.ones((4, 4))
    variables = jax.eval_shape(Outer().init, jax.random.key(0), x)

    def run(v, x):
        return Outer().apply(v, x).sum()

    names = [f"Outer/{n}" for n in ("kept", "kept/dense", "layers", "layers/dense")]
    assert set(macs(jax.jit(jax.grad(run)), variables, x).by_layer) == {*names, "Outer"}


def test_a_training_step_is_three_forward_passes_but_for_the_image():
    net = models.make("resnet", variant="tiny", num_classes=10, stem="cifar")
    x = ones(2, 16, 16, 3)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        (logits, _), _ = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sin(logits).sum()

    # (output size, kernel, inputs, outputs) of every convolution.
    convs = [(16, 3, 3, 8)]
    convs += [(16, 1, 8, 8), (16, 3, 8, 8), (16, 1, 8, 32), (16, 1, 8, 32)]
    convs += [(16, 1, 32, 16), (8, 3, 16, 16), (8, 1, 16, 64), (8, 1, 32, 64)]
    first, *rest = (2 * n * n * k * k * i * o for n, k, i, o in convs)
    forward = first + sum(rest) + 2 * 64 * 10
    assert macs(net, x).total == forward
    step = macs(jax.grad(loss), variables["params"], variables["batch_stats"], x)
    assert step.total == 3 * forward - first
    assert step.unknown == ()
