"""The contract of all methods: a method file without a row here fails.

A method that trains in the step has a row in `CONFIGS`: the keys of a config that uses it. A loss of a network's outputs
has a row in `LOSSES`: the outputs and the batch that it reads.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import methods, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _objective, _plan, _plugs
from squeeze_jax.train import sharding, step

pytestmark = pytest.mark.usefixtures("four_devices")

BATCH = 8
BASE = dict(
    steps=4,
    batch=BATCH,
    ema=0.9,
    data=dict(source=dict(name="digits"), size=8, crop="pad", pad=1),
    model=dict(name="squeezenet", variant="tiny", norm=True, stem_strides=1),
    optim=dict(lr=0.1),
)

# {"package.file": keys of a config}; the config's other keys are those of BASE.
CONFIGS = {
    "comm.int8": dict(
        exchange=dict(name="comm.int8", rounding="stochastic", block=16, smallest=32)
    ),
    "comm.mean": dict(exchange=dict(name="comm.mean", dtype="bfloat16")),
    "nas.once_for_all": dict(
        model=dict(name="ofa_mobilenet_v3", variant="tiny", stem_strides=1),
        gradients=dict(name="nas.once_for_all", random=1),
    ),
    "nas.sandwich": dict(
        model=dict(name="slimmable", variant="tiny", switches=(0.5, 1.0)),
        gradients=dict(name="nas.sandwich", widths=(0.5, 1.0), random=0),
    ),
    "prune.group_lasso": dict(
        objective=(
            dict(name="losses.cross_entropy"),
            dict(name="prune.group_lasso", weight=1e-3),
        )
    ),
    "prune.magnitude": dict(
        update=(
            "optim",
            dict(name="prune.magnitude", sparsity=0.5, begin=0, end=2, every=1),
        )
    ),
    "quantize.lsq": dict(forward=(dict(name="quantize.lsq", start=1, observe=1),)),
}

SUPERNET = CONFIGS["nas.once_for_all"]["model"]

# {"package.file": (arguments of its `make`, keys of a config)}: what stands between two phases.
TRANSITIONS = {
    "nas.sort_channels": ({}, dict(model=SUPERNET)),
    "prune.narrow": (dict(layers=("fire2/squeeze1x1",)), {}),
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of a loss: shapes of logits, of endpoints (the teacher has the same), and the arguments of its `make`.

    `flags` is for labels that are 0 or 1 for each class.
    """

    logits: object
    endpoints: dict = dataclasses.field(default_factory=dict)
    arguments: dict = dataclasses.field(default_factory=dict)
    flags: bool = False


LENGTH, TOKENS = 6, 11
CLASSES = (BATCH, 5)
VOCABULARY = (BATCH, LENGTH, TOKENS)
HIDDEN = {"layer1": (BATCH, LENGTH, 4)}
IMAGE = {"stage": (BATCH, 4, 4, 3)}
PAIR = dict(layers=(("stage", "stage"),))
EVERY = (BATCH, LENGTH)

LOSSES = {
    "distill.attention": Loss(CLASSES, {"scores1": (BATCH, 2, LENGTH, LENGTH)}),
    "distill.attention_transfer": Loss(CLASSES, IMAGE, PAIR),
    "distill.cosine": Loss(CLASSES, HIDDEN),
    "distill.feature_map": Loss(CLASSES, IMAGE, PAIR | dict(project=True)),
    "distill.hidden": Loss(CLASSES, HIDDEN, dict(project=True)),
    "distill.soft_logits": Loss(CLASSES),
    "losses.binary_cross_entropy": Loss(CLASSES, flags=True),
    "losses.causal_lm": Loss(VOCABULARY),
    "losses.cross_entropy": Loss(CLASSES),
    "losses.masked_lm": Loss(VOCABULARY),
    "losses.next_token": Loss(VOCABULARY),
    "losses.pretraining_loss": Loss(
        {"masked_lm": VOCABULARY, "next_sentence": (BATCH, 2)}
    ),
    "losses.replaced": Loss(
        {"masked_lm": VOCABULARY, "replaced": EVERY}, {"is_replaced": EVERY}
    ),
    "losses.span": Loss({"start": EVERY, "end": EVERY}),
    "losses.squared_error": Loss((BATCH, 1)),
}

PLUGS = ("update", "forward", "objective", "gradients", "exchange")


def method_files():
    """The names of all files with a method, such as "prune.magnitude"."""
    return [
        f"{short}.{name}"
        for short, package in _plugs.PACKAGES.items()
        for name in registry.names(package)
        if hasattr(registry.load(package, name), "make")
    ]


def test_every_method_has_one_row():
    assert sorted(method_files()) == sorted([*CONFIGS, *LOSSES, *TRANSITIONS])


@pytest.fixture(scope="module", params=CONFIGS)
def built(request):
    """The experiment of a row, on the devices of this process; its parameters are sharded unless it exchanges."""
    row = CONFIGS[request.param]
    layout = dict(data=4) if "exchange" in row else dict(data=2, fsdp=2)
    config = BASE | row | dict(sharding=layout)
    return _experiment.build(_experiment.check(config))


class Traced:
    """The jitted step of an experiment, and how often it was traced."""

    def __init__(self, built):
        pieces = step.parts(
            built.network,
            built.plugs.update,
            built.objective.terms,
            prepare=built.data.augment,
            inputs=built.data.inputs,
            gradients=built.plugs.gradients,
            exchange=built.plugs.exchange,
            mesh=built.mesh,
            ema=built.experiment.ema,
        )
        self.fused, self.traces = pieces.fused, 0
        placed = jax.tree.map(lambda x: x.sharding, built.abstract())
        one = sharding.replicated(built.mesh)
        shardings = dict(out_shardings=(placed, one))
        self._step = step.compose(pieces, **shardings)
        if self.fused:
            self._step = jax.jit(self._counted(self._step), **shardings)

    def _counted(self, fn):
        def counted(*arguments):
            self.traces += 1
            return fn(*arguments)

        return counted

    def __call__(self, *arguments):
        return self._step(*arguments)


@pytest.fixture(scope="module")
def trained(built):
    """The experiment, its traced step, a batch, the initial state, and the states after each of three steps."""
    rng = np.random.default_rng(0)
    specs = built.data.specs(BATCH)[-1]
    zeros = {k: np.zeros(s.shape, s.dtype) for k, s in specs.items()}
    image = rng.integers(0, 256, specs["image"].shape).astype(specs["image"].dtype)
    rows = zeros | {"image": image, "label": np.arange(BATCH, dtype=np.int32)}
    rows |= {"mask": np.ones(BATCH, bool), "index": np.arange(BATCH, dtype=np.int32)}
    batch = sharding.put_batch(rows, built.mesh)
    run, states = Traced(built), [built.create()]
    for _ in range(3):
        states.append(run(states[-1], batch, jax.random.key(1))[0])
    return built, run, batch, states


def kinds(values):
    return {k: (x.shape, x.dtype) for k, x in tree.flatten(values).items()}


def test_its_initial_state_has_the_shapes_that_were_planned(trained):
    """Under `jit` and `eval_shape` alike, and made of what checkpoints hold."""
    built, _, _, states = trained
    assert kinds(states[0]) == kinds(built.abstract())
    _plugs.check_state(states[0].extra)


def test_a_step_keeps_structure_shapes_and_shardings(trained):
    built, _, _, states = trained
    for state in states[1:]:
        assert jax.tree.structure(state) == jax.tree.structure(built.abstract())
        assert kinds(state) == kinds(built.abstract())
        for x, planned in zip(
            jax.tree.leaves(state), jax.tree.leaves(built.abstract()), strict=True
        ):
            assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)


def test_steps_share_one_trace(trained):
    """The step number and the key are traced, and nothing that a step returns forces another trace."""
    _, run, _, _ = trained
    assert run.traces == (1 if run.fused else 0)


def test_the_same_key_gives_the_same_bits(trained):
    _, run, batch, states = trained
    again, _ = run(states[0], batch, jax.random.key(1))
    chex.assert_trees_all_equal(*jax.device_get((again, states[1])))


def test_it_trains_finite_weights(trained):
    _, _, _, states = trained
    first, last = jax.device_get((states[0].params, states[-1].params))
    chex.assert_tree_all_finite(last)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, last)
    kernels = {k: v for k, v in tree.flatten(moved).items() if k.endswith("kernel")}
    assert all(kernels.values()), kernels


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_is_pure(name):
    """The same state gives the same options and arrays, which fit the network of these options; nothing is changed."""
    arguments, keys = TRANSITIONS[name]
    built = _experiment.build(_experiment.check(BASE | keys))
    transition = methods.transition(
        _plugs.make_method(dict(name=name) | arguments, "begin")
    )
    plain = _plugs.plain(built.data.example())
    state = jax.device_get(built.create())
    before = jax.tree.map(np.copy, state)
    first, second = (
        transition.apply(dict(built.options), state, plain) for _ in range(2)
    )
    chex.assert_trees_all_equal(state, before)
    assert first[0] == second[0]
    changed = (
        tree.flatten(jax.tree.map(np.array_equal, first[1], state))
        if first[0] == built.options
        else {}
    )
    assert first[0] != built.options or not all(changed.values())
    chex.assert_trees_all_equal(first[1], second[1])
    after = _experiment.build(built.whole, 0, first[0])
    assert kinds(after.abstract()) == kinds(first[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_fits_its_plug_point_alone(name):
    """Every other key of a config refuses it; plain functions are told apart by their arguments alone."""
    fitting, section = section_of(name)
    value = _plugs.make_method(section, fitting)
    assert getattr(methods, fitting)(value, fitting)
    for plug in PLUGS:
        if plug != fitting and not callable(value):
            with pytest.raises(
                UserError, match=f"config.{plug} makes no .* belongs to"
            ):
                getattr(methods, plug)(value, f"config.{plug}")


def section_of(name):
    """The key of a config under which a row names its method, and the method's section."""
    for plug, sections in CONFIGS[name].items():
        for section in (sections,) if isinstance(sections, dict) else sections:
            if isinstance(section, dict) and section.get("name") == name:
                return plug, {k: v for k, v in section.items() if k != "weight"}
    raise AssertionError(f"the row of {name} does not use it")


def arrays(shapes, key):
    """Random float32 arrays of these shapes."""
    names = list(shapes)
    keys = jax.random.split(key, len(names))
    return {
        n: jax.random.normal(k, shapes[n]) for n, k in zip(names, keys, strict=True)
    }


def inputs_of(row):
    """(logits, endpoints, batch) of a loss, with everything that any of them reads."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = row.logits if isinstance(row.logits, dict) else {"logits": row.logits}
    ours = arrays(heads, keys[0])
    logits = ours if isinstance(row.logits, dict) else ours["logits"]
    endpoints = arrays(row.endpoints, keys[1])
    teacher = arrays(row.endpoints | heads, keys[2])
    tokens = jax.random.randint(keys[3], EVERY, 0, TOKENS)
    batch = {
        "mask": jnp.arange(BATCH) > 0,
        "fresh": jnp.zeros(BATCH, bool),
        "label": jnp.arange(BATCH) % 2,
        "tokens": tokens,
        "targets": tokens,
        "chosen": tokens % 2,
        "attended": jnp.ones(EVERY, jnp.int32),
        "start": jnp.zeros(BATCH, jnp.int32),
        "end": jnp.ones(BATCH, jnp.int32),
        "teacher": (teacher,),
    }
    return logits, endpoints, batch


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_scalar_with_scalar_metrics(name):
    """Finite, float32, the same under jit for the same key, with finite gradients that are not all zero."""
    row = LOSSES[name]
    logits, endpoints, batch = inputs_of(row)
    if row.flags:
        batch["label"] = jax.nn.one_hot(batch["label"], CLASSES[-1])
    section = dict(name=name) | row.arguments
    outputs = {"logits": logits, **endpoints}
    bound = _objective.make_losses(section, _plugs.make_method)
    teachers = batch["teacher"] if _objective.needs_teacher(bound) else ()
    (term,) = _objective.bind_losses(bound, outputs, teachers).terms
    init = term.objective.init or (lambda key, params: {})
    params = jax.jit(init)(jax.random.key(2), {})
    assert kinds(params) == kinds(jax.eval_shape(init, jax.random.key(2), {}))

    def loss(logits, endpoints, own_params, step):
        own = methods.Own(own_params, None, jax.random.key(3), step, True)
        value, metrics, *state = term.objective.loss(logits, endpoints, batch, {}, own)
        assert not state
        return value, metrics

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (value, metrics), grads = compiled(logits, endpoints, params, jnp.int32(0))
    assert value.dtype == jnp.float32
    for scalar in (value, *metrics.values()):
        assert scalar.shape == ()
        assert np.isfinite(scalar)
    chex.assert_tree_all_finite(grads)
    assert any(np.any(g != 0) for g in jax.tree.leaves(grads))
    again = compiled(logits, endpoints, params, jnp.int32(1))
    chex.assert_trees_all_equal(((value, metrics), grads), again)


@pytest.mark.parametrize(
    ("section", "end"),
    [
        (CONFIGS["prune.magnitude"], "config.update at step 2"),
        (CONFIGS["quantize.lsq"], "lsq at step 1"),
    ],
    ids=["update", "forward"],
)
def test_a_run_that_ends_before_a_schedule_says_so(section, end, tmp_path):
    built = [
        _experiment.build(_experiment.check(BASE | section | {"steps": steps}))
        for steps in (1, 3)
    ]
    short, long = (_plan.plan(each, tmp_path) for each in built)
    assert f"before schedules of methods take full effect: {end}" in short
    assert "warning" not in long


def test_the_plan_shows_the_weights_of_losses(tmp_path):
    section = CONFIGS["prune.group_lasso"]
    built = _experiment.build(_experiment.check(BASE | section))
    plan = _plan.plan(built, tmp_path)
    assert "objective  cross_entropy + 0.001 group_lasso" in plan


def test_a_loss_of_ones_own_that_wants_teacher_outputs_needs_a_teacher():
    """`methods.Objective.wants` names outputs of teachers, also without a distillation loss."""

    def loss(logits, endpoints, batch, params, own):
        return jnp.mean(logits - batch["teacher"][0]["logits"]), {}

    losses = (_objective.Loss("own", 1.0, methods.Objective(loss, wants=("logits",))),)
    shapes = {"logits": jax.ShapeDtypeStruct(CLASSES, jnp.float32)}
    assert _objective.bind_losses(losses, shapes, (shapes,)).wants == ("logits",)
    with pytest.raises(UserError, match=r"own compares with a teacher: name one"):
        _objective.bind_losses(losses, shapes, ())
