"""An experiment: what a config file describes, checked as a whole, and built as far as every job needs it.

Each section of the config is splatted into exactly one function, whose signature is the section's schema:

    data → data.make            model → models.make         optim → train.optim.make
    update, forward, objective, gradients, exchange → `make` of the method files they name, such as "comm.mean"
    sharding → train.sharding.make_mesh      checkpoint → train.checkpoint.Checkpoints
    compilation → _compilation.enable
    init → _pretrained.settings              distill → _teachers.Settings
    a job's name → the class `Settings` of its file
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
from jax.sharding import Mesh

from squeeze_jax import data, models, registry
from squeeze_jax.data import vision
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import (
    _classes,
    _compilation,
    _model,
    _noted,
    _objective,
    _phases,
    _plugs,
    _pretrained,
    _settings,
    _teachers,
)
from squeeze_jax.jobs._phases import Phase
from squeeze_jax.jobs._settings import made
from squeeze_jax.ranges import Count, Distinct, Rate, Seed, Whole
from squeeze_jax.train import forward, sharding
from squeeze_jax.train import state as states
from squeeze_jax.train import step as steps
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.metrics import Metric


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The keys of a config.

    Attributes:
      data, optim: which data, optimizer and schedule.
      steps: updates of the whole run; with phases the sum of theirs.
      batch: examples of one update, over all devices and accumulated parts.
      model: which network; may be left out where `init` names one.
      init: the trained network to begin with: a folder of transformers, the work directory of an earlier run, or a file of
        weights.
      seed: of weights, order of examples, augmentation and dropout.
      seeds: of the job seeds, which trains with each of them.
      dtype: of the computation; master weights stay float32.
      accumulate: parts that a batch is split into, one after the other.
      ema: decay of averaged weights, 0 for none; they are what is evaluated and exported.
      update: gradient transforms in order, by method file; "optim" stands for the optimizer and is listed once.
      forward: changes of the network as it is run, by method file, in order.
      objective: the loss, by method file; several, each with a weight, are added up. None is the one for the data.
      gradients: how gradients are computed, by method file; None for one forward pass.
      exchange: gradient exchange between devices, by method file; None leaves it to the compiler.
      distill: networks that losses compare with.
      phases: settings that change during the run, see `_phases`; () for a run of one phase.
      sharding: sizes of the mesh's axes and the parameters' rules.
      checkpoint: how many to keep.
      compilation: where compiled programs are kept, see `_compilation.enable`.
      log_every, eval_every, save_every: cadences in steps; 0 means only at the end.
      jobs: settings of jobs, by name; in a config they are sections of these names.
    """

    data: dict
    optim: dict
    batch: Count
    steps: Whole = 0
    model: dict = dataclasses.field(default_factory=dict)
    init: dict = dataclasses.field(default_factory=dict)
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Distinct()] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: Count = 1
    ema: Rate = 0.0
    update: tuple[str | dict, ...] = ("optim",)
    forward: tuple[dict, ...] = ()
    objective: dict | tuple[dict, ...] | None = None
    gradients: dict | None = None
    exchange: dict | None = None
    distill: dict = dataclasses.field(default_factory=dict)
    phases: tuple[dict, ...] = ()
    sharding: dict = dataclasses.field(default_factory=dict)
    checkpoint: dict = dataclasses.field(default_factory=dict)
    compilation: dict = dataclasses.field(default_factory=dict)
    log_every: Count = 50
    eval_every: Whole = 0
    save_every: Whole = 500
    jobs: dict = dataclasses.field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Returns the config of this experiment with all defaults; `check` makes the same experiment from it."""
        keys = dataclasses.asdict(self)
        sections = keys.pop("jobs")
        if self.phases:
            keys.pop("steps")
        return keys | sections


@dataclasses.dataclass(frozen=True)
class Built:
    """An experiment's parts in one of its phases, before any state exists.

    Attributes:
      experiment: as it is in the phase.
      whole: with its phases.
      phase: which.
      options: what `models.make` made the model of.
      network: the model as it is run.
      plugs: the methods.
      objective: the terms of the loss, for this network and its teachers.
      owners: what methods own, by name.
      metric: how networks are evaluated.
      begin: the trained network that the run begins with, or None.
      teachers: networks to learn from, each with a function that reads its variables, and where it is.
      Others: see `Experiment`.
    """

    experiment: Experiment
    whole: Experiment
    phase: Phase
    data: data.Data
    options: dict[str, Any]
    model: nn.Module
    network: forward.Network
    plugs: _plugs.Plugs
    objective: _objective.Objective
    owners: dict[str, states.Owner]
    metric: Metric
    mesh: Mesh
    begin: _pretrained.Network | None
    teachers: tuple[tuple[forward.Network, Any, str], ...]
    distill: _teachers.Settings

    @property
    def checkpoints(self) -> dict[str, Any]:
        """Returns the arguments of `Checkpoints`: which checkpoints are kept, and which one is the trained network."""
        settings = {"best": self.metric.headline} | self.experiment.checkpoint
        lowest = settings["best"] in self.metric.lower
        return settings | ({"lowest": True} if lowest else {})

    @property
    def carries(self) -> bool:
        """Whether the network carries a state from batch to batch."""
        contiguous = getattr(self.data, "contiguous", False)
        return contiguous and hasattr(self.model, "initial_carry")

    def with_seed(self, seed: int) -> "Built":
        """Returns the same experiment with another seed."""
        changed = dataclasses.replace(self.experiment, seed=seed)
        whole = dataclasses.replace(self.whole, seed=seed)
        return dataclasses.replace(self, experiment=changed, whole=whole)

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
        abstract = self.abstract()
        params = forward.parameters(abstract.params)
        shapes = {"params": params, "batch_stats": abstract.stats}
        init |= {"classes": self.data.label_names, "example": self.data.example()}
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
        per_device = [name for name, owner in self.owners.items() if owner.devices]
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.shard_state(shapes, self.mesh, rules, per_device),
        )

    def _create(self, key, given):
        return states.create(
            self.model,
            self.plugs.update.tx,
            self.data.example(),
            key,
            given=given,
            owners=self.owners,
            ema=self.experiment.ema > 0,
            carry_rows=self.experiment.batch if self.carries else 0,
        )


def check(config: Mapping[str, Any]) -> Experiment:
    """Checks the config's top level.

    Raises:
      UserError: unknown or missing key, value of another type or out of range.
    """
    # With the default as it is today, so that the run's checkpoints keep it.
    config = _settings.with_resize(_settings.canonical(config), vision.CROP)
    names = {field.name for field in dataclasses.fields(Experiment)} - {"jobs"}
    jobs = set(_settings.jobs()) - names
    for key in config:
        if key not in names | jobs:
            choices = names | set(_settings.with_settings())
            raise UserError(f"unknown key config.{key}{nearest(key, choices)}")
    keys = {k: v for k, v in config.items() if k in names}
    registry.check(Experiment, keys, "config")
    _phases.check(keys)
    if keys.get("phases"):
        keys["steps"] = _phases.total(keys["phases"])
    experiment = Experiment(**keys, jobs=_settings.sections(config))
    for index in range(max(1, len(experiment.phases))):
        _check_values(_phases.of(experiment, index)[0])
    return experiment


def _check_values(experiment: Experiment) -> None:
    """Raises a UserError for values out of range, in one phase."""
    keys = dataclasses.asdict(experiment)
    registry.check(Experiment, keys, "config")
    if experiment.steps < 1:
        raise UserError(f"config.steps = {experiment.steps} should be at least 1")


def build(
    experiment: Experiment,
    phase: int = 0,
    options: Mapping[str, Any] | None = None,
    *,
    begun: bool = False,
    workdir: pathlib.Path | None = None,
) -> Built:
    """Builds everything that can be checked without computing: mesh, data, model, optimizer, methods.

    Args:
      experiment: the whole one.
      phase: index of the phase, from 0.
      options: of `models.make`, where a phase before has changed them.
      begun: whether the run has a checkpoint to continue from, so that it needs no weights file of `config.init`.
      workdir: of the run whose trained network is built; the data must have its classes.
    """
    e, where = _phases.of(experiment, phase)
    registry.check(sharding.make_mesh, e.sharding, "config.sharding")
    mesh = sharding.make_mesh(**e.sharding)
    sharding.check_batch(e.batch, mesh, e.accumulate)
    if e.exchange is not None and (mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1):
        raise UserError(
            "config.exchange needs replicated parameters: set config.sharding.fsdp and .tensor to 1"
        )
    _check_sections(e)
    plugs = _plugs.make(e)
    begin = _pretrained.settings(**e.init) if e.init else None
    registry.check(data.make, e.data, "config.data")
    source = data.make(**e.data)
    if workdir is not None:
        _noted.check_classes(workdir, source.label_names)
    if begin is not None:
        wanted = e.model.get("name")
        begin = _pretrained.suited(begin, source.model.get("task"), wanted)
    options = _model.options(e, source, begin) if options is None else dict(options)
    if e.init.get("file"):
        named = ("file", "names", "under", "key")
        keys = {k: e.init[k] for k in named if k in e.init}
        begin = _pretrained.of_file(
            options, source.example(), **keys, needed=not (begun or phase)
        )
    model = models.make(**options)
    _model.check_fit(options, model, source)
    _plugs.check_options(plugs.gradients, model, options["name"])
    distill = made(_teachers.Settings, e.distill, "config.distill")
    _teachers.check(distill, source)
    teachers = tuple(
        _teachers.teacher(section, source, f"config.distill.teachers[{n}]", e.dtype)
        for n, section in enumerate(distill.teachers)
    )
    losses = plugs.losses or _objective.parts(
        source.objective, _plugs.method, plugs.names
    )
    objective = _bound(losses, model, teachers, source)
    example = source.example()
    taps = _plugs.bound_taps(model, example, plugs.forwards)
    devices = sharding.batch_shards(mesh)
    network = forward.make(
        model, example, forwards=plugs.forwards, dtype=e.dtype, first=where.first
    )
    metric = _metric(source)
    built = Built(
        experiment=e,
        whole=experiment,
        phase=where,
        data=source,
        options=options,
        model=model,
        network=network,
        plugs=plugs,
        objective=objective,
        owners=_plugs.owners(plugs, taps, objective.terms, devices),
        metric=metric,
        mesh=mesh,
        begin=begin,
        teachers=teachers,
        distill=distill,
    )
    _check_built(built)
    return built


def opened(
    workdir: pathlib.Path, config: Mapping[str, Any], *, examples: bool = True
) -> Built:
    """Builds the experiment of a work directory in the phase, and with the network options, of its trained network.

    Args:
      workdir: of the run.
      config: as it was begun, with changes of what is free.
      examples: whether the data's examples are needed; if not, noise stands in for images that cannot be opened.
    """
    config, phase, options = _pretrained.alone(workdir, config)
    try:
        return build(check(config), phase, options, workdir=workdir)
    except _classes.OtherClasses:
        raise
    except UserError as error:
        without = None if examples else _noted.without_examples(workdir, config)
        if without is None:
            raise
        built = build(check(without), phase, options, workdir=workdir)
        print(f"data       not opened: {error}; the classes are those of the run")
    return built


def _check_sections(e: Experiment) -> None:
    """Raises a UserError for sections that do not fit the functions that they go to."""
    registry.check(_plugs.optim.make, e.optim, "config.optim", given=("steps",))
    given = ("directory", "read_only", "lowest")
    registry.check(Checkpoints, e.checkpoint, "config.checkpoint", given=given)
    registry.check(_pretrained.settings, e.init, "config.init")
    registry.check(_compilation.enable, e.compilation, "config.compilation")


def _check_built(built: Built) -> None:
    """Raises a UserError for examples, rules, methods or a best score that do not fit the network."""
    _best(built)
    state = built.abstract()
    _plugs.check_state(state.extra)
    key = jax.random.key(0)
    jax.eval_shape(
        lambda s: steps.apply_update(
            built.plugs.update, s.params, s.opt, s.params, key, s.step
        ),
        state,
    )
    _settings.check(built)


def _bound(losses, model, teachers, source) -> _objective.Objective:
    """Binds the losses to the shapes of the student's and the teachers' outputs."""
    if not _objective.needs_teacher(losses) and not teachers:
        return _objective.bind(losses, {}, ())
    x = source.example()
    student = _objective.outputs(model, x)
    shown = [_objective.outputs(network.model, x) for network, _, _ in teachers]
    return _objective.bind(losses, student, shown)


def _metric(source: data.Data) -> Metric:
    """Makes the evaluation that the data name; a UserError where a file of the user's own makes anything else."""
    module = registry.load("squeeze_jax.train.metrics", source.metrics, "metric")
    metric = module.make(source)
    if not isinstance(metric, Metric):
        raise UserError(
            f"the metric {source.metrics!r} makes a {type(metric).__name__}: return a"
            " squeeze_jax.train.metrics.Metric"
        )
    return metric


def _best(built: Built) -> None:
    """Raises a UserError for a best checkpoint by a score that evaluations do not give."""
    best = built.experiment.checkpoint.get("best")
    if best is None or best == "eval_loss":
        return
    names = built.metric.names or _scores(built)
    if best not in names:
        names = (*names, "eval_loss")
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
