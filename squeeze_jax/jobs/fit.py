"""Trains the experiment, or goes on where an earlier run of the same work directory stopped."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _pretrained, _teachers
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import loop, optim, sharding
from squeeze_jax.train import step as steps
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.log import Log
from squeeze_jax.train.state import State, network

BEGINS = True  # a run, where the work directory holds none yet


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Trains to the end; the final state is in the newest checkpoint.

    Raises:
      UserError: the loss is not finite, or the checkpoints or the network to begin with do not fit.
      loop.Interrupted: stopped by a signal, and saved.
    """
    if inputs:
        raise UserError(f"the job fit takes no files: {inputs[0]}")
    with Steps(built) as step:
        to_the_end(built, workdir, step)


def to_the_end(built: Built, workdir: pathlib.Path, step: "Steps") -> None:
    """Trains, see `run`; what `step` has compiled may have served runs that differ in nothing but their seeds."""
    main = jax.process_index() == 0
    say = print if main else lambda *_: None
    say(plan(built, workdir))
    directory = workdir / "checkpoints"
    settings = {"best": built.metric.headline} | built.experiment.checkpoint
    with contextlib.closing(Checkpoints(directory, **settings)) as checkpoints:
        abstract = built.abstract()
        restored = checkpoints.restore(abstract)
        start = int(restored.state.step) if restored else 0
        given = {} if restored else built.given()
        if main:
            _pretrained.note(workdir, built.options, settings)
        if start == built.experiment.steps:
            say("trained    already, to the last step")
            return
        step.prepare(say)
        say(f"memory     {memory(step.largest)}\n")
        if restored:
            say(f"continuing from the checkpoint of step {start}")
        begin = restored or Restored(built.create(given), 0)
        with contextlib.closing(
            Log(workdir, built.experiment.steps, start=start, quiet=not main)
        ) as log:
            train(built, step, begin, log, checkpoints)


def train(
    built: Built, step: "Steps", begin: Restored, log: Log, checkpoints: Checkpoints
) -> State:
    """Runs the loop from a state and its position in the data to the last step."""
    e = built.experiment
    process = (jax.process_index(), jax.process_count())
    # The key is the run's alone; the step folds its own number in, so a continued run draws what it would have drawn.
    one = sharding.replicated(built.mesh)
    key = jax.jit(lambda: jax.random.key(e.seed + 1), out_shardings=one)()
    with contextlib.closing(
        built.data.train(e.batch, e.seed, begin.position, process)
    ) as batches:
        return loop.run(
            step,
            begin.state,
            batches,
            key,
            steps=e.steps,
            batch=e.batch,
            put=step.put,
            evaluate=step.evaluate,
            log=log,
            checkpoints=checkpoints,
            config=dataclasses.asdict(e),
            log_every=e.log_every,
            eval_every=e.eval_every,
            save_every=e.save_every,
            learning_rate=optim.schedule_of(e.optim, e.steps),
        )


def put(batch: Mapping[str, np.ndarray], built: Built) -> dict[str, jax.Array]:
    """Places what of a batch goes to the devices."""
    names = built.data.specs(1)[-1]
    arrays = {k: batch[k] for k in names if k in batch}  # a test set has no labels
    arrays["index"] = batch["index"].astype(np.int32)
    return sharding.put_batch(arrays, built.mesh)


def evaluator(built: Built) -> Callable[[State], dict[str, float]]:
    """Returns `state → scores` over the whole evaluation set, such as {"eval_loss", "eval_accuracy"}."""
    metric = built.metric
    step = evaluation_step(built, metric.measure)
    return lambda state: evaluation(
        built, state, built.data.eval, metric.measure, metric.score, step
    )


def evaluation_step(built: Built, measure: Callable) -> Callable:
    """The jitted step of an evaluation, see `steps.make_evaluation`."""
    step = steps.make_evaluation(
        built.model,
        measure,
        inputs=built.data.inputs,
        weights=built.weights,
        dtype=built.experiment.dtype,
    )
    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def evaluation(
    built: Built,
    state: State,
    batches: Callable,
    measure: Callable,
    score: Callable,
    step: Callable | None = None,
):
    """What `score` makes of all that `measure` finds.

    Args:
      built, state: the experiment and the trained network.
      batches: (batch, process) → the examples, as `data.eval`.
      measure, score: see `metrics._metric.Metric`.
      step: of `evaluation_step`; None for a new one.
    """
    e, mesh = built.experiment, built.mesh
    shards = math.prod(mesh.shape[a] for a in sharding.BATCH)
    batch = math.ceil(min(e.batch, built.data.num_eval) / shards) * shards
    return loop.evaluate(
        step or evaluation_step(built, measure),
        state.variables(),
        batches(batch, (jax.process_index(), jax.process_count())),
        lambda rows: put(rows, built),
        score,
    )


class Steps:
    """The training step, compiled for each of the shapes that batches come in, and the evaluation; in a `with` statement.

    Attributes:
      evaluate: state → scores, see `evaluator`.
    """

    def __init__(self, built: Built):
        self._built, self._lessons = built, None
        self._specs = {_shapes(s): s for s in built.data.specs(built.experiment.batch)}
        self._compiled, self._open = {}, contextlib.ExitStack()
        self.evaluate = evaluator(built)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *raised) -> None:
        self._open.close()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Lets the teachers speak, where there are any, and compiles for the largest shape; others follow when they come.

        Args:
          say: prints a line.
        """
        if self._lessons is None:
            lessons = _teachers.open(self._built, say)
            self._lessons = self._open.enter_context(lessons)

    @property
    def largest(self):
        """The compiled step of the largest shape."""
        return self._of(list(self._specs)[-1])

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a batch, with what the teachers' outputs on disk say of it."""
        placed = put(batch, self._built)
        if given := self._lessons.rows(batch):
            placed["teacher"] = given
        return placed

    def __call__(self, state: State, batch: dict, key: jax.Array):
        names = self._built.data.specs(1)[-1]
        compiled = self._of(_shapes({k: batch[k] for k in names}))
        return compiled(state, batch, key, *self._lessons.frozen)

    def _of(self, shapes):
        if shapes not in self._compiled:
            spec = self._specs[shapes]
            self._compiled[shapes] = compile_step(self._built, spec, self._lessons)
        return self._compiled[shapes]


def _shapes(arrays) -> tuple:
    return tuple((name, tuple(arrays[name].shape)) for name in sorted(arrays))


def compile_step(built: Built, spec, lessons: _teachers.Lessons):
    """Compiles the training step for the shapes and shardings it will get.

    Args:
      built: the experiment.
      spec: shapes of a batch.
      lessons: of teachers.
    """
    e, mesh, abstract = built.experiment, built.mesh, built.abstract()
    step = steps.make(
        built.model,
        built.tx,
        built.objective.loss,
        prepare=built.data.augment,
        inputs=built.data.inputs,
        teach=lessons.teach,
        weights=built.weights,
        exchange=built.exchange,
        mesh=mesh,
        dtype=e.dtype,
        accumulate=e.accumulate,
        ema=e.ema,
    )
    rows, one = sharding.over_batch(mesh), sharding.replicated(mesh)
    spec = dict(spec) | {"index": jax.ShapeDtypeStruct((e.batch,), jnp.int32)}
    if more := lessons.spec(spec):
        spec["teacher"] = more
    batch, key, frozen = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        (spec, jax.eval_shape(lambda: jax.random.key(0)), lessons.frozen),
        (
            jax.tree.map(lambda _: rows, spec),
            one,
            jax.tree.map(lambda _: one, lessons.frozen),
        ),
    )
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    return (
        jax.jit(step, donate_argnums=0, out_shardings=(placed, one))
        .lower(abstract, batch, key, *frozen)
        .compile()
    )


def plan(built: Built, workdir: pathlib.Path) -> str:
    """What is about to be done, a line for each part."""
    e, data, mesh = built.experiment, built.data, built.mesh
    shapes = built.abstract()
    params = network(shapes.params)
    variables = {"params": params, "batch_stats": shapes.stats}
    macs = count.macs(
        lambda v, x: built.model.apply(v, x, train=False)[0], variables, data.example()
    ).total
    variant = f" {built.options['variant']}" if "variant" in built.options else ""
    devices = jax.devices()
    local = e.batch // math.prod(mesh.shape[a] for a in sharding.BATCH)
    epochs = e.steps * e.batch / data.num_train
    optimizer = f"{e.optim.get('name', 'sgd')}, lr {e.optim['lr']:g} {e.optim.get('schedule', 'cosine')}"
    rows = {
        "work dir": str(workdir),
        "data": data.describe,
        "model": f"{built.options['name']}{variant}: {tree.size(params):,} parameters, {macs:,} MACs per {data.noun}",
        "mesh": f"{len(devices)} x {devices[0].device_kind}: "
        + " x ".join(f"{k} {v}" for k, v in mesh.shape.items()),
        "batch": f"{e.batch} = {local} a device"
        + (f", in {e.accumulate} parts" if e.accumulate > 1 else ""),
        "training": f"{e.steps:,} steps ({epochs:.1f} epochs), {optimizer}, {e.dtype}",
    }
    if built.begin is not None:
        rows["begins with"] = built.begin.where
    if built.teachers:
        rows["learns from"] = ", ".join(where for _, _, where in built.teachers)
    return "\n".join(f"{k:<10} {v}" for k, v in rows.items())


def memory(compiled) -> str:
    """XLA's own estimate of what the compiled step holds on each device."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "not known on this backend"
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    total = (
        arguments
        + temporary
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    ) / 2**20
    return f"{total:,.0f} MiB a device: state and batch {arguments / 2**20:,.0f}, intermediate {temporary / 2**20:,.0f}"
