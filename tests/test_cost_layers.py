"""Costs of layers against counts by hand and published totals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import models
from squeeze_jax.cost import count
from squeeze_jax.cost.layers import Layer, layers, total
from squeeze_jax.errors import UserError
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Net(nn.Module):
    """An 8x8x3 image; first: 8x8x4, depth: 4x4x4 (strides 2), head: 10 classes."""

    @nn.compact
    def __call__(self, x):
        y = Conv(4, (3, 3), use_bias=False, name="first")(x)
        y = nn.relu(BatchNorm(True, name="norm")(y))
        y = Conv(4, (3, 3), 2, feature_group_count=4, name="depth")(y)
        y = y * self.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(10, name="head")(global_mean(y)), {"y": y}


IMAGE = ones(1, 8, 8, 3)
# name, parameters, MACs, bytes read in, of weights, written
FIRST = ("first", 3 * 3 * 3 * 4, 64 * 27 * 4, 8 * 8 * 3, 3 * 3 * 3 * 4, 8 * 8 * 4)
DEPTH = ("depth", 3 * 3 * 4 + 4, 16 * 9 * 4, 8 * 8 * 4, 3 * 3 * 4, 4 * 4 * 4)
HEAD = ("head", 4 * 10 + 10, 4 * 10, 4, 4 * 10, 10)


def test_a_small_net_by_hand():
    rows = {row.name: row for row in layers(Net(), IMAGE)}
    for name, parameters, macs, *moved in (FIRST, DEPTH, HEAD):
        assert rows[name] == (name, parameters, macs, 64 * macs, sum(moved))
    assert rows["norm"] == Layer("norm", parameters=8)
    assert rows["Net"] == Layer("Net", parameters=4)
    assert rows["first"].intensity == 6912 / (192 + 108 + 256)
    assert rows["norm"].intensity == 0
    # in order of use: the net itself has the first ReLU
    assert list(rows) == ["first", "norm", "Net", "depth", "head"]


def test_bits_by_rules():
    rules = (("first/", 8), ("kernel", 4), ["bias", 16])
    rows = layers(Net(), IMAGE, weight_bits=rules, activation_bits=16)
    rows = {row.name: row for row in rows}
    for (name, _, macs, read, weights, written), bits in zip(
        (FIRST, DEPTH, HEAD), (8, 4, 4), strict=True
    ):
        assert rows[name].bops == macs * bits * 16
        assert rows[name].bytes == 2 * read + weights * bits // 8 + 2 * written
    # What no rule names is as it is stored: float32.
    rows = layers(Net(), IMAGE, weight_bits=[("first", 1)])
    assert [r.bops for r in rows if r.macs] == [6912 * 8, 576 * 32 * 8, 40 * 32 * 8]
    # 108 weights of one bit take 14 bytes.
    assert rows[0].bytes == 192 + 14 + 256


def test_weights_keep_their_bits_through_what_is_made_of_them():
    class Rounded(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (6, 5))
            scale = self.param("scale", nn.initializers.ones, (5,))
            return x @ (jnp.round(w / scale) * scale).astype(x.dtype)

    (row,) = layers(Rounded(), ones(3, 6), weight_bits=[("w$", 2), ("scale", 1)])
    assert row == ("Rounded", 35, 90, 90 * 2 * 8, 18 + 30 * 2 // 8 + 1 + 15)


def test_products_of_activations_have_no_weights():
    (row,) = layers(lambda q, k: q @ k.T, ones(6, 4), ones(5, 4), weight_bits=2)
    assert row == ("", 0, 120, 120 * 64, 24 + 20 + 30)
    (row,) = layers(lambda q: q @ jnp.ones((4, 5)), ones(6, 4), weight_bits=2)
    assert row == ("", 0, 120, 120 * 16, 24 + 20 * 2 // 8 + 30)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.jit(lambda x: x @ x)(x)
        return nn.Dense(4, use_bias=False, name="dense")(x), None


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(Inner)(name="kept")(x)
        stack = nn.scan(
            Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="stack")(x)[0]


def test_loops_and_calls():
    # A product of 4x4 matrices: 64 MACs, 16 + 16 + 16 bytes; three turns of the loop, each with weights of its own.
    rows = layers(Outer(), ones(4, 4), weight_bits=4)
    assert set(rows) == {
        Layer("kept", 0, 64, 64 * 64, 48),
        Layer("kept/dense", 16, 64, 64 * 32, 16 + 8 + 16),
        Layer("stack", 0, 3 * 64, 3 * 64 * 64, 3 * 48),
        Layer("stack/dense", 3 * 16, 3 * 64, 3 * 64 * 32, 3 * 40),
    }
    assert total(rows).macs == count.macs(Outer(), ones(4, 4)).total


def test_a_conditional_costs_its_costliest_branch():
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ (x @ x)]

    def chosen(i, x):
        return jax.lax.switch(i, branches, x)

    (row,) = layers(chosen, jax.ShapeDtypeStruct((), np.int32), ones(4, 4))
    assert row == ("", 0, 128, 128 * 64, 2 * 48)


def test_the_work_of_all_devices_counts():
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    (row,) = layers(run, ones(8, 4))
    assert row == ("", 0, 64, 64 * 64, 4 * (8 + 8 + 4))  # 2x4 by 4x2 on each of four


# parameters and MACs of torchvision's networks at 224x224
PUBLISHED = {
    ("squeezenet", "1.1"): (1_235_496, 349.15),
    ("mobilenet_v2", "1.0"): (3_504_872, 300.77),
    ("resnet", "18"): (11_689_512, 1_814.07),
}


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_sums_are_the_published_totals(name, variant):
    net, image = models.make(name, variant=variant), ones(1, 224, 224, 3)
    parameters, millions = PUBLISHED[name, variant]
    rows = layers(net, image)
    found, counted = total(rows), count.macs(net, image)
    assert found.parameters == parameters == count.parameters(net, image)
    assert found.macs == counted.total
    assert round(found.macs / 1e6, 2) == millions
    assert {r.name: r.macs for r in rows if r.macs} == counted.by_layer


@pytest.mark.parametrize(("bits", "billions"), [(32, 1858), (8, 116)])
def test_bit_operations_are_those_of_hawq_v3(bits, billions):
    """Its README's table of ResNet-18."""
    net, image = models.make("resnet", variant="18"), ones(1, 224, 224, 3)
    rows = layers(net, image, weight_bits=bits, activation_bits=bits)
    assert round(total(rows).bops / 1e9) == billions


def test_nothing_costs_nothing():
    assert layers(jnp.sin, ones(3)) == ()
    assert total(()) == Layer("total")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight_bits = 0 should be an integer from 1 to 64"),
        ({"weight_bits": "8"}, "weight_bits = '8' should be an integer"),
        ({"activation_bits": 8.0}, "activation_bits = 8.0 should be an integer"),
        ({"weight_bits": [("first", 65)]}, "weight_bits of 'first' = 65 should be"),
        ({"weight_bits": [("frist", 8)]}, "weight_bits: the rule 'frist' matches no"),
        ({"weight_bits": [("(", 8)]}, "is not a regular expression"),
        ({"weight_bits": ["first", 8]}, r"should be a pair \(regular expression, v"),
    ],
)
def test_bits_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        layers(Net(), IMAGE, **options)


def test_rules_need_names():
    with pytest.raises(UserError, match="only a Linen module has; give one number"):
        layers(lambda x: x @ x, ones(4, 4), weight_bits=[("kernel", 4)])
