"""An experiment: what a config file describes, checked as a whole, and built as far as every job needs it.

Each section of the config is splatted into exactly one function, whose signature is the section's schema:

    data → data.make            model → models.make         optim → train.optim.make
    objective, transforms, weights, exchange → `make` of the method file they name, such as "comm.mean"
    sharding → train.sharding.make_mesh      checkpoint → train.checkpoint.Checkpoints
    init → _pretrained.settings
    export, benchmark, cost, distill → the classes of `_settings`
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from squeeze_jax import data, models, registry, tree
from squeeze_jax.cost import program
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import _objective, _pretrained, _teachers
from squeeze_jax.jobs._settings import (
    BenchmarkSettings,
    CostSettings,
    DistillSettings,
    ExportSettings,
    counts,
    made,
)
from squeeze_jax.train import optim, sharding
from squeeze_jax.train import state as states
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.metrics._metric import Metric

# Where methods are found by the first part of their names.
METHODS = {
    name: f"squeeze_jax.{name}"
    for name in ("comm", "distill", "nas", "prune", "quantize")
} | {"losses": "squeeze_jax.train.losses"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The keys of a config.

    Attributes:
      data, optim: which data, optimizer and schedule.
      steps: updates of the whole run.
      batch: examples of one update, over all devices and accumulated parts.
      model: which network; may be left out where `init` names one.
      init: the trained network to begin with, a folder of transformers or the work directory of an earlier run.
      seed: of weights, order of examples, augmentation and dropout.
      seeds: of the job seeds, which trains with each of them.
      dtype: of the computation; master weights stay float32.
      accumulate: parts that a batch is split into, one after the other.
      ema: decay of averaged weights, 0 for none; they are what is evaluated and exported.
      objective: the loss, by method file; several, each with a weight, are added up. None is the one for the data.
      distill: networks that losses compare with.
      transforms: gradient transforms after the optimizer, by method file.
      weights: reparametrizations of the forward weights, by method file.
      exchange: gradient exchange between devices, by method file; None leaves it to the compiler.
      sharding: sizes of the mesh's axes and the parameters' rules.
      checkpoint: how many to keep.
      log_every, eval_every, save_every: cadences in steps; 0 means only at the end.
      export: formats and tolerances.
      benchmark: how long to measure.
      cost: bits to count for, and whether to measure.
    """

    data: dict
    optim: dict
    steps: int
    batch: int
    model: dict = dataclasses.field(default_factory=dict)
    init: dict = dataclasses.field(default_factory=dict)
    seed: int = 0
    seeds: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    ema: float = 0.0
    objective: dict | tuple | None = None
    distill: dict = dataclasses.field(default_factory=dict)
    transforms: tuple = ()
    weights: tuple = ()
    exchange: dict | None = None
    sharding: dict = dataclasses.field(default_factory=dict)
    checkpoint: dict = dataclasses.field(default_factory=dict)
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 500
    export: dict = dataclasses.field(default_factory=dict)
    benchmark: dict = dataclasses.field(default_factory=dict)
    cost: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Built:
    """An experiment's parts, before any state exists.

    Attributes:
      options: what `models.make` made the model of.
      metric: how networks are evaluated.
      begin: the trained network that the run begins with, or None.
      teachers: networks to learn from, each with a function that reads its variables, and where it is.
      Others: see `Experiment`.
    """

    experiment: Experiment
    data: data.Data
    options: dict[str, Any]
    model: nn.Module
    tx: optax.GradientTransformation
    objective: _objective.Objective
    metric: Metric
    weights: tuple[Callable, ...]
    exchange: Callable | None
    mesh: Mesh
    begin: _pretrained.Network | None
    teachers: tuple[tuple[nn.Module, Callable, str], ...]
    distill: DistillSettings
    export: ExportSettings
    benchmark: BenchmarkSettings
    cost: CostSettings

    def given(self) -> dict[str, Any]:
        """The variables to begin with, numpy; empty where the run begins with random ones.

        Raises:
          UserError: those of `config.init` are not there, or do not fit.
        """
        if self.begin is None:
            return {}
        init = {
            k: v for k, v in self.experiment.init.items() if k in ("only", "layers")
        }
        key = jax.random.key(self.experiment.seed)
        shapes = self.abstract().variables(averaged=False)
        return _pretrained.begin(self.begin, self.options, shapes, key, **init)

    def create(self, given: Mapping[str, Any] | None = None) -> states.State:
        """The initial state, initialised on the devices where its shardings put it, or as `given` by that method."""
        key = jax.random.key(self.experiment.seed)
        placed = jax.tree.map(lambda x: x.sharding, self.abstract())
        create = jax.jit(self._create, out_shardings=placed).lower(key, given or {})
        # It runs once: on the CPU, optimizing it would take longer than all it computes.
        quick = {"xla_backend_optimization_level": 0}
        compiled = create.compile(quick if jax.default_backend() == "cpu" else {})
        return compiled(key, given or {})

    def abstract(self) -> states.State:
        """The state's shapes with their shardings.

        Raises:
          UserError: examples that do not fit the network, or sharding rules that do not.
        """
        return self._abstract

    @functools.cached_property
    def _abstract(self) -> states.State:
        shapes = jax.eval_shape(self._create, jax.random.key(0), {})
        rules = self.experiment.sharding.get("rules", ())
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.shard_state(shapes, self.mesh, rules),
        )

    def _create(self, key, given):
        return states.create(
            self.model,
            self.tx,
            self.data.example(),
            key,
            given=given,
            objective=self.objective.init,
            ema=self.experiment.ema > 0,
        )


def check(config: Mapping[str, Any]) -> Experiment:
    """Checks the config's top level.

    Raises:
      UserError: unknown or missing key, value of another type or out of range.
    """
    registry.check(Experiment, config, "config")
    experiment = Experiment(**config)
    numbers = ("steps", "batch", "accumulate", "log_every")
    counts({k: getattr(experiment, k) for k in numbers}, "config")
    for key in ("eval_every", "save_every"):
        if getattr(experiment, key) < 0:
            raise UserError(
                f"config.{key} = {getattr(experiment, key)} should not be negative"
            )
    twice = [s for s in experiment.seeds if experiment.seeds.count(s) > 1]
    if twice:
        raise UserError(
            f"config.seeds = {experiment.seeds} names {twice[0]} twice: each once"
        )
    for seed in (experiment.seed, *experiment.seeds):
        if not 0 <= seed < 2**31:
            raise UserError(f"config.seed = {seed} should lie in [0, 2**31)")
    if not 0 <= experiment.ema < 1:
        raise UserError(f"config.ema = {experiment.ema} should lie in [0, 1)")
    return experiment


def build(experiment: Experiment) -> Built:
    """Builds everything that can be checked without computing: mesh, data, model, optimizer, methods."""
    e = experiment
    registry.check(sharding.make_mesh, e.sharding, "config.sharding")
    mesh = sharding.make_mesh(**e.sharding)
    sharding.check_batch(e.batch, mesh, e.accumulate)
    if e.exchange is not None and (mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1):
        raise UserError(
            "config.exchange needs replicated parameters: set config.sharding.fsdp and .tensor to 1"
        )
    registry.check(optim.make, e.optim, "config.optim", given=("steps",))
    registry.check(
        Checkpoints, e.checkpoint, "config.checkpoint", given=("directory", "read_only")
    )
    counts(e.checkpoint, "config.checkpoint")
    tx = optim.make(steps=e.steps, **e.optim)
    losses = None if e.objective is None else _objective.parts(e.objective, method)
    transforms = [method(t, "config.transforms") for t in e.transforms]
    for section, transform in zip(e.transforms, transforms, strict=True):
        if not isinstance(transform, optax.GradientTransformation):
            raise UserError(
                f"config.transforms: {section['name']!r} makes no gradient transform; it belongs to another key"
            )
    weights = tuple(method(w, "config.weights") for w in e.weights)
    exchange = method(e.exchange, "config.exchange") if e.exchange else None
    export = made(ExportSettings, e.export, "config.export")
    for key in export.formats:
        registry.load("squeeze_jax.export.formats", key, "export format")
    registry.check(_pretrained.settings, e.init, "config.init")
    begin = _pretrained.settings(**e.init) if e.init else None
    registry.check(data.make, e.data, "config.data")
    source = data.make(**e.data)
    if begin is not None:
        wanted = e.model.get("name")
        begin = _pretrained.suited(begin, source.model.get("task"), wanted)
    options = _options(e, source, begin)
    model = models.make(**options)
    _fit(options, model, source)
    distill = made(DistillSettings, e.distill, "config.distill")
    _teachers.check(distill, source)
    teachers = tuple(
        _pretrained.teacher(section, source, f"config.distill.teachers[{n}]")
        for n, section in enumerate(distill.teachers)
    )
    losses = losses or _objective.parts(source.objective, method)
    network = registry.load("squeeze_jax.train.metrics", source.metrics, "metrics")
    built = Built(
        experiment=e,
        data=source,
        options=options,
        model=model,
        tx=optax.chain(tx, *transforms),
        objective=_bound(losses, model, teachers, source),
        metric=network.make(source),
        weights=weights,
        exchange=exchange,
        mesh=mesh,
        begin=begin,
        teachers=teachers,
        distill=distill,
        export=export,
        benchmark=made(BenchmarkSettings, e.benchmark, "config.benchmark"),
        cost=made(CostSettings, e.cost, "config.cost"),
    )
    _best(built)
    state = (
        built.abstract()
    )  # finds what does not fit the network: its examples, sharding rules, decay rules
    jax.eval_shape(lambda s: tx.update(s.params, tx.init(s.params), s.params), state)
    _bits(built.cost, state.params)
    return built


def _options(e: Experiment, source: data.Data, begin) -> dict[str, Any]:
    """What the model is made of: what the data decide, what a trained network has, what the config says."""
    whole = begin is not None and not (e.init.get("only") or e.init.get("layers"))
    there = begin.options if whole else {}
    name = e.model.get("name", there.get("name"))
    if name is None:
        raise UserError("missing key config.model.name: add it to the config")
    if whole and name != there["name"]:
        raise UserError(
            f"config.model.name = {name!r}, but {begin.where} holds {there['name']!r}: leave the key out, or take only"
            " what fits by config.init.only"
        )
    if whole and "variant" in e.model and "variant" not in there:
        raise UserError(
            f"config.model.variant = {e.model['variant']!r}: the sizes are those of {begin.where}; leave the key out"
        )
    network = registry.load("squeeze_jax.models", name, "model")
    reads = getattr(network, "INPUTS", "images")
    if reads != source.reads:
        raise UserError(
            f"config.model.name = {name!r} reads {reads}, but config.data gives {source.reads}: choose a network for"
            f" {source.reads}"
        )
    known = inspect.signature(network.make).parameters
    decided = {k: v for k, v in source.model.items() if k in known}
    options = {"name": name} | dict(there) | decided | dict(e.model)
    registry.check(models.make, options, "config.model")
    registry.check(
        network.make, {k: v for k, v in options.items() if k != "name"}, "config.model"
    )
    return options


def _fit(options: Mapping[str, Any], model: nn.Module, source: data.Data) -> None:
    """Raises a UserError where a network has too few classes or tokens for the data, or another task."""
    classes, needed = options.get("num_classes"), source.model.get("num_classes")
    if classes is not None and needed is not None and classes < needed:
        raise UserError(
            f"config.model.num_classes = {classes}, but the data's labels go up to {needed - 1}; leave the key out or set"
            f" it to {needed}"
        )
    task = source.model.get("task")
    own = getattr(model, "task", task)
    if task is not None and own != task:
        if "task" not in options:
            raise UserError(
                f"config.model.name = {options['name']!r} is for {own!r}, but config.data is for {task!r}: choose another"
                " network"
            )
        raise UserError(
            f"config.model.task = {own!r}, but config.data is for {task!r}: leave the key out"
        )
    words = getattr(source, "vocabulary", None)
    if words is not None and not _pretrained.reads(model, words):
        raise UserError(
            f"the tokenizer has {words:,} tokens, the model's embedding {model.row.vocabulary:,}: give the tokenizer that"
            f" the network was trained with, or set config.model.vocabulary={words}"
        )


def _bound(losses, model, teachers, source) -> _objective.Objective:
    """The losses, for the shapes of the student's and the teachers' outputs."""
    if not _objective.needs_teacher(losses) and not teachers:
        return _objective.bind(losses, {}, ())
    x = source.example()
    student = _objective.outputs(model, x)
    shown = [_objective.outputs(net, x) for net, _, _ in teachers]
    return _objective.bind(losses, student, shown)


def _best(built: Built) -> None:
    """Raises a UserError for a best checkpoint by a score that evaluations do not give."""
    best, names = built.experiment.checkpoint.get("best"), built.metric.names
    if best is not None and best not in (names or (names := _scores(built))):
        raise UserError(f"config.checkpoint.best = {best!r}{nearest(best, names)}")


def _scores(built: Built) -> tuple[str, ...]:
    """The names of what an evaluation gives that only adds up."""

    def measured(batch):
        key = jax.random.key(0)
        x = built.data.inputs(batch)
        (logits, _), _ = built.model.init_with_output(key, x, train=False)
        return built.metric.measure(logits, batch)

    sums, _ = jax.eval_shape(measured, built.data.specs(1)[-1])
    found = built.metric.score(dict.fromkeys(sums, 0.0), {})
    return tuple(name for name in found if name != "eval_loss")


def _bits(cost: CostSettings, params) -> None:
    """Raises a UserError where bits are out of range or a rule fits no parameter."""
    program.check_bits(cost.activation_bits, "config.cost.activation_bits")
    where = "config.cost.weight_bits"
    if isinstance(cost.weight_bits, int):
        program.check_bits(cost.weight_bits, where)
        return
    tree.apply_rules(cost.weight_bits, params, where=where)
    for pattern, bits in cost.weight_bits:
        program.check_bits(bits, f"{where} of {pattern!r}")


def method(section: Mapping[str, Any], where: str):
    """Builds the method that a section names: `{"name": "package.file", **arguments of its make}`."""
    if not isinstance(section, Mapping) or "name" not in section:
        raise UserError(
            f"{where} should be a dict with a name such as 'comm.mean', not {section!r}"
        )
    package, _, file = section["name"].partition(".")
    if package not in METHODS or not file:
        raise UserError(
            f"{where}.name = {section['name']!r} should be package.file{nearest(package, METHODS)}"
        )
    module = registry.load(METHODS[package], file, f"method of {package}")
    if not hasattr(module, "make"):
        raise UserError(
            f"{where}.name = {section['name']!r} is no method: that file has no function make"
        )
    arguments = {k: v for k, v in section.items() if k != "name"}
    registry.check(module.make, arguments, where)
    return module.make(**arguments)
