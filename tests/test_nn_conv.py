"""Every lowering of a convolution is PyTorch's convolution, and has the derivatives of XLA's."""

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv, conv, lowering, separate_groups
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import max_pool, mean_pool

pytestmark = pytest.mark.usefixtures("optimized")  # as users run it

LOWERINGS = ("native", "row", "taps", "matmul", "patches", "direct", "split", "flat")
KINDS = ("dense", "depthwise", "pointwise", "grouped", "grouped pointwise")


def random_case(seed, most=5):
    """A convolution drawn over everything a convolution can be: (x, kernel, arguments, its lowerings).

    Kernels have up to `most` - 1 positions along an axis.
    """
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    groups = int(rng.integers(2, 5)) if kind.startswith(("depth", "group")) else 1
    inputs = 1 if kind == "depthwise" else int(rng.integers(1, 4))
    outputs = int(rng.integers(1, 3)) * groups
    pointwise = kind.endswith("pointwise")
    size = (1, 1) if pointwise else tuple(map(int, rng.integers(1, most, 2)))
    arguments = {
        "strides": tuple(map(int, rng.integers(1, 4, 2))),
        "dilation": tuple(map(int, rng.integers(1, 3, 2))),
        "groups": groups,
        "padding": 0 if pointwise else tuple(map(int, rng.integers(0, 4, 2))),
    }
    b, h, w = map(int, rng.integers((1, 9, 9), (4, 14, 14)))
    x = rng.normal(size=(b, h, w, inputs * groups)).astype(np.float32)
    kernel = rng.normal(size=(*size, inputs, outputs)).astype(np.float32)
    found = {
        "dense": ("native", "patches", "direct", "auto"),
        "depthwise": ("native", "taps", "split", "auto"),
        "pointwise": ("native", "matmul", "patches", "direct", "auto"),
        "grouped": ("native", "split", *(("taps",) if inputs == 1 else ()), "auto"),
        "grouped pointwise": ("native", "split", "flat", "auto"),
    }[kind]
    return x, kernel, arguments, found


def close(found, expected, tolerance=1e-5):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def torch_conv(x, kernel, *, strides, dilation, groups, padding):
    x, kernel = (
        torch.tensor(x, requires_grad=True),
        torch.tensor(kernel, requires_grad=True),
    )
    y = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2),
        kernel.permute(3, 2, 0, 1),
        stride=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
    ).permute(0, 2, 3, 1)
    (y**2).sum().backward()
    return y.detach().numpy(), x.grad.numpy(), kernel.grad.numpy()


@pytest.mark.parametrize("seed", range(20))
def test_every_lowering_and_its_gradients_equal_pytorch(seed):
    x, kernel, arguments, found = random_case(seed)
    y, dx, dk = torch_conv(x, kernel, **arguments)
    for name in found:

        @jax.jit
        def run(x, kernel, name=name):
            y, pull = jax.vjp(
                lambda a, k: conv(a, k, lowering=name, **arguments), x, kernel
            )
            return y, *pull(2 * y)

        for ours, theirs in zip(run(x, kernel), (y, dx, dk), strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("seed", [6, 2, 3, 5, 4])
def test_derivatives_of_every_kind_equal_those_of_the_native_lowering(seed):
    x, kernel, arguments, found = random_case(seed, most=4)
    rng = np.random.default_rng(seed)
    dx, dk = rng.normal(size=x.shape), rng.normal(size=kernel.shape)
    tangents = (dx.astype(np.float32), dk.astype(np.float32))

    def all_derivatives(name):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, lowering=name, **arguments)))

        @jax.jit
        def run(x, kernel):
            gradient = jax.grad(loss, (0, 1))
            forward = jax.jvp(loss, (x, kernel), tangents)[1]
            over_reverse = jax.jvp(gradient, (x, kernel), tangents)[1]

            def slope(x, k):
                return sum(
                    jnp.vdot(g, t)
                    for g, t in zip(gradient(x, k), tangents, strict=True)
                )

            twice = jax.grad(slope, (0, 1))(x, kernel)
            xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
            mapped = jax.vmap(gradient)(xs, kernels)
            only_kernels = jax.vmap(gradient, (None, 0))(x, kernels)
            last = jax.vmap(gradient, (None, -1))(x, jnp.stack([kernel, -kernel], -1))
            return forward, over_reverse, twice, mapped, only_kernels, last

        return jax.tree.leaves(run(x, kernel))

    expected = all_derivatives("native")
    for name in found[1:]:
        for ours, theirs in zip(all_derivatives(name), expected, strict=True):
            close(ours, theirs, 2e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))])
@pytest.mark.parametrize("name", ["taps", "split"])
def test_padding_as_xla_says_it(padding, name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 7, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 1, 3)).astype(np.float32)

    @jax.jit
    def run(x, kernel):
        return conv(x, kernel, strides=2, groups=3, padding=padding, lowering=name)

    y = run(x, kernel)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (2, 2),
        padding,
        feature_group_count=3,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    close(y, expected)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("taps", 1),
        ("matmul", 2),
        ("split", 3),
        ("patches", 5),
        ("direct", 0),
        ("flat", 4),
    ],
)
def test_bfloat16_stays_and_is_as_exact_as_its_eight_bits(name, seed):
    x, kernel, arguments, _ = random_case(seed)
    x, kernel = jnp.bfloat16(x), jnp.bfloat16(kernel)

    @jax.jit
    def run(x, kernel):
        y, pull = jax.vjp(
            lambda x, k: conv(x, k, lowering=name, **arguments), x, kernel
        )
        return y, pull(jnp.ones_like(y))

    y, gradients = run(x, kernel)
    wide = np.asarray(x, np.float32), np.asarray(kernel, np.float32)
    expected, *_ = torch_conv(*wide, **arguments)
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    close(np.asarray(y, np.float32), expected, 2**-7)


def test_automatic_choice_on_a_cpu_avoids_the_slow_convolutions():
    x = jnp.ones((2, 8, 8, 8))

    def convolutions(kernel, **arguments):
        run = jax.jit(lambda x, k: conv(x, k, **arguments))
        return run.lower(x, jnp.ones(kernel)).as_text().count("stablehlo.convolution(")

    assert convolutions((3, 3, 1, 8), groups=8) == 0
    assert convolutions((1, 1, 8, 4)) == 0
    assert convolutions((3, 3, 4, 8), groups=2) == 2
    assert convolutions((3, 3, 8, 8)) == 1
    x = jnp.ones((2, 2, 2, 8))  # smaller than the kernel: XLA would run a plain loop
    assert convolutions((3, 3, 8, 8), padding=1) == 0


def test_a_forced_lowering_also_holds_for_functions_compiled_before():
    run = jax.jit(lambda x, k: conv(x, k, groups=4))
    x, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4))

    def native():
        return "stablehlo.convolution" in run.lower(x, kernel).as_text()

    run(x, kernel)
    assert not native()
    with lowering("native"):
        assert native()
        with lowering("taps"):
            assert not native()
        assert native()
    assert not native()


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_symbolic_batch_can_be_exported(name):
    kernels = {"matmul": (1, 1, 6, 4), "split": (3, 3, 2, 6), "patches": (3, 3, 6, 4)}
    kernels |= {"flat": (1, 1, 3, 4), "direct": (3, 3, 6, 4), "row": (1, 3, 6, 4)}
    kernel = np.ones(kernels.get(name, (3, 3, 1, 6)), np.float32)
    groups = 6 // kernel.shape[2]
    run = jax.jit(
        lambda x: conv(x, kernel, groups=groups, strides=2, padding=0, lowering=name)
    )
    height = 1 if name == "row" else 9
    shape = export.symbolic_shape(f"b, {height}, 9, 6")
    exported = export.export(run)(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = np.random.default_rng(0).normal(size=(3, height, 9, 6)).astype(np.float32)
    close(
        exported.call(x),
        conv(x, kernel, groups=groups, strides=2, padding=0, lowering="native"),
    )


def test_the_layer_is_flax_with_other_arithmetic():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 6))
    ours = Conv(12, (3, 5), strides=2, feature_group_count=6, kernel_dilation=(1, 2))
    theirs = linen.Conv(
        12, (3, 5), strides=2, feature_group_count=6, kernel_dilation=(1, 2)
    )
    variables = jax.jit(theirs.init)(jax.random.key(1), x)
    variables["params"]["bias"] += 1
    shapes = jax.eval_shape(ours.init, jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    both = jax.jit(lambda v, x: [net.apply(v, x) for net in (ours, theirs)])
    close(*both(variables, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "sane"}, "unknown padding 'SANE'; did you mean 'SAME'"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 0}, "groups=0"),
        ({"strides": 0}, "strides or dilation (1, )?0.* should be at least 1"),
        ({"dilation": (1, -1)}, r"dilation \(1, -1\) should be at least 1"),
        ({"lowering": "tap"}, "did you mean 'taps'"),
        ({"lowering": "taps"}, "cannot"),
        ({"padding": "VALID", "dilation": 4}, "smaller than a window"),
        ({"padding": (1,)}, r"padding \(1,\) does not fit 2 axes"),
        ({"padding": ((1, 2, 3), 0)}, "does not fit 2 axes"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        conv(jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 4, 4)), **arguments)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Conv(4, (3, 3), feature_group_count=0), "feature_group_count=0 should be"),
        (Conv(0, (3, 3)), "Conv: features=0 should be at least 1"),
        (Conv(4, (3, 3), strides=0), "should be at least 1"),
        (Conv(4, (3, 3), kernel_dilation=-1), "should be at least 1"),
        (Dense(-3), "Dense: features=-3 should be at least 1"),
    ],
    ids=str,
)
def test_numbers_of_a_layer_below_one_are_named(layer, message):
    with pytest.raises(UserError, match=message):
        layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


def test_a_layer_of_separate_groups_takes_one_array_a_group():
    halves = (jnp.ones((1, 3, 2)),) * 2
    layer = Conv(4, (1,), feature_group_count=4)
    with (
        separate_groups(),
        pytest.raises(UserError, match=r"tuple of 2 arrays, .* has groups=4"),
    ):
        layer.init(jax.random.key(0), halves)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize(
    ("groups", "strides", "length"), [(1, 1, 11), (6, 2, 11), (3, 3, 11), (1, 2, 9)]
)
def test_sequences_are_convolved_as_pytorch_does(groups, strides, length, batch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, length, 6)).astype(np.float32)
    kernel = rng.normal(size=(3, 6 // groups, 12)).astype(np.float32)
    arguments = dict(strides=strides, padding=2, dilation=2, groups=groups)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, kernel)]
    y = torch.nn.functional.conv1d(
        theirs[0].mT,
        theirs[1].permute(2, 1, 0),
        stride=strides,
        padding=2,
        dilation=2,
        groups=groups,
    ).mT
    (y**2).sum().backward()
    expected = [a.detach().numpy() for a in (y, theirs[0].grad, theirs[1].grad)]
    for name in ("auto", "native", "row"):

        @jax.jit
        def run(x, kernel, name=name):
            y, pull = jax.vjp(
                lambda x, k: conv(x, k, lowering=name, **arguments), x, kernel
            )
            return y, *pull(2 * y)

        for found, wanted in zip(run(x, kernel), expected, strict=True):
            close(found, wanted)
    layer = Conv(
        12,
        (3,),
        strides=strides,
        padding=2,
        kernel_dilation=2,
        feature_group_count=groups,
        use_bias=False,
    )
    variables = {"params": {"kernel": kernel}}
    close(layer.apply(variables, x), expected[0])
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert shapes["params"]["kernel"].shape == kernel.shape


def test_sequences_are_one_axis_where_that_is_quicker():
    def axes(batch, **arguments):
        run = jax.jit(lambda x, k: conv(x, k, **arguments))
        text = run.lower(jnp.ones((batch, 16, 9)), jnp.ones((5, 9, 8))).as_text()
        return re.search(r"dim_numbers = \[b, ([01, ]*)f\]", text).group(1).count(",")

    assert axes(1) == 2
    assert axes(8) == 1
    with lowering("native"):  # as files for LiteRT hold it
        assert axes(8) == 2


@pytest.mark.parametrize(
    ("size", "kernel", "strides"), [(40, 3, 1), (33, 5, 2), (2, 5, 1), (1, 7, 1)]
)
def test_gradients_of_large_and_small_images_equal_the_native(size, kernel, strides):
    """Sizes at which the automatic choice differs from that of the other tests."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    k = rng.normal(size=(kernel, kernel, 3, 4)).astype(np.float32)

    def gradients(name):
        def loss(x, k):
            y = conv(x, k, strides=strides, padding=kernel // 2, lowering=name)
            return jnp.sum(y**2)

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, k))

    for ours, native in zip(gradients("auto"), gradients("native"), strict=True):
        close(ours, native)


def test_an_image_without_a_batch_is_an_error():
    with pytest.raises(UserError, match=r"images \[b, h, w, c\].*\(5, 5, 4\)"):
        conv(jnp.ones((5, 5, 4)), jnp.ones((3, 3, 4, 4)))


def test_numbers_for_another_count_of_axes_are_named():
    with pytest.raises(UserError, match=r"\(1, 2\) has 2 numbers for 1 axes"):
        conv(jnp.ones((1, 5, 4)), jnp.ones((3, 4, 4)), strides=(1, 2))


def test_an_unknown_forced_lowering_is_named():
    with pytest.raises(UserError, match="did you mean 'native'"), lowering("nativ"):
        pass


@pytest.mark.parametrize(
    ("shape", "count"), [("3, 128, 512", 1), ("4, 128, 512", 4), ("b, 128, 512", 4)]
)
def test_groups_of_sequences_are_apart_where_there_are_many_positions(shape, count):
    layer = Conv(512, (1,), feature_group_count=4)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 1, 512)))
    x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    exported = export.export(jax.jit(layer.apply))(variables, x)
    products = re.findall(
        r"stablehlo\.(?:dot_general|convolution)", exported.mlir_module()
    )
    assert len(products) == count


class Pooled(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = Conv(8, (3, 3), use_bias=False)(x)
        x = BatchNorm(True)(Conv(8, (3, 3), feature_group_count=8, use_bias=False)(x))
        x = max_pool(Conv(6, (1, 1), feature_group_count=2, use_bias=False)(x), 3, 2)
        x = mean_pool(x, 2, 1).reshape(x.shape[0], -1, 6)
        return Conv(4, (3,), use_bias=False)(x)


def test_the_platform_that_a_function_is_compiled_for_decides():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    variables = jax.jit(Pooled().init)(jax.random.key(1), x)

    def loss(params, x):
        return jnp.sum(Pooled().apply(variables | {"params": params}, x) ** 2)

    run = jax.jit(jax.grad(loss, (0, 1)))
    texts = {
        platform: export.export(run, platforms=[platform])(variables["params"], x)
        for platform in ("cpu", "cuda", "tpu")
    }
    counts = {
        platform: [
            exported.mlir_module().count(f"stablehlo.{name}")
            for name in ("convolution(", "reduce_window", "select_and_scatter")
        ]
        for platform, exported in texts.items()
    }
    # Four convolutions have three maps each; the maximum has a window, the mean one in each direction.
    assert counts["tpu"] == counts["cuda"] == [12, 3, 1]
    assert counts["cpu"][0] < 12
    assert counts["cpu"][1:] == [0, 0]
    several = export.export(run, platforms=["tpu", "cpu"])(variables["params"], x)
    for a, b in zip(
        jax.tree.leaves(several.call(variables["params"], x)),
        jax.tree.leaves(run(variables["params"], x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    kernels = jnp.ones((4, 3, 3, 1, 3))
    mapped = jax.jit(jax.vmap(lambda k: conv(x, k, groups=3)))
    text = export.export(mapped, platforms=["tpu"])(kernels).mlir_module()
    assert "stablehlo.convolution(" in text
