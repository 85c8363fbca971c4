"""Bytes on the wire against counts by hand, on 2 and 4 simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from squeeze_jax.cost.wire import compiled_wire, describe, wire

pytestmark = pytest.mark.usefixtures("four_devices")

# 40 + 8 numbers
TREE = {"kernel": (5, 8), "bias": (8,)}
ROWS = P("data")


def ones(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def tree(dtype=jnp.float32):
    return {name: ones(*shape, dtype=dtype) for name, shape in TREE.items()}


def mesh(*sizes):
    names = ("data", "model")[: len(sizes)]
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(sizes))


def sharded(fn, on, spec=ROWS, out=ROWS):
    return jax.shard_map(fn, mesh=on, in_specs=spec, out_specs=out, check_vma=False)


def mean(grads):
    return jax.tree.map(lambda g: lax.pmean(g, "data"), grads)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_mean_of_a_tree(devices, dtype, size):
    run = sharded(mean, mesh(devices), P(), P())
    found = wire(run, tree(jnp.dtype(dtype)))
    # A ring sends each of n parts n - 1 times to add up, and n - 1 times to share: 48 numbers for 2, 72 for 4 devices.
    numbers = {2: 48, 4: 72}[devices]
    assert found.sent == {("all-reduce", dtype): numbers * size}
    assert found.payload == {("all-reduce", dtype): 48 * size}
    assert found.unknown == ()
    assert found.total == numbers * size


@pytest.mark.parametrize(
    ("collective", "kind", "payload", "sent"),
    [
        # float32 [8, 4] on each of four devices: 128 bytes
        (lambda x: lax.all_gather(x, "data"), "all-gather", 4 * 128, 3 * 128),
        (lambda x: lax.psum_scatter(x, "data"), "reduce-scatter", 128, 96),
        (lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", 128, 96),
        (lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), "permute", 128, 128),
        (lambda x: lax.pmax(x, "data"), "all-reduce", 128, 192),
        (lambda x: lax.pbroadcast(x, ("data",), 0), "broadcast", 128, 96),
        (
            lambda x: lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]),
            "all-reduce",
            128,
            128,
        ),
    ],
)
def test_each_collective(collective, kind, payload, sent):
    def run(x):
        # psum_scatter without tiles wants as many rows as devices.
        x = x.reshape(4, 8) if kind == "reduce-scatter" else x
        return jnp.sum(collective(x))

    found = wire(sharded(run, mesh(4), out=P()), ones(32, 4))
    assert found == ({(kind, "float32"): sent}, {(kind, "float32"): payload}, ())
    if kind != "broadcast":  # which XLA has on GPUs alone
        compiled = jax.jit(sharded(run, mesh(4), out=P())).lower(ones(32, 4)).compile()
        assert compiled_wire(compiled) == found


def test_what_sends_nothing():
    def run(x):
        x = lax.ppermute(x, "data", [(0, 0), (1, 1)])
        return lax.pcast(lax.psum(x, "model"), "model", to="varying")

    def batched(x):
        return jax.vmap(lambda row: lax.psum(row, "rows"), axis_name="rows")(x)

    # Two devices along "data" move nothing to each other, and there is one alone along "model".
    on = mesh(2, 1)
    run = jax.shard_map(
        run, mesh=on, in_specs=P("data", "model"), out_specs=P("data", "model")
    )
    assert wire(run, ones(8, 4)) == ({}, {}, ())
    assert describe(wire(run, ones(8, 4))) == "wire nothing is sent"
    assert wire(sharded(batched, on), ones(8, 4)) == ({}, {}, ())


def test_axes_multiply():
    run = sharded(lambda x: lax.psum(x, ("data", "model")), mesh(2, 2), P(), P())
    assert wire(run, ones(8, 4)).sent == {("all-reduce", "float32"): 2 * 3 * 32}
    run = sharded(lambda x: lax.psum(x, "model"), mesh(2, 2), P(), P())
    assert wire(run, ones(8, 4)).sent == {("all-reduce", "float32"): 2 * 1 * 64}


def test_checked_replication():
    """The primitives that `jax.shard_map` writes where it checks which arrays vary."""

    def run(w, x):
        gradient = jax.grad(lambda w: jnp.sum(x @ w))(w)
        part = lax.psum_scatter(lax.pcast(w, "data", to="varying"), "data", tiled=True)
        return gradient, lax.all_gather(part, "data", tiled=True, to="invarying")

    on = mesh(4)
    run = jax.shard_map(run, mesh=on, in_specs=(P(), P("data")), out_specs=P())
    found = wire(run, ones(4, 8), ones(16, 4))
    # w has 128 bytes; the gradient of what is replicated is added up over devices.
    assert found.sent == {
        ("all-reduce", "float32"): 192,
        ("reduce-scatter", "float32"): 96,
        ("all-gather", "float32"): 96,
    }


def test_int8_is_a_quarter_of_float32():
    def exchange(grads):
        def one(g):
            scale = jnp.max(jnp.abs(g)) / 127
            whole = lax.all_gather(jnp.round(g / scale).astype(jnp.int8), "data")
            scales = lax.all_gather(scale, "data")
            return jnp.tensordot(scales, whole.astype(jnp.float32), 1) / 2

        return jax.tree.map(one, grads)

    found = wire(sharded(exchange, mesh(2), P(), P()), tree())
    # Of two devices each sends its 48 bytes and two scales to the other.
    assert found.sent == {("all-gather", "int8"): 48, ("all-gather", "float32"): 8}
    exact = wire(sharded(mean, mesh(2), P(), P()), tree())
    assert found.by_dtype()["int8"] == exact.total / 4
    assert found.by_kind() == {"all-gather": 56}
    assert describe(found) == (
        "wire 56 B a step and device: all-gather int8 48 B, all-gather float32 8 B"
    )


def test_four_bits_are_packed():
    def run(x):
        return lax.all_gather(x, "data")

    on = sharded(run, mesh(2), P(), P())
    assert wire(on, ones(9, dtype=jnp.int4)).sent == {("all-gather", "int4"): 5}


def test_loops_and_branches():
    def reduced(x):
        return lax.psum(x, "data")

    def nested(x):
        def inner(x, _):
            return reduced(x), None

        def outer(x, _):
            return lax.scan(inner, x, length=3)[0], None

        return lax.scan(outer, x, length=5)[0]

    def chosen(x):
        branches = [lambda x: x, lambda x: reduced(reduced(x)), reduced]
        return lax.switch(lax.axis_index("data"), branches, x)

    def endless(x):
        x = lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x)
        return lax.while_loop(lambda x: x.sum() < 9, reduced, x)

    once = 2 * 3 / 4 * 32  # a float32 [8] on four devices
    unknown = "while loop, counted as one iteration"
    for run, times, named in (nested, 15, ()), (chosen, 2, ()), (endless, 1, unknown):
        on = sharded(run, mesh(4))
        found, compiled = (
            wire(on, ones(32)),
            compiled_wire(jax.jit(on).lower(ones(32)).compile()),
        )
        assert found.sent == compiled.sent == {("all-reduce", "float32"): times * once}
        if named:
            assert compiled.unknown == (unknown,)
            assert found.unknown == (f"{unknown}, in the function itself",)
            assert describe(compiled).endswith(f"not counted: {unknown}")
        else:
            assert found.unknown == compiled.unknown == ()


def test_nothing_runs():
    abstract = AbstractMesh((256,), ("data",), axis_types=(AxisType.Auto,))
    found = wire(sharded(mean, abstract, P(), P()), {"w": ones(1 << 20, 1 << 10)})
    assert found.payload == {("all-reduce", "float32"): 1 << 32}
    assert found.sent == {("all-reduce", "float32"): 2 * 255 * (1 << 24)}
    assert describe(found) == (
        "wire 8.56 GB a step and device: all-reduce float32 8.56 GB"
    )


def test_the_compilers_own_collectives():
    """Data-parallel gradients are an all-reduce of the parameters; fully sharded ones gather them first."""

    def loss(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"]).sum()

    on = mesh(4)
    rows = NamedSharding(on, P("data"))

    def compiled(sharding):
        params = {
            "kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding),
            "bias": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding),
        }
        x = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=rows)
        step = jax.jit(jax.grad(loss), out_shardings=sharding)
        return compiled_wire(step.lower(params, x).compile())

    nbytes = 4 * (8 * 16 + 16)
    replicated = compiled(NamedSharding(on, P()))
    assert replicated.payload == {("all-reduce", "float32"): nbytes}
    assert replicated.sent == {("all-reduce", "float32"): 2 * 3 / 4 * nbytes}
    assert compiled(rows).payload[("all-gather", "float32")] == nbytes
    # A plain function does not say what the compiler will do.
    assert (
        wire(jax.grad(loss), {"kernel": ones(8, 16), "bias": ones(16)}, ones(32, 8))[0]
        == {}
    )


HLO = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: bf16[6,4], y: f8e4m3fn[8]) -> bf16[6,4] {{
  %x = bf16[6,4]{{1,0}} parameter(0)
  %y = f8e4m3fn[8]{{0}} parameter(1)
  {instruction}
}}
"""


@pytest.mark.parametrize(
    ("instruction", "kind", "dtype", "sent"),
    [
        # x has 48 bytes, y has 8
        ("all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", "x", 84),
        ("all-reduce(%x), replica_groups=[2,4]<=[8]", "all-reduce", "x", 72),
        ("all-gather(%y), replica_groups=[4,2]<=[4,2]T(1,0)", "all-gather", "y", 8),
        ("all-gather(%y), replica_groups={{0,1,2,3},{4,5,6,7}}", "all-gather", "y", 24),
        ("all-gather(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}", "all-gather", "y", 24),
        ("all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", "all-to-all", "x", 36),
        ("all-gather-start(%y), replica_groups={{0,1},{2,3}}", "all-gather", "y", 8),
        ("collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", "permute", "x", 48),
        ("collective-broadcast(%y), replica_groups={{0,1,2,3}}", "broadcast", "y", 6),
    ],
)  # fmt: skip
def test_notations_of_compiled_programs(instruction, kind, dtype, sent):
    text = HLO.format(instruction=f"ROOT %r = (bf16[6,4], f32[]) {instruction}")
    dtype = {"x": "bfloat16", "y": "float8_e4m3fn"}[dtype]
    found = compiled_wire(text)
    assert found.sent == {(kind, dtype): sent}
    assert found.unknown == ()


def test_compiled_programs_name_what_is_not_known():
    text = HLO.format(
        instruction="ROOT %r = bf16[6,4] all-reduce(%x), replica_groups=other"
    )
    assert compiled_wire(text) == ({}, {}, ("all-reduce among unknown devices",))
    text = HLO.format(instruction="ROOT %r = bf16[6,4] ragged-all-to-all(%x, %y)")
    assert compiled_wire(text) == ({}, {}, ("ragged-all-to-all",))
