"""An experiment: what a config file describes, checked as a whole, and built as far as every job needs it.

Each section of the config is splatted into exactly one function, whose signature is the section's schema:

    data → data.make            model → models.make         optim → train.optim.make
    objective, transforms, weights, exchange → `make` of the method file they name, such as "comm.mean"
    sharding → train.sharding.make_mesh      checkpoint → train.checkpoint.Checkpoints
    export → ExportSettings     benchmark → BenchmarkSettings     cost → CostSettings, below
"""

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

import squeeze_jax
from squeeze_jax import data, models, registry, tree
from squeeze_jax.cost import program
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.train import optim, sharding
from squeeze_jax.train import state as states
from squeeze_jax.train.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The keys of a config.

    Attributes:
      data, model, optim: which data, network, optimizer and schedule.
      steps: updates of the whole run.
      batch: examples of one update, over all devices and accumulated parts.
      seed: of weights, order of examples, augmentation and dropout.
      dtype: of the computation; master weights stay float32.
      accumulate: parts that a batch is split into, one after the other.
      ema: decay of averaged weights, 0 for none; they are what is evaluated and exported.
      objective: the loss, by method file.
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
    model: dict
    optim: dict
    steps: int
    batch: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    ema: float = 0.0
    objective: dict = dataclasses.field(
        default_factory=lambda: {"name": "train.cross_entropy"}
    )
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
class ExportSettings:
    """The keys of `config.export`.

    Attributes:
      formats: names of files in `export/formats`.
      calibration: training images that the ranges of integer formats are measured on.
      check: test images on which each file must agree with the live model.
      tolerance: largest difference of a float file's logits, relative to the largest logit where that is above 1.
      int8_agreement: share of check images whose top class an integer file must share, 0..1.
    """

    formats: tuple = ("stablehlo", "tflite", "tflite_int8")
    calibration: int = 256
    check: int = 128
    tolerance: float = 1e-4
    int8_agreement: float = 0.95


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """The keys of `config.benchmark`.

    Attributes:
      runs: timed runs of each file at batch 1.
      warmup: runs before them.
    """

    runs: int = 200
    warmup: int = 20


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """The keys of `config.cost`.

    Attributes:
      weight_bits: of all weights; or ordered (regex, bits) rules over parameter names, 32 where none matches.
      activation_bits: of activations.
      latency: whether to run the network and measure where its time goes.
      runs: timed runs.
      warmup: runs before them.
      batch: images at a time in these runs; all other costs are of one image.
      cores: confines them to so many cores of the CPU, in a process of their own; None runs them on JAX's default
        device, and on a CPU on all cores.
    """

    weight_bits: int | tuple = 8
    activation_bits: int = 8
    latency: bool = False
    runs: int = 100
    warmup: int = 10
    batch: int = 1
    cores: int | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """An experiment's parts, before any state exists."""

    experiment: Experiment
    data: data.Data
    model: nn.Module
    tx: optax.GradientTransformation
    objective: Callable
    weights: tuple[Callable, ...]
    exchange: Callable | None
    mesh: Mesh
    export: ExportSettings
    benchmark: BenchmarkSettings
    cost: CostSettings

    def create(self) -> states.State:
        """The initial state, initialised on the devices where its shardings put it."""
        key = jax.random.key(self.experiment.seed)
        placed = jax.tree.map(lambda x: x.sharding, self.abstract())
        create = jax.jit(self._create, out_shardings=placed).lower(key)
        # It runs once: on the CPU, optimizing it would take longer than all it computes.
        quick = {"xla_backend_optimization_level": 0}
        return create.compile(quick if jax.default_backend() == "cpu" else {})(key)

    def abstract(self) -> states.State:
        """The state's shapes with their shardings.

        Raises:
          UserError: images too small for the network, or sharding rules that do not fit it.
        """
        return self._abstract

    @functools.cached_property
    def _abstract(self) -> states.State:
        shapes = jax.eval_shape(self._create, jax.random.key(0))
        rules = self.experiment.sharding.get("rules", ())
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.shard_state(shapes, self.mesh, rules),
        )

    def _create(self, key):
        e = self.experiment
        return states.create(self.model, self.tx, self.data.shape, key, ema=e.ema > 0)


def check(config: Mapping[str, Any]) -> Experiment:
    """Checks the config's top level.

    Raises:
      UserError: unknown or missing key, value of another type or out of range.
    """
    registry.check(Experiment, config, "config")
    experiment = Experiment(**config)
    counts = ("steps", "batch", "accumulate", "log_every")
    _counts({k: getattr(experiment, k) for k in counts}, "config")
    for key in ("eval_every", "save_every", "seed"):
        if getattr(experiment, key) < 0:
            raise UserError(
                f"config.{key} = {getattr(experiment, key)} should not be negative"
            )
    if experiment.seed >= 2**31:
        raise UserError(f"config.seed = {experiment.seed} should be below 2**31")
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
    _counts(e.checkpoint, "config.checkpoint")
    tx = optim.make(steps=e.steps, **e.optim)
    objective = method(e.objective, "config.objective")
    transforms = [method(t, "config.transforms") for t in e.transforms]
    for section, made in zip(e.transforms, transforms, strict=True):
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                f"config.transforms: {section['name']!r} makes no gradient transform; it belongs to another key"
            )
    weights = tuple(method(w, "config.weights") for w in e.weights)
    exchange = method(e.exchange, "config.exchange") if e.exchange else None
    registry.check(data.make, e.data, "config.data")
    source = data.make(**e.data)
    registry.check(models.make, e.model, "config.model")
    network = registry.load("squeeze_jax.models", e.model["name"], "model")
    reads = getattr(network, "INPUTS", "images")
    if reads != "images":
        raise UserError(
            f"config.model.name = {e.model['name']!r} reads {reads}, but config.data gives images: choose a network for images"
        )
    model = models.make(**{"num_classes": source.num_classes} | dict(e.model))
    classes = e.model.get("num_classes", source.num_classes)
    if classes < source.num_classes:
        raise UserError(
            f"config.model.num_classes = {classes}, but the data's labels go up to {source.num_classes - 1}; leave the"
            f" key out or set it to {source.num_classes}"
        )
    export = _settings(ExportSettings, e.export, "config.export")
    for key in export.formats:
        registry.load("squeeze_jax.export.formats", key, "export format")
    built = Built(
        experiment=e,
        data=source,
        model=model,
        tx=optax.chain(tx, *transforms),
        objective=objective,
        weights=weights,
        exchange=exchange,
        mesh=mesh,
        export=export,
        benchmark=_settings(BenchmarkSettings, e.benchmark, "config.benchmark"),
        cost=_settings(CostSettings, e.cost, "config.cost"),
    )
    state = (
        built.abstract()
    )  # finds what does not fit the network: its images, sharding rules, decay rules
    jax.eval_shape(lambda s: tx.update(s.params, tx.init(s.params), s.params), state)
    _bits(built.cost, state.params)
    return built


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


def _settings(kind: type, section: Mapping[str, Any], where: str):
    """Builds a dataclass of settings from its section; counts start at 1."""
    registry.check(kind, section, where)
    made = kind(**section)
    _counts(dataclasses.asdict(made), where)
    return made


def _counts(section: Mapping[str, Any], where: str) -> None:
    """Raises a UserError where an integer is below 1."""
    for key, value in section.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{where}.{key} = {value} should be at least 1")


def method(section: Mapping[str, Any], where: str):
    """Builds the method that a section names: `{"name": "package.file", **arguments of its make}`."""
    if not isinstance(section, Mapping) or "name" not in section:
        raise UserError(
            f"{where} should be a dict with a name such as 'comm.mean', not {section!r}"
        )
    package, _, file = section["name"].partition(".")
    there = {info.name for info in pkgutil.iter_modules(squeeze_jax.__path__)}
    packages = there & {"comm", "distill", "nas", "prune", "quantize", "train"}
    if package not in packages or not file:
        raise UserError(
            f"{where}.name = {section['name']!r} should be package.file{nearest(package, packages)}"
        )
    module = registry.load(f"squeeze_jax.{package}", file, f"method of {package}")
    if not hasattr(module, "make"):
        raise UserError(
            f"{where}.name = {section['name']!r} is no method: that file has no function make"
        )
    arguments = {k: v for k, v in section.items() if k != "name"}
    registry.check(module.make, arguments, where)
    return module.make(**arguments)
