"""Checks a config as a whole, and builds the experiment that it describes: data, model, optimizer and methods.

Each section of the config holds the keyword arguments of exactly one function, whose signature is the section's schema:

    data → data.make            model → models.make         optim → train.optim.make
    update, forward, objective, gradients, exchange → `make` of the method files they name, such as "comm.mean"
    sharding → train.sharding.make_mesh      checkpoint → train.checkpoint.Checkpoints
    compilation → _compilation.enable
    init → _pretrained.network_from_init     distill → _teachers.Settings
    a job's name → the class `Settings` of its file
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from squeeze_jax import data, models, registry, tree
from squeeze_jax.cost import count
from squeeze_jax.data import vision
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import (
    _classes,
    _compilation,
    _model,
    _model_json,
    _objective,
    _phases,
    _plugs,
    _pretrained,
    _settings,
    _teachers,
)
from squeeze_jax.jobs._phases import Phase
from squeeze_jax.jobs._settings import build_settings
from squeeze_jax.nn import means
from squeeze_jax.ranges import Count, Distinct, Rate, Seed, Whole
from squeeze_jax.train import forward, sharding
from squeeze_jax.train import state as states
from squeeze_jax.train import step as training_step
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.metrics import Metric, check_scores

# Parameters of a section's function that the program supplies, so that no config sets them.
SUPPLIED = {"optim": ("steps",), "checkpoint": ("directory", "read_only", "lowest")}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The keys of a config.

    Attributes:
      data: the section that chooses the data; its "name" is a name of --list=data, by default "images".
      optim: the section that sets the optimizer, the learning rate and its schedule.
      batch: examples in one optimizer update, over all devices and accumulated parts; at least 1.
      steps: optimizer updates of the whole run, at least 1; with `phases` leave it out: it is the sum of their steps.
      model: the section that chooses the network; its "name" is a name of --list=model. May be left out if `init` names a
        trained network.
      init: the section that names a trained network to begin with: a folder of transformers, the work directory of an
        earlier run, or a file of weights.
      seed: seed of the initial weights, the order of examples, augmentation and dropout; at least 0.
      seeds: seeds of the job seeds, which trains once with each; at least two, all different.
      dtype: dtype of the computation, float32 or bfloat16; master weights stay float32.
      accumulate: number of parts that a batch is split into; they are computed one after the other to save memory.
      ema: decay of the moving average of weights, in [0, 1), 0 for none; averaged weights are evaluated and exported.
      update: gradient transforms in order: sections that each name a method of --list=methods, and once "optim" for the
        optimizer.
      forward: methods that change the weights or activations of the network, in order; each section names a method of
        --list=methods.
      objective: the loss: a section that names a loss of --list=losses or a method; or several such sections with weights,
        which are added up. None takes the data's own loss.
      gradients: the method that computes gradients; None for one forward and backward pass.
      exchange: the method that exchanges gradients between devices; None leaves the exchange to the compiler.
      distill: the section that names teachers and a cache for their outputs.
      phases: dicts of keys that change during the run, each with its own "steps"; () for a run of one phase.
      sharding: the section that sets the sizes of the device mesh and the rules for placing parameters.
      checkpoint: the section that decides which checkpoints are kept, and which one is the trained network.
      compilation: the section that decides whether and where compiled programs are kept.
      log_every: training steps between two log lines; at least 1.
      eval_every: training steps between two evaluations; 0 evaluates only at the end.
      save_every: training steps between two checkpoints; 0 saves only at the end.
      jobs: settings of jobs, by name; in a config each is a section with the job's name.
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
        """Returns the experiment's config with all defaults; `check` turns it into an equal experiment."""
        keys = dataclasses.asdict(self)
        sections = keys.pop("jobs")
        if self.phases:
            keys.pop("steps")
        return keys | sections


@dataclasses.dataclass(frozen=True)
class Built:
    """An experiment in one of its phases, built from its config; no weights exist yet.

    Attributes:
      experiment: the experiment with the overrides of the phase.
      whole: the experiment with all its phases.
      phase: the phase.
      data: the data.
      options: the arguments of `models.make` that built the model.
      model: the Linen module.
      network: the model together with the methods of `config.forward`.
      plugs: the methods of all plug points.
      objective: the losses, bound to the network and its teachers.
      owners: {method: its `Owner`} for methods that own parameters or state.
      metric: the evaluation.
      mesh: the devices.
      init_network: the trained network that the run begins with, or None.
      teachers: the networks that the run learns from.
      distill: the settings of `config.distill`.
    """

    experiment: Experiment
    whole: Experiment
    phase: Phase
    data: data.Data
    options: dict[str, Any]
    model: nn.Module
    network: forward.Network
    plugs: _plugs.Plugs
    objective: _objective.TrainingLoss
    owners: dict[str, states.Owner]
    metric: Metric
    mesh: Mesh
    init_network: _pretrained.PretrainedNetwork | None
    teachers: tuple[_teachers.Teacher, ...]
    distill: _teachers.Settings

    @property
    def checkpoints(self) -> dict[str, Any]:
        """Returns the arguments of `Checkpoints`, which decide the kept checkpoints and the one of the trained network."""
        settings = {"best": self.metric.headline} | self.experiment.checkpoint
        lowest = settings["best"] in self.metric.lower
        return settings | ({"lowest": True} if lowest else {})

    @property
    def carries(self) -> bool:
        """Returns whether the network is recurrent and carries its state from batch to batch."""
        contiguous = getattr(self.data, "contiguous", False)
        return contiguous and hasattr(self.model, "initial_carry")

    def with_seed(self, seed: int) -> "Built":
        """Returns the same experiment with another seed."""
        changed = dataclasses.replace(self.experiment, seed=seed)
        whole = dataclasses.replace(self.whole, seed=seed)
        return dataclasses.replace(self, experiment=changed, whole=whole)

    def initial_variables(self) -> dict[str, Any]:
        """Reads the variables that the run begins with from the network of `config.init`.

        Returns:
          {"params", "batch_stats"}, numpy arrays; leaves that are left out are initialised at random. {} without
          `config.init`.

        Raises:
          UserError: the weights of `config.init` are missing, do not fit, or cannot be trained.
        """
        if self.init_network is None:
            return {}
        init = {
            k: v for k, v in self.experiment.init.items() if k in ("only", "layers")
        }
        fresh = jax.random.key(self.experiment.seed)
        abstract = self.abstract()
        params = forward.parameters(abstract.params)
        shapes = {"params": params, "batch_stats": abstract.stats}
        init |= {"classes": self.data.label_names, "example": self.data.example()}
        init |= {"source": self.data}
        initial = _pretrained.initial_variables(
            self.init_network, self.options, shapes, fresh, **init
        )
        _check_usable(initial, self.init_network.location)
        return initial

    def create(self, initial: Mapping[str, Any] | None = None) -> states.State:
        """Creates the initial training state on the devices, distributed by its shardings.

        Args:
          initial: variables to begin with, see `initial_variables`; all others are initialised at random.
        """
        key = jax.random.key(self.experiment.seed)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract())
        create = jax.jit(self._create, out_shardings=shardings)
        lowered = create.lower(key, initial or {})
        # It runs once: on the CPU, optimizing it would take longer than running it.
        quick = {"xla_backend_optimization_level": 0}
        compiled = lowered.compile(quick if jax.default_backend() == "cpu" else {})
        return compiled(key, initial or {})

    def abstract(self) -> states.State:
        """Returns the training state as `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: the examples or the sharding rules do not fit the network.
        """
        return self._abstract

    def count_macs(self) -> int:
        """Returns the MACs of the network for one example, in evaluation."""
        return self._macs

    @functools.cached_property
    def _macs(self) -> int:
        return count.macs(
            lambda v, x: forward.run(self.network, v, x)[0][0],
            self.abstract().variables(),
            self.data.example(),
        ).total

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

    def _create(self, key, initial):
        return states.create(
            self.model,
            self.plugs.update.tx,
            self.data.example(),
            key,
            given=initial,
            owners=self.owners,
            ema=self.experiment.ema > 0,
            carry_rows=self.experiment.batch if self.carries else 0,
        )


def _check_usable(initial: Mapping[str, Any], location: str) -> None:
    """Raises a UserError for weights that are not finite, and for negative running variances."""
    for name, array in tree.flatten(initial).items():
        if isinstance(array, jax.ShapeDtypeStruct):  # initialised at random
            continue
        values = np.asarray(array)
        if not np.isfinite(values).all():
            problem = "values that are not finite"
        elif name.startswith("batch_stats/") and name.endswith("/var") and values.size:
            problem = "a negative variance" if values.min() < 0 else ""
        else:
            problem = ""
        if problem:
            raise UserError(
                f"{location}: {name} has {problem}: begin with other weights, such as those of an earlier checkpoint"
            )


def check(config: Mapping[str, Any]) -> Experiment:
    """Checks the top level of a config and its phases, and returns the experiment.

    Raises:
      UserError: a key is unknown or missing, or a value has another type or is out of range.
    """
    # Today's default is written into the config, so that the run's checkpoints keep it.
    config = _settings.with_resize(_settings.canonical(config), vision.CROP)
    names = {field.name for field in dataclasses.fields(Experiment)} - {"jobs"}
    job_names = set(_settings.job_names()) - names
    for key in config:
        if key not in names | job_names:
            choices = names | set(_settings.jobs_with_settings())
            raise UserError(f"unknown key config.{key}{nearest(key, choices)}")
    keys = {k: v for k, v in config.items() if k in names}
    registry.check(Experiment, keys, "config")
    _phases.check(keys)
    if keys.get("phases"):
        keys["steps"] = _phases.total_steps(keys["phases"])
    experiment = Experiment(**keys, jobs=_settings.job_sections(config))
    for index in range(max(1, len(experiment.phases))):
        _check_values(_phases.at_phase(experiment, index)[0])
    return experiment


def find_fault(config: Mapping[str, Any]) -> str:
    """Returns the line about the first key or value that no config has; "" if there is none.

    Only the config counts: neither data nor other files are opened.

    Args:
      config: a config.
    """
    try:
        experiment = check(config)
        for index in range(max(1, len(experiment.phases))):
            e = _phases.at_phase(experiment, index)[0]
            _check_sections(e)
            registry.check(sharding.make_mesh, e.sharding, "config.sharding")
            data.check(**e.data)
            if "name" in e.model:
                models.check(e.model)
            build_settings(_teachers.Settings, e.distill, "config.distill")
            _plugs.make_plugs(e)
    except UserError as error:
        return str(error)
    return ""


def _check_values(experiment: Experiment) -> None:
    """Raises a UserError if a value of an experiment, with the overrides of one phase, is out of range."""
    keys = dataclasses.asdict(experiment)
    registry.check(Experiment, keys, "config")
    if experiment.steps < 1:
        raise UserError(f"config.steps = {experiment.steps} should be at least 1")


def build(
    experiment: Experiment,
    phase: int = 0,
    options: Mapping[str, Any] | None = None,
    *,
    has_checkpoint: bool = False,
    workdir: pathlib.Path | None = None,
) -> Built:
    """Builds an experiment as far as it can be checked without computing: mesh, data, model, optimizer and methods.

    Args:
      experiment: the experiment with all its phases.
      phase: index of the phase to build, from 0.
      options: the arguments of `models.make`, if an earlier phase has changed the network; None to decide them.
      has_checkpoint: whether the run continues from a checkpoint; then the file of `config.init` need not exist.
      workdir: the work directory whose trained network is built; the data must have the same classes. None for a new run.

    Raises:
      UserError: parts of the config do not fit each other, the data or the machine.
    """
    e, current_phase = _phases.at_phase(experiment, phase)
    registry.check(sharding.make_mesh, e.sharding, "config.sharding")
    mesh = sharding.make_mesh(**e.sharding)
    sharding.check_batch(e.batch, mesh, e.accumulate)
    if e.exchange is not None and (mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1):
        raise UserError(
            "config.exchange needs replicated parameters: set config.sharding.fsdp and .tensor to 1"
        )
    _check_sections(e)
    plugs = _plugs.make_plugs(e)
    init_network = _pretrained.network_from_init(**e.init) if e.init else None
    registry.check(data.make, e.data, "config.data")
    source = data.make(**e.data)
    if workdir is not None:
        _model_json.check_data(workdir, source)
    if init_network is not None:
        init_network = _pretrained.pretrained_part(
            init_network, source.model.get("task"), e.model.get("name")
        )
        if not e.init.get("only"):
            remedy = "leave out the embeddings by config.init.only"
            _classes.check_same_tokens(
                init_network.tokens, source, init_network.location, remedy
            )
    if options is None:
        options = _model.model_options(e, source, init_network)
    options = dict(options)
    if e.init.get("file"):
        file_keys = ("file", "names", "under", "key")
        arguments = {k: e.init[k] for k in file_keys if k in e.init}
        needed = not (has_checkpoint or phase)
        init_network = _pretrained.network_from_file(
            options, source.example(), **arguments, needed=needed
        )
    model = models.make(**options)
    _model.check_fit(options, model, source)
    _check_softmax(plugs.gradients, source)
    plugs = _plugs.bind_gradients(plugs, options, source.example())
    _plugs.check_call_options(plugs.gradients, model, options["name"])
    distill = build_settings(_teachers.Settings, e.distill, "config.distill")
    _teachers.check_cache(distill, source)
    teachers = tuple(
        _teachers.make_teacher(
            section,
            source,
            f"config.distill.teachers[{n}]",
            e.dtype,
            options.get("num_classes"),
        )
        for n, section in enumerate(distill.teachers)
    )
    losses = plugs.losses or _objective.make_losses(
        source.objective, _plugs.make_method, plugs.names
    )
    objective = _bind_losses(losses, model, teachers, source)
    example = source.example()
    taps = _plugs.accepted_taps(model, example, plugs.forwards)
    devices = sharding.batch_shards(mesh)
    network = forward.make(
        model,
        example,
        forwards=plugs.forwards,
        dtype=e.dtype,
        first=current_phase.first,
    )
    metric = _make_metric(source)
    built = Built(
        experiment=e,
        whole=experiment,
        phase=current_phase,
        data=source,
        options=options,
        model=model,
        network=network,
        plugs=plugs,
        objective=objective,
        owners=_plugs.owners(plugs, taps, objective.terms, devices),
        metric=metric,
        mesh=mesh,
        init_network=init_network,
        teachers=teachers,
        distill=distill,
    )
    _check_built(built)
    if workdir is None:  # the network is to be trained
        _check_objective(built)
    return built


def build_trained(
    workdir: pathlib.Path, config: Mapping[str, Any], *, examples: bool = True
) -> Built:
    """Builds the experiment of a work directory for its trained network: in its phase, and with its network options.

    Args:
      workdir: the run's work directory.
      config: the run's config; keys that do not change what is learned may differ, see `_workdir.FREE_KEYS`.
      examples: whether the job needs the data's examples. If not, noise replaces images that cannot be opened.

    Raises:
      UserError: see `build`; or the data have other classes than the trained network.
    """
    config, phase, options = _pretrained.config_without_training(workdir, config)
    try:
        return build(check(config), phase, options, workdir=workdir)
    except _classes.OtherClasses:
        raise
    except UserError as error:
        if examples:
            raise
        config = _model_json.config_without_examples(workdir, config)
        if config is None:
            raise
        built = build(check(config), phase, options, workdir=workdir)
        print(f"data       not opened: {error}; the classes are those of the run")
    return built


def _check_softmax(gradients: _plugs.Named | None, source: data.Data) -> None:
    """Raises a UserError if a gradient method compares networks by a softmax over classes of which an example may have several.

    Args:
      gradients: the method, not yet bound to the network; or None.
      source: the data.
    """
    if gradients is None or not gradients.method.softmax:
        return
    if _classes.problem_type(source) == _classes.MULTI_LABEL:
        raise UserError(
            f"config.gradients: {gradients.name} teaches networks by a softmax over the classes, and an example of these data may"
            " have several: take nas.once_for_all with distill = 0 and labels = 1"
        )


def _check_sections(e: Experiment) -> None:
    """Raises a UserError if a section has keys or values that its function does not take."""
    for name, function in ("optim", _plugs.optim.make), ("checkpoint", Checkpoints):
        section, supplied = getattr(e, name), SUPPLIED[name]
        registry.check(function, section, f"config.{name}", given=supplied)
    registry.check(_pretrained.network_from_init, e.init, "config.init")
    registry.check(_compilation.enable, e.compilation, "config.compilation")


def _check_built(built: Built) -> None:
    """Raises a UserError if examples, rules, methods, job settings or the score of the best checkpoint do not fit."""
    _check_best_score(built)
    state = built.abstract()
    _plugs.check_state(state.extra)
    key = jax.random.key(0)
    jax.eval_shape(
        lambda s: training_step.apply_update(
            built.plugs.update, s.params, s.opt, s.params, key, s.step
        ),
        state,
    )
    _settings.check_jobs(built)


def _check_objective(built: Built) -> None:
    """Raises a UserError if the losses or the evaluation cannot be computed from the network's outputs and the data's batches.

    Only shapes are computed.
    """
    state, key = built.abstract(), jax.eval_shape(lambda: jax.random.key(0))
    variables = state.variables(averaged=False)
    rows = built.experiment.batch
    stored = dict(built.data.specs(rows)[-1])
    index = jax.ShapeDtypeStruct((rows,), np.int32)

    def outputs(variables, batch, key):
        batch = built.data.augment(key, batch)
        x = built.data.inputs(batch)
        options = {} if state.carry is None else {"carry": variables["carry"]}
        network_variables = {k: v for k, v in variables.items() if k != "carry"}
        (logits, endpoints), _ = forward.run(
            built.network, network_variables, x, train=True, key=key, **options
        )
        return logits, endpoints, batch, x

    carry = {} if state.carry is None else {"carry": state.carry}
    logits, endpoints, batch, x = jax.eval_shape(
        outputs, variables | carry, stored | {"index": index}, key
    )
    if built.teachers:
        available = [
            _objective.output_shapes(t.network.model, x) for t in built.teachers
        ]
        wants = built.objective.wants
        batch["teacher"] = tuple(
            {k: shapes[k] for k in wants if k in shapes} for shapes in available
        )

    has_parts = built.experiment.accumulate > 1 or built.experiment.exchange is not None

    def loss(term, logits, endpoints, batch, variables, key):
        own = forward.own(term.name, variables, first=built.phase.first, key=key)
        plain = forward.parameters(variables["params"])
        with means.record_weight_sums() if has_parts else contextlib.nullcontext():
            returned = term.objective.loss(logits, endpoints, batch, plain, own)
        return training_step.check_returned(term.name, returned)

    def call(term):
        shapes = (logits, endpoints, batch, variables, key)
        return jax.eval_shape(functools.partial(loss, term), *shapes)

    _objective.check_fit(built.objective, call, logits, stored)
    try:
        jax.eval_shape(built.metric.measure, logits, stored)
    except Exception as error:  # a metric indexes and computes with whatever it gets
        raise UserError(
            f"the metric {built.data.metrics} of config.data does not fit the network: {registry.describe_error(error)}; the"
            f" network returns {_objective.describe_shapes(logits)}"
        ) from None


def _bind_losses(losses, model, teachers, source) -> _objective.TrainingLoss:
    """Binds the losses to the shapes of the student's and the teachers' outputs for one example."""
    if not _objective.needs_teacher(losses) and not teachers:
        return _objective.bind_losses(losses, {}, ())
    x = source.example()
    student_shapes = _objective.output_shapes(model, x)
    teacher_shapes = [
        _objective.output_shapes(teacher.network.model, x) for teacher in teachers
    ]
    multi_label = _classes.problem_type(source) == _classes.MULTI_LABEL
    return _objective.bind_losses(
        losses, student_shapes, teacher_shapes, multi_label=multi_label
    )


def _make_metric(source: data.Data) -> Metric:
    """Makes the evaluation that the data name, whose function `score` checks the scores of the metric's file.

    Raises:
      UserError: the file makes something else than a `Metric`.
    """
    module = registry.load("squeeze_jax.train.metrics", source.metrics, "metric")
    metric = module.make(source)
    if not isinstance(metric, Metric):
        raise UserError(
            f"the metric {source.metrics!r} makes a {type(metric).__name__}: return a"
            " squeeze_jax.train.metrics.Metric"
        )

    def score(sums, rows):
        return check_scores(metric.score(sums, rows), metric.headline, source.metrics)

    return metric._replace(score=score)


def _check_best_score(built: Built) -> None:
    """Raises a UserError if `config.checkpoint.best` names a score that evaluations do not compute."""
    best = built.experiment.checkpoint.get("best")
    if best is not None:
        check_score(built, best, "config.checkpoint.best")


def check_score(built: Built, name: str, key: str) -> None:
    """Raises a UserError unless evaluations compute a score of that name.

    Args:
      built: the experiment.
      name: the score.
      key: the key that names it.
    """
    if name == "eval_loss":
        return
    names = built.metric.names or _score_names(built)
    if name not in names:
        names = (*names, "eval_loss")
        raise UserError(
            f"{key} = {name!r} is no score of this task{nearest(name, names)}"
        )


def _score_names(built: Built) -> tuple[str, ...]:
    """Returns the names of an evaluation's scores, without "eval_loss"; the metric must not need outputs of each example."""

    def measure(batch):
        key = jax.random.key(0)
        x = built.data.inputs(batch)
        (logits, _), _ = built.model.init_with_output(key, x, train=False)
        return built.metric.measure(logits, batch)

    sums, _ = jax.eval_shape(measure, built.data.specs(1)[-1])
    scores = built.metric.score(dict.fromkeys(sums, 0.0), {})
    return tuple(name for name in scores if name != "eval_loss")
