"""Peak memory of activations against counts by hand, and against the buffers of int8 files for microcontrollers."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from jax import lax

import run
from squeeze_jax import models
from squeeze_jax.cost import memory
from squeeze_jax.cost.count import macs
from squeeze_jax.errors import UserError
from squeeze_jax.export import runnable
from squeeze_jax.export.formats import tflite_int8
from squeeze_jax.nn.conv import Conv, conv, lowering
from squeeze_jax.nn.norm import BatchNorm
from squeeze_jax.nn.pool import global_mean, max_pool


def ones(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def filled(net, x):
    """Some positive variables of a network, without compiling its initialization."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda v: rng.uniform(-0.1, 1.0, v.shape).astype(v.dtype) ** 2, shapes
    )


class Net(nn.Module):
    """Values of a 8x8x3 image, one byte a number, and what is alive during each operation (with a = image):

    y = relu(norm(conv 3→4))   8·8·4 = 256    a + y      = 192 + 256       =  448
    z = relu(conv 4→8)         8·8·8 = 512    y + z      = 256 + 512       =  768
    w = conv 8→4               8·8·4 = 256    y + z + w  = 256 + 512 + 256 = 1024
    s = y + w                  8·8·4 = 256    y + w + s  = 3·256           =  768
    p = 2x2 pool of s          4·4·4 =  64    s + p                        =  320
    m = mean                           4      p + m                        =   68
    l = dense 4→10                    10      m + l                        =   14
    """

    @nn.compact
    def __call__(self, x):
        y = Conv(4, (3, 3), use_bias=False, name="first")(x)
        y = nn.relu6(BatchNorm(True, name="first_norm")(y))
        z = nn.relu(Conv(8, (1, 1), name="wide")(y))
        s = y + Conv(4, (1, 1), name="narrow")(z)
        m = global_mean(max_pool(s, 2, 2))
        return nn.Dense(10, name="head")(m), {"wide": z}


def test_a_small_net_by_hand():
    found = memory.peak(Net(), ones(1, 8, 8, 3))
    assert found.bytes == 1024
    assert (found.operation, found.layer) == ("conv_general_dilated", "narrow")
    assert sorted(found.shapes) == [(1, 8, 8, 4), (1, 8, 8, 4), (1, 8, 8, 8)]
    own = {"first": 448, "wide": 768, "narrow": 1024, "Net": 768, "head": 14}
    assert found.by_layer == own | {"first_norm": 256}  # joined: only y
    assert memory.peak(Net(), ones(2, 8, 8, 3)).bytes == 2 * 1024


@pytest.mark.parametrize(("bits", "expected"), [(32, 4096), (None, 4096), (4, 512)])
def test_bits_of_activations(bits, expected):
    assert memory.peak(Net(), ones(1, 8, 8, 3), bits=bits).bytes == expected


def test_integers_keep_their_size():
    # 5 int32 ids and 5 rows of 16 numbers of 8 bits
    table = jnp.ones((100, 16))

    def look_up(ids):
        return table.at[ids].get(mode="promise_in_bounds")

    found = memory.peak(look_up, ones(5, dtype=jnp.uint32))
    assert found.bytes == 5 * 4 + 5 * 16


def test_weights_are_what_is_closed_over():
    w = jnp.ones((50, 20))
    # 3x50 in and 3x20 out; with w as an argument 50x20 more
    assert memory.peak(lambda x: x @ w, ones(3, 50)).bytes == 150 + 60
    assert memory.peak(jnp.matmul, ones(3, 50), ones(50, 20)).bytes == 1210


def test_arithmetic_on_weights_is_done_before():
    w = jnp.ones((50, 20))

    def run(x):
        return x @ (jnp.tanh(w) * 2) + jnp.arange(20.0)

    assert memory.peak(run, ones(3, 50)).bytes == 150 + 60


def test_what_no_result_needs_is_not_computed():
    def run(x):
        return (jnp.outer(x, x).sum(), x + 1)[1]

    assert memory.peak(run, ones(10)).bytes == 20


def test_results_stay_to_the_end():
    # a, then a and b = sin(a), a·10 at the end: 100 + 100 + 10 (the mean of b)
    def run(a):
        return ((b := jnp.sin(a)), b.reshape(10, 10).sum(1))

    assert memory.peak(run, ones(100)).bytes == 200

    # the result b waits: b + c = sin(b) + d = c·b
    def run(a):
        return ((b := jnp.sin(a)), jnp.sin(jnp.sin(b)))

    assert memory.peak(run, ones(100)).bytes == 300


def test_what_joins_a_convolution_and_what_does_not():
    kernel, scale = jnp.ones((1, 1, 4, 4)), jnp.full(4, 2.0)

    def after(f, **options):
        def run(x):
            return f(conv(x, kernel))

        return memory.peak(run, ones(1, 10, 10, 4), **options).bytes

    # 400 bytes each: convolution and input, and for steps of their own their input and output.
    assert after(lambda y: y) == 800
    assert after(lambda y: nn.relu6(y * scale + 1)) == 800
    assert after(lambda y: jax.jit(nn.relu)(y).reshape(100, 4)) == 800
    assert after(nn.hard_swish) == 800
    assert after(lambda y: scale - y) == 800
    assert after(lambda y: nn.relu(1 / y)) == 800
    # 1 / y is no sum: y and its inverse, and the inverse plus one, beside y for the last sum
    assert after(lambda y: y + (1 / y + 1)) == 1200
    assert after(nn.sigmoid) == 800
    # x · sigmoid(x): x, sigmoid(x) and the product
    assert after(nn.silu) == 1200
    assert after(nn.silu, in_place=True) == 800
    # A batch normalisation behind a ReLU cannot join: y, y·a; y·a, (y·a) + b
    assert after(lambda y: nn.relu(y) * scale + 1) == 800
    # y has two readers, so that ReLU needs a buffer: y, relu(y), y + relu(y)
    assert after(lambda y: y + nn.relu(y)) == 1200
    assert after(lambda y: y + nn.relu(y), in_place=True) == 800


def test_operations_do_not_write_to_inputs_of_the_function():
    assert memory.peak(jnp.add, ones(100), ones(100), in_place=True).bytes == 300

    # The second sum may: a + b = c (300 with a, b); c + 1
    def run(a, b):
        return jnp.sin(a + b)

    assert memory.peak(run, ones(100), ones(100)).bytes == 300


def test_broadcasts_need_memory_where_all_elements_are_read():
    row, whole = ones(10), ones(20, 10)
    # 200 and 10 in, 200 out: the broadcast row is never written
    assert memory.peak(lambda x, r: x * r[None], whole, row).bytes == 410

    # 10 in, 200 out, or 200 broadcast and 200 out
    def repeated(r):
        return jnp.broadcast_to(r, (20, 10))

    assert memory.peak(repeated, row).bytes == 210
    assert memory.peak(lambda r: repeated(r) @ jnp.ones((10, 10)), row).bytes == 400


def test_a_softmax_needs_two_buffers_and_a_column():
    # scores 20x10, their maxima 20, the difference 20x10
    assert memory.peak(lambda x: nn.softmax(x), ones(20, 10)).bytes == 420


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding", "expected"),
    [
        # in 2 channels, out 3: in + out, or in + padded, or padded + out
        (8, 3, 1, 1, 128 + 192),  # "SAME" of strides 1
        (8, 3, 1, 0, 128 + 108),
        (8, 3, 2, "SAME", 128 + 48),  # (0, 1)
        (8, 3, 2, 1, 128 + 200),  # (1, 1): a copy of 10x10x2
        (7, 3, 2, 1, 98 + 48),  # of odd sizes, it is the same
        (8, 3, 1, 2, 288 + 300),  # 12x12x2, 10x10x3
    ],
)
def test_padding_that_tflite_has_not_is_a_copy(
    size, kernel, strides, padding, expected
):
    layer = Conv(3, (kernel, kernel), strides, padding=padding)
    assert memory.peak(layer, ones(1, size, size, 2)).bytes == expected


def test_loops_by_hand():
    w = jnp.ones((4, 4))

    def scanned(x):
        return lax.scan(lambda c, _: (c @ w, c.sum()), x, length=5)

    # c 16, c @ w 16, sum 1, all five sums 5; the x that began it is the first c
    assert memory.peak(scanned, ones(4, 4)).bytes == 16 + 16 + 1 + 5

    def both(x):
        return (x, scanned(x))

    assert memory.peak(both, ones(4, 4)).bytes == 16 + 38

    # all slices 80, one slice 16, carry 4, its sum 4; then all slices, carry, sum and new carry 4 are less
    def over(xs):
        return lax.scan(lambda c, x: (c + x.sum(0), None), jnp.zeros(4), xs)[0]

    assert memory.peak(over, ones(5, 4, 4)).bytes == 80 + 16 + 4 + 4

    def loop(x):
        return lax.fori_loop(0, 5, lambda _, c: c @ w, x)

    # c and c @ w; nothing needs the counter
    assert memory.peak(loop, ones(4, 4)).bytes == 32


def test_a_conditional_needs_its_largest_branch():
    wide = jnp.ones((4, 100))
    branches = [lambda x: x.sum(), lambda x: (x @ wide).sum()]

    def chosen(i, x):
        return lax.switch(i, branches, x)

    found = memory.peak(chosen, ones(dtype=jnp.int32), ones(4, 4))
    # x 16, x @ wide 400 and its sum 1, beside the clamped index, 4
    assert found.bytes == 16 + 400 + 1 + 4
    assert found.operation == "reduce_sum"


def test_devices_hold_parts():
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    # x 8x4, whole outside; of a device's 2x4 the transpose 8 and the product 2x2
    assert memory.peak(run, ones(8, 4)).bytes == 32 + 8 + 4


def test_calls_change_nothing():
    x = ones(1, 8, 8, 3)
    expected = memory.peak(Net(), x)
    assert memory.peak(nn.remat(Net)(name="Net"), x).bytes == expected.bytes
    variables = filled(Net(), x)
    logits = jax.jit(lambda x: jax.jit(Net().apply)(variables, x)[0])
    assert memory.peak(logits, x).bytes == expected.bytes
    assert memory.peak(logits, x).layer == "Net/narrow"


def test_inputs_alone_can_be_the_most():
    found = memory.peak(lambda x: x, ones(7))
    assert found[:4] == (7, "inputs", "", ((7,),))


@pytest.mark.parametrize("bits", [0, 65, True, 8.0, "8"])
def test_bits_out_of_range(bits):
    with pytest.raises(UserError, match=r"bits = .* should be an integer from 1 to 64"):
        memory.peak(jnp.sin, ones(4), bits=bits)


def test_what_xla_plans():
    found = memory.compiled(nn.Dense(5), ones(2, 3))
    # kernel 3x5 and bias 5; 2x3 in; 2x5 out; four bytes each
    assert found[:3] == (4 * 20, 4 * 6, 4 * 10)
    assert found.temporary >= 0


def buffers(flatbuffer: bytes) -> list[int]:
    """Bytes alive during each operator of a TFLite file, by its own order: an arena cannot be smaller than the largest.

    Read by the file's schema alone. Inputs live from the start, results to the end, constants are no activations; their
    data may lie behind the tables (`offset`).
    """
    model = schema.Model.GetRootAs(flatbuffer)
    graph = model.Subgraphs(0)
    wide = {schema.TensorType.INT8: 1, schema.TensorType.INT32: 4}

    def size(index):
        tensor = graph.Tensors(index)
        return int(np.prod(tensor.ShapeAsNumpy())) * wide[tensor.Type()]

    operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    made = dict.fromkeys(graph.InputsAsNumpy(), 0)
    made |= {t: i for i, o in enumerate(operators) for t in o.OutputsAsNumpy()}
    read = {t: i for i, o in enumerate(operators) for t in o.InputsAsNumpy()}
    read |= {t: len(operators) for t in graph.OutputsAsNumpy()}
    return [
        sum(size(t) for t in made if made[t] <= i <= read.get(t, made[t]))
        for i in range(len(operators))
    ]


SE = ("mobilenet_v3", "efficientnet")


def tiny(name):
    return lambda: models.make(name, variant="tiny", num_classes=10)


def digits():
    config = run.load_config(Path(run.__file__).parent / "configs" / "digits.py")
    return models.make(num_classes=10, **config["model"])


# The head of the arena (all but what lasts: structures, quantization) that TFLite Micro's recording allocator tells for
# these files, by tflite-micro 0.dev20261023182759; MobileNetV2's with its weights inside the tables, where it reads
# them. It refuses the padded pooling of the ResNet's, and leaves gaps in EfficientNet's: 43,776.
ARENA = {"squeezenet": 9_408, "mobilenet_v2": 27_840, "mobilenet_v3": 15_744}


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (digits, (16, 16, 1)),
        (
            lambda: models.make("mobilenet_v2", variant="0.35", num_classes=10),
            (32, 32, 3),
        ),
        *((tiny(name), (32, 32, 3)) for name in ("resnet", *SE)),
    ],
    ids=["squeezenet", "mobilenet_v2", "resnet", *SE],
)
def test_an_int8_file_allocates_as_much(net, shape, request):
    """Exactly: the peak is that of the file's own operators, and the planner leaves no gaps in these graphs."""
    net, key = net(), request.node.callspec.id
    pixels = np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(np.float32)
    variables = filled(net, pixels[:1])

    def live(x):
        with lowering("native"):
            return net.apply(variables, x["image"] / 127.5 - 1)[0]

    inputs = {"image": runnable.Spec(shape, np.dtype(np.float32))}
    (flatbuffer,) = tflite_int8.convert(live, inputs, pixels).values()
    alive = buffers(flatbuffer)
    found = memory.peak(net, ones(1, *shape))
    assert found.bytes == max(alive)
    if key in ARENA:
        assert found.bytes == ARENA[key]
    # Also below the peak: each convolution has what its operator has in the file.
    convolutions = macs(net, ones(1, *shape)).by_layer
    assert {found.by_layer[layer] for layer in convolutions} <= set(alive)
