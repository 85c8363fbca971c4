"""Supernets: spaces of networks, slices of weights, the gradients of a step, and extracted networks."""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import run as run_py
from squeeze_jax import models, stop, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _plugs, _settings, _workdir, evaluate, fit
from squeeze_jax.methods import METHODS, Own
from squeeze_jax.nas import (
    costs,
    once_for_all,
    pieces,
    sort_channels,
    space,
    subnetwork,
)
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.pieces import Runner
from squeeze_jax.nas.recalibrate import recalibrate
from squeeze_jax.train import log
from squeeze_jax.train import step as training_step
from squeeze_jax.train.state import State

OPTIONS = dict(name="ofa_mobilenet_v3", variant="tiny", num_classes=3, stem_strides=1)
OPTIONS |= dict(dropout=0.0)

# (parameters, MACs at 224, at 160, at 128 pixels), counted by PyTorch on the authors' networks.
PUBLISHED = {
    ("ofa_mobilenet_v3", "w1.0", "largest"): (7_664_760, 566.17, 291.32, 188.25),
    ("ofa_mobilenet_v3", "w1.0", (5, 4, 3)): (4_551_792, 250.75, 129.55, 84.10),
    ("ofa_mobilenet_v3", "w1.0", "smallest"): (3_410_792, 121.28, 63.24, 41.48),
    ("ofa_mobilenet_v3", "w1.2", "largest"): (10_701_632, 843.10, 433.56, 279.99),
    ("ofa_mobilenet_v3", "w1.2", "smallest"): (4_602_456, 193.08, 100.32, 65.54),
    ("ofa_proxyless", "w1.3", "largest"): (7_942_056, 1004.91, None, 329.25),
    ("ofa_proxyless", "w1.3", "smallest"): (3_718_832, 265.53, None, 87.82),
    ("ofa_resnet", "50", "largest"): (48_105_992, 7_491.64, None, 2_447.63),
    ("ofa_resnet", "50", "smallest"): (6_539_280, 962.19, None, 315.08),
}
# Matrices of the 7x7 kernels: 25 * 25 + 9 * 9 in each of 20 and 21 blocks.
MATRICES = {"ofa_mobilenet_v3": 20 * 706, "ofa_proxyless": 21 * 706, "ofa_resnet": 0}


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def family_of(options, size=8, channels=1, **keys):
    return Family(options, _plugs.plain(image(2, size, size, channels)), **keys)


def arch_of(family, which):
    if isinstance(which, tuple):
        return family.space.arch(dict(zip(family.space.choices, which, strict=True)))
    return getattr(family.space, which)()


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(map(str, row)))
def test_published_counts(row):
    name, variant, which = row
    family = family_of(dict(name=name, variant=variant), 224, 3)
    net = family.network(arch_of(family, which))
    parameters, *macs = PUBLISHED[row]
    shapes = family.shapes(net)
    assert tree.size(shapes["params"]) == parameters
    for size, millions in zip((224, 160, 128), macs, strict=True):
        if millions is not None:
            total = count.macs(net.apply, shapes, image(1, size, size, 3)).total
            assert round(total / 1e6, 2) == millions
    if which == "largest":
        matrices = subnetwork.identity_transforms(family.kernel_sizes())
        assert tree.size(matrices) == MATRICES[name]


def test_costs_of_random_networks_are_sums_over_their_pieces():
    """MACs of whole networks, which are counted one by one, and the number of networks by hand.

    A stage of d blocks has (3 * 3)**d networks, for d of 2, 3 or 4, and there are five stages.
    """
    family = family_of(dict(name="ofa_mobilenet_v3", variant="w1.0"), 224, 3)
    pieces = costs.Pieces(family, image(1, 224, 224, 3))
    table = jax.jit(jax.vmap(pieces.tabulate(costs.macs)))
    whole = family.space
    keys = jax.random.split(jax.random.key(0), 3)
    archs = [whole.largest(), whole.smallest(), *(space.sample(whole, k) for k in keys)]
    totals = table(jax.tree.map(lambda *rows: np.stack(rows), *archs))
    for arch, total in zip(jax.device_get(archs), totals, strict=True):
        net = family.network(arch)
        counted = count.macs(net.apply, family.shapes(net), image(1, 224, 224, 3))
        assert total == pytest.approx(counted.total, rel=1e-6)
    # Per stage 3 * 3 choices of the first block and of the others, which have equal inputs; and four other pieces.
    assert len(pieces.distinct) == 5 * 2 * 9 + 4
    assert pieces.number_of_networks() == (9**2 + 9**3 + 9**4) ** 5


def test_costs_of_networks_whose_stages_have_several_widths():
    """Two stages of one or two blocks with 2 expansions have 2 + 4 networks each. There is a block in the stem, and 3 widths:
    the middle of the stem has 8 channels at both of its own."""
    family = family_of(dict(name="ofa_resnet", variant="tiny", num_classes=3), 16)
    pieces = costs.Pieces(family, image(1, 16, 16, 1))
    assert pieces.number_of_networks() == (2 + 4) ** 2 * 2**3 * 2
    table = pieces.tabulate(costs.macs)
    for key in jax.random.split(jax.random.key(0), 4):
        arch = jax.device_get(space.sample(family.space, key))
        net = family.network(arch)
        counted = count.macs(net.apply, family.shapes(net), image(1, 16, 16, 1))
        assert table(arch) == counted.total


def test_a_smaller_resnet_is_sorted_and_extracted():
    """Sorting leaves the function as it is, and the extracted network has the shapes of its options."""
    options = dict(name="ofa_resnet", variant="tiny", num_classes=3)
    family = family_of(options, 8)
    rng = np.random.default_rng(0)

    def noise(name, a):
        array = rng.uniform(-0.5, 0.5, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    variables = tree.map_named(noise, family.shapes(family.holder()))
    state = State(np.int32(0), variables["params"], variables["batch_stats"], {})
    plain = _plugs.plain(image(2, 8, 8, 1))
    _, after = sort_channels.make().apply(options, state, plain)
    first = after.params["stage1_block1"]["conv1_norm"]["scale"]
    second = after.params["stage1_block1"]["conv2_norm"]["scale"]
    before = variables["params"]["stage1_block1"]
    order = np.argsort(-np.abs(before["conv2"]["kernel"]).sum((0, 1, 3)))
    np.testing.assert_array_equal(first, before["conv1_norm"]["scale"][order])
    order = np.argsort(-np.abs(before["conv3"]["kernel"]).sum((0, 1, 3)))
    np.testing.assert_array_equal(second, before["conv2_norm"]["scale"][order])
    arch = family.space.arch({"stage_width": (0.5, 1.0, 0.5, 1.0), "depth": (1, 0)})
    small_options, small = family.extract(arch, variables)
    assert tree.differences(family.shapes(models.make(**small_options)), small) == []


@functools.cache
def filled():
    """(family, variables of noise, matrices of noise, images [2, 8, 8, 1])."""
    family = family_of(OPTIONS)
    rng = np.random.default_rng(0)

    def noise(name, a):
        array = rng.uniform(-0.5, 0.5, a.shape).astype(np.float32)
        return array + name.endswith(("/var", "/scale"))

    variables = tree.map_named(noise, family.shapes(family.holder()))
    matrices = subnetwork.identity_transforms(family.kernel_sizes())
    matrices = tree.map_named(lambda n, m: m + 0.1 * noise(n, m), matrices)
    return family, variables, matrices, noise("", np.zeros((2, 8, 8, 1)))


def test_a_smaller_kernel_is_the_changed_centre():
    """Kernel 1 ... 25 of one channel: the centre is 7, 8, 9, 12, 13, 14, 17, 18, 19. Matrix: all ones in the first row."""
    kernel = jnp.arange(1.0, 26).reshape(5, 5, 1, 1)
    centre = subnetwork.resize_kernel("k", kernel, (3, 3), {})
    np.testing.assert_array_equal(
        centre[..., 0, 0], [[7, 8, 9], [12, 13, 14], [17, 18, 19]]
    )
    matrix = np.zeros((9, 9), np.float32)
    matrix[0], matrix[1, 8] = 1, 2
    changed = subnetwork.resize_kernel("k", kernel, (3, 3), {"5to3": matrix})
    np.testing.assert_array_equal(
        changed[..., 0, 0], [[117, 38, 0], [0, 0, 0], [0, 0, 0]]
    )


def test_kernels_pass_through_all_sizes():
    """From 7 to 3 by way of 5: the 5x5 kernel is doubled, then the 3x3 kernel tripled."""
    kernel = jnp.arange(49.0).reshape(7, 7, 1, 1)
    matrices = {"7to5": 2 * np.eye(25), "5to3": 3 * np.eye(9)}
    small = subnetwork.resize_kernel("k", kernel, (3, 3), matrices)
    np.testing.assert_array_equal(small, 6 * kernel[2:5, 2:5])
    middle = subnetwork.resize_kernel("k", kernel, (5, 5), matrices)
    np.testing.assert_array_equal(middle, 2 * kernel[1:6, 1:6])


def test_a_smaller_network_has_the_first_channels_and_blocks():
    family, variables, _, _ = filled()
    arch = family.space.arch({"expand": 2, "kernel": 3, "depth": 1})
    options, small = family.extract(arch, variables)
    assert options["depth"] == (1, 1)
    net = models.make(**options)
    assert tree.differences(family.shapes(net), small) == []
    assert "stage1_block2" not in small["params"]
    large, block = (v["params"]["stage2_block1"] for v in (variables, small))
    np.testing.assert_array_equal(
        block["expand"]["kernel"], large["expand"]["kernel"][..., :32]
    )
    np.testing.assert_array_equal(
        block["depthwise"]["kernel"], large["depthwise"]["kernel"][1:4, 1:4, :, :32]
    )
    np.testing.assert_array_equal(
        block["squeeze_excite"]["reduce"]["kernel"],
        large["squeeze_excite"]["reduce"]["kernel"][:, :, :32, :8],
    )


@functools.cache
def method_and_passes(rule, **keys):
    """(bound method, the passes of a training step)."""
    family, _, _, x = filled()
    method = once_for_all.make(rule, **keys)
    bound = method.bind(OPTIONS, _plugs.plain(image(*x.shape)))
    caught = []

    def catch(passes, params, stats, batch, own):
        caught.append(passes)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, stats, {"loss": jnp.float32(0)}

    spy = bound._replace(compute=catch, init=None, state=None)

    def loss(logits, endpoints, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each.mean(), {}

    named = training_step.Named("once_for_all", spy)
    run = training_step.make(family.holder(), optax.sgd(0.1), loss, gradients=named)
    batch = dict(image=x, label=np.array([0, 2]))
    run(run.init(jax.random.key(0), batch), batch, jax.random.key(0))
    return bound, caught[0]


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("sandwich", dict(random=1, temperature=2.0)),
        ("random", dict(random=2, labels=0.7, distill=0.3, teacher="fixed")),
    ],
    ids=["sandwich", "random"],
)
def test_the_gradient_is_the_sum_over_the_networks(rule, keys):
    """By `jax.grad` through the extracted networks, which are built and run whole."""
    family, variables, matrices, x = filled()
    bound, passes = method_and_passes(rule, **keys)
    params = variables["params"] | {METHODS: {"once_for_all": matrices}}
    stats = {"batch_stats": variables["batch_stats"], "extra": {}, "step": jnp.int32(0)}
    key, labels = jax.random.key(5), np.array([0, 2])
    batch = dict(image=x, label=labels, mask=np.ones(2, bool))
    is_fixed = keys.get("teacher") == "fixed"
    teacher = jax.tree.map(lambda a: 1.1 * a, variables["params"])
    state = bound.state(teacher) if is_fixed else None
    own = Own(matrices, state, key, jnp.int32(0), True)
    grads, after, metrics, *kept = bound.compute(passes, params, stats, batch, own)
    chex.assert_trees_all_equal(kept, [teacher] if is_fixed else [])
    teacher = teacher | {METHODS: {"once_for_all": matrices}} if is_fixed else params
    temperature = keys.get("temperature", 1.0)
    keys_ = jax.random.split(jax.random.fold_in(key, 1), keys["random"])
    drawn = [space.sample(family.space, k) for k in keys_]

    def logits(params, arch):
        plain = {k: v for k, v in params.items() if k != METHODS}
        large = variables | {"params": plain}
        options, small = family.extract(arch, large, params[METHODS]["once_for_all"])
        apply = functools.partial(models.make(**options).apply, train=True)
        return apply(small, x, mutable=["batch_stats"])[0][0]

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def by_hand(params, soft):
        def distilled(arch):
            log_q = jax.nn.log_softmax(logits(params, arch) / temperature)
            return temperature**2 * -jnp.sum(soft * log_q, -1).mean()

        if rule == "sandwich":
            total = cross_entropy(logits(params, family.space.largest()))
            return total + sum(map(distilled, (family.space.smallest(), *drawn)))
        of_labels = (cross_entropy(logits(params, arch)) for arch in drawn)
        return 0.7 * sum(of_labels) + 0.3 * sum(map(distilled, drawn))

    soft = jax.nn.softmax(logits(teacher, family.space.largest()) / temperature)
    expected = tree.flatten(jax.jit(jax.grad(by_hand))(params, soft))
    assert tree.differences(params, grads) == []
    for name, value in tree.flatten(grads).items():
        np.testing.assert_allclose(
            value, expected[name], rtol=2e-3, atol=1e-4, err_msg=name
        )
    moved = {k for k, v in tree.flatten(grads).items() if np.any(v != 0)}
    assert any(k.endswith("5to3") for k in moved)
    # Only the largest network moves the statistics, which are its own.
    assert tree.differences(stats["batch_stats"], after["batch_stats"]) == []
    for name, value in tree.flatten(after["batch_stats"]).items():
        assert np.any(value != tree.flatten(stats["batch_stats"])[name]), name
    losses = {"smallest", "random"} if rule == "sandwich" else {"random"}
    assert set(metrics) == {"loss"} | losses


def test_equal_pieces_are_compiled_once():
    """Over many random networks, there is one program per block, kernel and expansion, and not one per network."""
    family, variables, _, x = filled()
    _, passes = method_and_passes("random", random=2)
    stats = {"batch_stats": variables["batch_stats"], "extra": {}, "step": jnp.int32(0)}
    runner, sizes = Runner(passes), []
    for key in jax.random.split(jax.random.key(0), 80):
        pieces = family.network(space.sample(family.space, key)).pieces
        runner.run(pieces, variables["params"], stats, {}, x, key, differentiate=False)
        sizes.append(runner._forward.__wrapped__._cache_size())
    # The 2nd block of a stage differs from its first. Each has 2 * 2 choices; stem, first block, head and classifier have none.
    assert sizes[-1] == 4 * 4 + 4
    assert sizes[-1] == sizes[-8]


def trained_state():
    """A state whose momentum and average are ten and a hundred times the weights."""
    _, variables, *_ = filled()
    params, stats = variables["params"], variables["batch_stats"]
    momentum = jax.tree.map(lambda w: 10 * w, params)
    average = {"params": jax.tree.map(lambda w: 100 * w, params), "stats": stats}
    return State(np.int32(0), params, stats, {"trace": momentum}, average)


def test_sorted_channels_compute_the_same_in_the_order_of_importance():
    """Importance by hand: the sums of the absolute weights of project, and of the first layer of the excitation."""
    family, variables, _, x = filled()
    state, plain = trained_state(), _plugs.plain(image(*x.shape))
    options, after = sort_channels.make().apply(OPTIONS, state, plain)
    assert options == OPTIONS
    net = family.holder()
    logits = [
        net.apply({"params": s.params, "batch_stats": s.stats}, x)[0]
        for s in (state, after)
    ]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    block = variables["params"]["stage2_block1"]
    squeezed = np.abs(block["squeeze_excite"]["reduce"]["kernel"]).sum((0, 1, 3))
    importance = np.abs(block["project"]["kernel"]).sum((0, 1, 3)) + squeezed
    order = np.argsort(-importance)
    for name, axis in {
        "expand/kernel": 3,
        "expand_norm/scale": 0,
        "depthwise/kernel": 3,
        "depthwise_norm/bias": 0,
        "squeeze_excite/expand/bias": 0,
        "project/kernel": 2,
    }.items():
        before = tree.flatten(block)[name]
        for scale, params in (
            (1, after.params),
            (10, after.opt["trace"]),
            (100, after.ema["params"]),
        ):
            np.testing.assert_allclose(
                tree.flatten(params["stage2_block1"])[name],
                scale * np.take(before, order, axis),
                rtol=1e-6,
            )
    mean = after.stats["stage2_block1"]["expand_norm"]["mean"]
    before = state.stats["stage2_block1"]["expand_norm"]["mean"]
    np.testing.assert_array_equal(mean, before[order])
    inner = np.abs(block["squeeze_excite"]["expand"]["kernel"]).sum((0, 1, 3))
    np.testing.assert_array_equal(
        after.params["stage2_block1"]["squeeze_excite"]["reduce"]["bias"],
        block["squeeze_excite"]["reduce"]["bias"][np.argsort(-inner)],
    )


def test_channels_of_a_trained_width_stay_first():
    """The 32 channels of expansion 2 are sorted among themselves, and the 16 others behind them."""
    _, variables, _, x = filled()
    plain = _plugs.plain(image(*x.shape))
    make = sort_channels.make(first={"expand": 2})
    _, after = make.apply(OPTIONS, trained_state(), plain)
    before = variables["params"]["stage1_block2"]["depthwise_norm"]["scale"]
    scale = after.params["stage1_block2"]["depthwise_norm"]["scale"]
    assert len(scale) == 48
    assert set(scale[:32].tolist()) == set(before[:32].tolist())
    assert not np.array_equal(scale[:32], before[:32])


def test_recalibrated_statistics_are_those_of_all_examples():
    """Of 1, 2, 3 and 7 in two batches: mean 3.25, mean of squares 15.75, variance 15.75 - 3.25**2 = 5.1875."""
    batches = np.array([[1.0, 2.0], [3.0, 7.0]])

    def of_batch(batch):
        return {"block": {"norm": {"mean": jnp.mean(batch)[None], "var": jnp.var(batch)[None]}}}  # fmt: skip

    stats = recalibrate(of_batch, batches)["block"]["norm"]
    np.testing.assert_allclose(stats["mean"], [3.25])
    np.testing.assert_allclose(stats["var"], [5.1875], rtol=1e-6)


def test_an_extracted_network_is_a_work_directory(tmp_path, capsys, monkeypatch):
    """Its logits are those of the active network, it is evaluated with its own statistics, and its training goes on."""
    rng, identity = np.random.default_rng(0), subnetwork.identity_transforms

    def noisy(sizes):  # two steps would hardly change the matrices
        return jax.tree.map(lambda a: a + rng.uniform(-0.1, 0.1, a.shape).astype(a.dtype), identity(sizes))  # fmt: skip

    monkeypatch.setattr(subnetwork, "identity_transforms", noisy)
    config = dict(
        steps=2,
        batch=8,
        data=dict(source=dict(name="digits"), size=8, crop="pad", pad=1),
        model={k: v for k, v in OPTIONS.items() if k != "num_classes"},
        gradients=dict(name="nas.once_for_all", random=1),
        optim=dict(lr=0.1, warmup=0),
        eval_every=0,
        extract=dict(to=str(tmp_path / "small"), arch={"kernel": 3}, examples=16),
    )
    built = _experiment.build(_experiment.check(config))
    _workdir.begin(tmp_path / "large", built.whole.config())
    monkeypatch.setattr(pieces, "SHOWN_EVERY", -1)
    fit.run(built, tmp_path / "large")
    assert "compiled   3 pieces, " in capsys.readouterr().out

    def stopped(state):
        raise stop.Stopped(15)

    # The line of `Stopped` promises that the same command goes on.
    make_evaluator = fit.make_evaluator
    monkeypatch.setattr(fit, "make_evaluator", lambda built: stopped)
    with pytest.raises(stop.Stopped):
        run_py.main(["--job=extract", f"--workdir={tmp_path / 'large'}"])
    monkeypatch.setattr(fit, "make_evaluator", make_evaluator)
    run_py.main(["--job=extract", f"--workdir={tmp_path / 'large'}"])
    assert "kernel 3 3 3 3" in capsys.readouterr().out
    small = _experiment.build_trained(
        tmp_path / "small", _workdir.read(tmp_path / "small")
    )
    state = evaluate.trained_state(small, tmp_path / "small")
    large = evaluate.trained_state(built, tmp_path / "large")
    family = family_of(OPTIONS | dict(num_classes=10))
    matrices = large.params[METHODS]["once_for_all"]
    _, active = family.extract(
        family.space.arch({"kernel": 3}), large.plain(), matrices
    )
    _, cropped = family.extract(family.space.arch({"kernel": 3}), large.plain())
    kernels = [v["stage1_block1"]["depthwise"]["kernel"] for v in (active["params"], cropped["params"])]  # fmt: skip
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3  # the matrices count
    assert tree.differences(active["params"], state.params) == []
    for name, array in tree.flatten(active["params"]).items():
        found = tree.flatten(state.params)[name]
        np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-6, err_msg=name)
    stats = tree.flatten(active["batch_stats"])
    assert any(np.any(a != stats[n]) for n, a in tree.flatten(state.stats).items())
    with pytest.raises(UserError, match="holds a run already"):
        run_py.main(["--job=extract", f"--workdir={tmp_path / 'large'}"])
    assert "largest network alone" not in capsys.readouterr().out
    restricted = built.whole.config() | dict(gradients=config["gradients"] | dict(choices={"kernel": (5,)}))  # fmt: skip
    restricted["extract"] = config["extract"] | dict(to=str(tmp_path / "other"))
    shutil.copytree(tmp_path / "large", tmp_path / "restricted")
    (tmp_path / "restricted" / "config.json").write_text(json.dumps(restricted))
    with pytest.raises(UserError, match="kernel = 3 is not in the space: choose one of 5"):  # fmt: skip
        run_py.main(["--job=extract", f"--workdir={tmp_path / 'restricted'}"])
    run_py.main(["--job=fit", f"--workdir={tmp_path / 'small'}"])
    assert "step 2/2 · test accuracy" in capsys.readouterr().out


def test_samples_mutations_and_crossovers_stay_in_the_space():
    family, *_ = filled()
    whole = family.space
    keys = jax.random.split(jax.random.key(0), 200)
    archs = jax.vmap(functools.partial(space.sample, whole))(keys)
    for field, sizes in zip(archs, whole.sizes, strict=True):
        for place, size in enumerate(sizes):
            assert set(np.asarray(field)[:, place].tolist()) == set(range(size))
    smallest, largest = (
        jax.tree.map(lambda a: np.broadcast_to(a, (200, *a.shape)), arch)
        for arch in (whole.smallest(), whole.largest())
    )
    mutated = jax.vmap(functools.partial(space.mutate, whole, rate=0.0))(keys, largest)
    jax.tree.map(np.testing.assert_array_equal, mutated, largest)
    mutated = jax.vmap(functools.partial(space.mutate, whole, rate=0.5))(keys, largest)
    changed = np.concatenate([np.asarray(f) != n for f, n in zip(mutated, largest, strict=True)], 1)  # fmt: skip
    assert 0.2 < changed.mean() < 0.3  # half are drawn anew, half of these differ
    mixed = jax.vmap(functools.partial(space.crossover, whole))(keys, smallest, largest)
    ones = np.concatenate([np.asarray(f) for f in mixed], 1)
    assert set(np.unique(ones)) == {0, 1}
    assert 0.4 < ones.mean() < 0.6
    hot = space.one_hot(whole, whole.largest())
    assert hot.shape == (2 * 10,)
    assert hot.sum() == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.make(**OPTIONS, kernel=9), r"kernel = 9 .* one of 3, 5"),
        (lambda: models.make(**OPTIONS, depth=(1,)), r"depth has 1 values: .* or 2"),
        (lambda: family_of(OPTIONS, choices={"kernal": (3,)}), "kernal .* 'kernel'"),
        (lambda: family_of(OPTIONS, choices={"kernel": (4,)}), "kernel = 4 .* 3, 5"),
        (lambda: family_of(OPTIONS, choices={"kernel": 4}), "kernel = 4 .* 3, 5"),
        (
            lambda: family_of(OPTIONS, choices={"kernel": ()}),
            "kernel allows no value: choose among 3, 5",
        ),
        (lambda: family_of(OPTIONS | dict(kernel=3)), r"kernel\[0\] = 3 .* but 5"),
        (lambda: family_of(dict(name="squeezenet")), "'squeezenet' has no elastic"),
        (lambda: once_for_all.make("random", random=0), "trains no network"),
        (lambda: once_for_all.make(distill=0.0), "without a loss"),
        (lambda: filled()[0].space.arch({"depth": 3}), r"depth = 3 .* 1, 2"),
        (lambda: filled()[0].space.arch({"depth": True}), r"depth = True is not in"),
        (lambda: filled()[0].space.arch({"depth": (1, None)}), r"depth\[1\] = None"),
        (lambda: filled()[0].space.arch({"deph": 1}), "deph .* did you mean 'depth'"),
        (lambda: recalibrate(None, []), "there is no batch"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_the_published_phases_of_progressive_shrinking(tmp_path):
    """configs/ofa_progressive_cifar10.py: 590 epochs in all; a phase of each kind trains the space of the digits."""
    path = "configs/ofa_progressive_cifar10.py"
    config = _settings.with_tuples(run_py.load_config(f"{path}:0.1"))
    steps = [phase["steps"] for phase in config["phases"]]
    assert sum(steps) == pytest.approx(0.1 * 590 * (45_000 // 128), abs=3)
    config["phases"] = tuple(config["phases"][n] for n in (0, 1, 3, 5))
    smaller = {"expand": {2: 2, 4: 2, 6: 3}, "depth": {1: 1, 2: 1, 3: 2}}
    for phase in config["phases"]:
        phase["steps"] = 1
        choices = phase.get("gradients", {}).get("choices", {})
        for name, values in choices.items():
            choices[name] = tuple(sorted({smaller[name][v] for v in values}))
        if "first" in phase.get("begin", {}):
            phase["begin"]["first"] = {"expand": 2}
    config["model"]["variant"] = "tiny"
    config |= dict(batch=4, data=dict(source=dict(name="digits"), size=8), eval_every=0)
    config["optim"] |= dict(warmup=0)
    built = _experiment.build(_experiment.check(config))
    fit.run(built, tmp_path)
    losses = [r for r in log.read(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["phase"] for r in losses] == [f"phase {n}/4" for n in range(1, 5)]
    assert all(np.isfinite(r["loss"]) for r in losses)
    assert ["random" in r for r in losses] == [False] + 3 * [True]
