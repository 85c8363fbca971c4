"""Time layer by layer: how a run's time is divided, by hand; which layer an operation is of; and real runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from squeeze_jax import models
from squeeze_jax.cost import hlo, layers, profile
from squeeze_jax.cost.hlo import Operation
from squeeze_jax.cost.profile import Interval
from squeeze_jax.errors import UserError

MS = 1_000_000  # ns
pytestmark = pytest.mark.usefixtures("optimized")  # times are compared


class Uneven(nn.Module):
    """Of 16.8 M MACs 99.6% are in one layer: 512 · 256 · 128, against 512 · 128 · 1."""

    @nn.compact
    def __call__(self, x, scale=1.0):  # [512, 256]
        x = nn.Dense(128, name="heavy")(x)
        x = nn.relu(x)
        return scale * nn.Dense(1, name="light")(x), {"endpoint": x}


def test_the_layer_with_the_arithmetic_takes_the_time():
    module, x = Uneven(), jnp.ones((512, 256))
    found = profile.measure(module, x, scale=2.0, runs=20, traced=20, warmup=3)
    assert found.by_layer["heavy"] > 2 * found.by_layer["light"]
    assert next(iter(found.by_layer)) == "heavy"  # in order of use
    assert {"heavy", "light"} <= set(found.by_layer) <= {"heavy", "light", "Uneven"}
    assert set(found.by_layer) >= {r.name for r in layers.layers(module, x)}
    assert 0 < found.latency["p50"] <= found.latency["p90"] <= found.latency["p99"]
    parts = [*found.by_layer.values(), found.unnamed_ms, found.idle_ms]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(found.traced_ms)
    assert found.elsewhere_ms == found.unnamed_ms + found.idle_ms
    # the same numbers of operations, but 64 times the work: it shows in the layer
    large = profile.measure(module, jnp.ones((32768, 256)), runs=5, traced=5, warmup=1)
    assert large.by_layer["heavy"] > 4 * found.by_layer["heavy"]


def test_layers_are_those_of_the_network():
    module = models.make(name="mobilenet_v2", variant="tiny", num_classes=10)
    x = jnp.ones((1, 16, 16, 3))
    found = profile.measure(module, x, runs=2, traced=4, warmup=1)
    counted = layers.layers(module, x)
    assert {r.name for r in counted if r.macs} <= set(found.by_layer)
    blocks = {r.name.rpartition("/")[0] for r in counted} - {""}
    assert set(found.by_layer) <= {r.name for r in counted} | blocks | {"MobileNetV2"}
    # what XLA adds without a name is small
    assert found.unnamed_ms < 0.2 * sum(found.by_layer.values())


def test_programs_of_other_layers_have_other_names():
    """JAX's cache on disk takes programs for the same that differ in the names of layers alone, which are read here."""

    class Net(nn.Module):
        layer: str

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name=self.layer)(x)

    def program_name(layer):
        module, args = Net(layer, name="net"), (jnp.ones((2, 3)),)
        found = profile._compile(module, args, {}, None, {layer: None})[0].as_text()
        return found.split(maxsplit=2)[1]

    names = [program_name(layer) for layer in ("first", "other", "first")]
    assert names[0] == names[2] != names[1]


def test_functions():
    x, weights = jnp.ones((64, 64)), jnp.ones((64, 64))
    plain = profile.measure(lambda a, b: jnp.tanh(a @ b), x, weights, runs=2, traced=2)
    assert list(plain.by_layer) == [""]
    module = nn.Dense(64, name="head")
    variables = module.init(jax.random.key(0), x)
    found = profile.measure(lambda a: module.apply(variables, a), x, runs=2, traced=2)
    assert "head" in found.by_layer
    alone = profile.measure(module, x, variables=variables, runs=2, traced=2)
    assert "head" in alone.by_layer


def test_work_of_a_loop_is_not_charged_twice():
    """The loop itself is an operation that lasts as long as all in it."""

    def fn(x):
        return jax.lax.while_loop(lambda v: v[0, 0] < 20, lambda v: v @ x + 1, x)

    found = profile.measure(fn, jnp.eye(200), runs=2, traced=4)
    assert 0 < sum(found.by_layer.values()) <= found.traced_ms


def test_errors(tmp_path):
    with pytest.raises(UserError, match="runs = 0 and traced = 40: at least one run"):
        profile.measure(jnp.tanh, jnp.ones(3), runs=0)
    other = pytest.raises(UserError, match="cannot record while another trace is")
    with jax.profiler.trace(tmp_path), other:
        profile.measure(jnp.tanh, jnp.ones(3), runs=1)
    assert profile.measure(jnp.tanh, jnp.ones(3), runs=1, traced=1).by_layer


def test_time_is_divided_by_hand():
    """A run of 20 ms: a from 2 to 8 and b from 4 to 10 at once, c alone from 12 to 13, in a loop from 11 to 15.

    a has 2 ms alone and a half of 4, b as many; c 1 and the loop the other 3 of its 4; a copy of no layer 2 from 18.
    """
    operations = {
        "a": Operation("A"),
        "b": Operation("B"),
        "c": Operation("C"),
        "loop": Operation("L", container=True),
        "copy": Operation(),
    }
    ran = [(2, 8, "a"), (4, 10, "b"), (11, 15, "loop"), (12, 13, "c"), (18, 25, "copy")]
    intervals = [Interval(MS * s, MS * e, name) for s, e, name in ran]
    parts = profile._divide_among_layers((0, 20 * MS), intervals, operations)
    idle = parts.pop(profile._IDLE)
    expected = {"A": 4, "B": 4, "C": 1, "L": 3, None: 2}
    assert parts == pytest.approx(expected)
    assert idle == pytest.approx(20 - 14)


def test_an_operation_ends_where_what_reads_it_begins():
    operations = {"a": Operation(), "b": Operation(inputs=("a",)), "c": Operation()}
    names = [(0, 9, "a"), (2, 3, "c"), (4, 6, "b"), (10, 12, "a"), (11, 13, "c")]
    found = profile._trim_to_readers([Interval(*each) for each in names], operations)
    assert [tuple(i) for i in found] == [(0, 4, "a"), *names[1:]]


def test_operations_belong_to_the_run_they_began_in():
    windows = [(10, 20), (30, 40)]
    intervals = [Interval(s, s + 2, "a") for s in (5, 11, 19, 30, 45)]
    (_, first), (_, second) = profile._by_run(windows, intervals)
    assert [i.start for i in first] == [11, 19]  # 5 is of the warm-up
    assert [i.start for i in second] == [30, 45]


def test_the_middle_half():
    runs = [{"a": 1}, {"a": 4, "b": 2}, {"a": 100}, {"a": 2}]  # totals 1, 6, 100, 2
    assert profile._middle_half_mean(runs) == {"a": 3, "b": 1}


PROGRAM = """\
HloModule jit_profiled, is_scheduled=true

%fused_computation (param_0: f32[8,8]) -> f32[4] {
  %param_0 = f32[8,8]{1,0} parameter(0)
  %multiply.1 = f32[8,8]{1,0} multiply(%param_0, %param_0), metadata={op_name="jit(f)/Net/block/depthwise/mul"}
  %slice.1 = f32[4,4]{1,0} slice(%multiply.1), metadata={op_name="jit(f)/Net/block/norm/slice"}
  ROOT %maximum.1 = f32[4]{0} maximum(%slice.1, %slice.1), metadata={op_name="jit(f)/Net/block/jit(relu)/max"}
}

%body (p: (f32[8,8])) -> (f32[8,8]) {
  %p = (f32[8,8]) parameter(0)
  %tanh.1 = f32[8,8]{1,0} tanh(%p), metadata={op_name="jit(f)/Net/while/body/closed_call/cell/tanh"}
  ROOT %tuple.1 = (f32[8,8]{1,0}) tuple(%tanh.1)
}

ENTRY %main (variables: f32[8,8], x: f32[8,8]) -> f32[4] {
  %variables.1 = f32[8,8]{1,0} parameter(0), metadata={op_name="variables[\\'params\\'][\\'head\\'][\\'kernel\\']"}
  %x.1 = f32[8,8]{1,0} parameter(1), metadata={op_name="inputs[0]"}
  %copy.1 = f32[8,8]{0,1} copy(%variables.1), metadata={op_name="variables[\\'params\\'][\\'head\\'][\\'kernel\\']"}
  %bitcast.1 = f32[8,8]{1,0} bitcast(%copy.1)
  %dot.1 = f32[8,8]{1,0} dot(%x.1, %variables.1)
  %dot.2 = f32[8,8]{1,0} dot(%dot.1, %bitcast.1), metadata={op_name="jit(f)/Net/vmap(head)/dot_general"}
  %while.1 = (f32[8,8]{1,0}) while(%dot.2), condition=%c, body=%body, metadata={op_name="jit(f)/Net/while"}
  %copy.2 = f32[8,8]{0,1} copy(%x.1)
  ROOT %fusion.1 = f32[4]{0} fusion(%dot.2), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(f)/Net/block/jit(relu)/max"}
}
"""


def test_layers_of_a_program():
    known = ["block/depthwise", "block/norm", "block", "cell", "head", "Net"]
    name, found = hlo.operations(PROGRAM, known, "Net")
    assert name == "jit_profiled"
    assert found["fusion.1"].layer == "block/depthwise"  # 64 products; maxima of 16
    assert found["tanh.1"].layer == "cell"  # what lies between is passed over
    assert found["while.1"] == Operation("Net", True, ("dot.2",))
    assert found["dot.1"].layer == "head"  # unnamed, but it reads the weight
    assert found["dot.2"] == Operation("head", False, ("dot.1", "copy.1"))
    assert found["copy.1"].layer == "head"
    assert found["copy.2"].layer is None
