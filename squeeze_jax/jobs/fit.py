"""Trains the experiment, or goes on where an earlier run of the same work directory stopped."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import stop
from squeeze_jax.cost import wire
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _compilation,
    _noted,
    _phases,
    _plan,
    _teachers,
    _transitions,
)
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import loop, optim, sharding
from squeeze_jax.train import step as steps
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.log import Log
from squeeze_jax.train.state import State

RUN = "begins"  # where the work directory holds none yet


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Checks what can be checked before a work directory is made.

    Raises:
      UserError: files on the command line, or a batch larger than the dataset.
    """
    if inputs:
        raise UserError(f"the job fit takes no files: {inputs[0]}")
    for index in range(max(1, len(built.whole.phases))):
        batch, examples = _phases.of(built.whole, index)[0].batch, built.data.num_train
        if batch > examples:
            raise UserError(
                f"config.batch = {batch} is more than the {examples:,} training examples: choose a smaller batch"
            )


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> Built:
    """Trains to the end; the final state is in the newest checkpoint.

    Returns:
      The experiment as it is in its last phase.

    Raises:
      UserError: the loss is not finite, or the checkpoints or the network to begin with do not fit.
      loop.Interrupted, stop.Stopped: stopped by a signal; what was trained is saved.
    """
    ready(built, inputs)
    with Compiled() as compiled:
        return to_the_end(built, workdir, compiled)


def to_the_end(built: Built, workdir: pathlib.Path, compiled: "Compiled") -> Built:
    """Trains, see `run`; `compiled` may hold steps that were compiled for the same experiment with another seed."""
    main = jax.process_index() == 0
    say = print if main else lambda *_: None
    settings = built.checkpoints
    directory = workdir / "checkpoints"
    with contextlib.closing(Checkpoints(directory, **settings)) as checkpoints:
        try:
            built, restored = _transitions.resumed(built, checkpoints)
        except (
            UserError
        ):  # other classes say more than the shapes that follow from them
            _noted.check_classes(workdir, built.data.label_names)
            raise
        say(_plan.plan(built, workdir))
        given = {} if restored else built.given()
        if main:
            if restored:
                _noted.check_classes(workdir, built.data.label_names)
            _noted.write(workdir, built.options, settings, built.data)
        start = int(restored.state.step) if restored else 0
        if start == built.whole.steps and checkpoints.has_scores(start):
            say("trained    already, to the last step")
            return built
        for line in _transitions.rehearsed(built):
            say(line)
        begin = restored
        while True:
            if (
                begin is None
                or start < built.phase.end
                or not checkpoints.has_scores(start)
            ):
                step = compiled.of(built, say)
                say(f"memory     {_plan.memory(step.largest)}")
                if jax.device_count() > 1:
                    say(f"wire       {on_the_wire(built, step)}")
                say("")
                if restored:
                    say(f"continuing from the checkpoint of step {start}")
                begin = begin or Restored(built.create(given), 0)
                if jax.process_count() == 1:
                    stop.check()
                end = train(built, step, begin, workdir, checkpoints, quiet=not main)
            else:
                end = begin.state
            if built.phase.end == built.whole.steps:
                return built
            built, state = _transitions.next_phase(built, end, say)
            begin, restored, start = Restored(state, 0), None, built.phase.first
            say(f"\n{_plan.plan(built, workdir)}")


def train(
    built: Built,
    step: "Steps",
    begin: Restored,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    quiet: bool = False,
) -> State:
    """Runs the loop from a state and its position in the data to the last step of a phase."""
    e, phase = built.experiment, built.phase
    process = (jax.process_index(), jax.process_count())
    # The key is the run's alone; the step folds its own number in, so a continued run draws what it would have drawn.
    one = sharding.replicated(built.mesh)
    key = jax.jit(lambda: jax.random.key(e.seed + 1), out_shardings=one)()
    seed = _phases.data_seed(e.seed, phase)
    start = int(begin.state.step)
    with (
        contextlib.closing(
            Log(
                workdir,
                built.whole.steps,
                start=start,
                quiet=quiet,
                phase=phase.label,
                batch_norm=bool(jax.tree.leaves(begin.state.stats)),
            )
        ) as log,
        contextlib.closing(
            built.data.train(e.batch, seed, begin.position, process)
        ) as batches,
    ):
        return loop.run(
            step,
            begin.state,
            batches,
            key,
            steps=phase.end,
            batch=e.batch,
            put=step.put,
            evaluate=step.evaluate,
            log=log,
            checkpoints=checkpoints,
            config=built.whole.config(),
            note={
                "phase": phase.index,
                "first": phase.first,
                "options": built.options,
                "forward": e.forward,
                "noted": _noted.of(built.options, built.checkpoints, built.data),
            },
            first=phase.first,
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
    step = steps.make_evaluation(built.network, measure, inputs=built.data.inputs)
    replicated = sharding.replicated(built.mesh)
    if not built.carries:
        return jax.jit(step, out_shardings=replicated)
    return jax.jit(step, out_shardings=(replicated, sharding.over_batch(built.mesh)))


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
    shards = sharding.batch_shards(mesh)
    batch = math.ceil(min(e.batch, built.data.num_eval) / shards) * shards
    step = step or evaluation_step(built, measure)
    return loop.evaluate(
        _carried(built, step, batch) if built.carries else step,
        state.variables(),
        batches(batch, (jax.process_index(), jax.process_count())),
        lambda rows: put(rows, built),
        score,
    )


def _carried(built: Built, step: Callable, rows: int) -> Callable:
    """Returns an evaluation step that hands a recurrent network's carry from one batch to the next."""
    over = sharding.over_batch(built.mesh)
    carry = jax.jit(lambda: built.model.initial_carry(rows), out_shardings=over)()

    def carried(variables, batch):
        nonlocal carry
        scored, carry = step(variables, batch, carry)
        return scored

    return carried


class Compiled:
    """The training steps of a run's phases, each compiled once; to be used in a `with` statement."""

    def __init__(self):
        self._steps, self._open = {}, contextlib.ExitStack()

    def __enter__(self) -> "Compiled":
        return self

    def __exit__(self, *raised) -> None:
        self._open.close()

    def of(self, built: Built, say: Callable[[str], None]) -> "Steps":
        """Returns the steps of a phase, compiled for the largest shape of batch.

        Args:
          built: the phase.
          say: prints a line.
        """
        steps_of_phase = self._of(built)
        steps_of_phase.prepare(say)
        return steps_of_phase

    def evaluate(self, built: Built, state: State) -> dict[str, float]:
        """Returns the scores of a state; see `evaluator`."""
        return self._of(built).evaluate(state)

    def _of(self, built: Built) -> "Steps":
        key = built.phase.index, repr(built.options)
        if key not in self._steps:
            self._steps[key] = self._open.enter_context(Steps(built))
        return self._steps[key]


class Steps:
    """The training step, compiled for each of the shapes that batches come in, and the evaluation; in a `with` statement.

    Attributes:
      evaluate: state → scores, see `evaluator`.
      lessons: of teachers; None before `prepare`.
    """

    def __init__(self, built: Built):
        self._built, self.lessons, self._say = built, None, print
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
        if self.lessons is None:
            lessons = _teachers.open(self._built, say)
            self.lessons = self._open.enter_context(lessons)
        self._say = say

    @property
    def largest(self):
        """The compiled step of the largest shape."""
        return self._of(list(self._specs)[-1])

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a batch, with what the teachers' outputs on disk say of it."""
        placed = put(batch, self._built)
        if rows := self.lessons.rows(batch):
            placed["teacher"] = rows
        return placed

    def __call__(self, state: State, batch: dict, key: jax.Array):
        names = self._built.data.specs(1)[-1]
        compiled = self._of(_shapes({k: batch[k] for k in names}))
        return compiled(state, batch, key, *self.lessons.frozen)

    def _of(self, shapes):
        if shapes not in self._compiled:
            spec = self._specs[shapes]
            with _compilation.compiling(self._say, "the training step"):
                step = compile_step(self._built, spec, self.lessons)
            self._compiled[shapes] = step
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
    pieces, arguments = traceable(built, spec, lessons)
    placed = jax.tree.map(lambda x: x.sharding, arguments[0])
    shardings = placed, sharding.replicated(built.mesh)
    options = dict(donate_argnums=0, out_shardings=shardings)
    step = steps.compose(pieces, **options)
    if not pieces.fused:
        return step
    return jax.jit(step, **options).lower(*arguments).compile()


def traceable(built: Built, spec, lessons: _teachers.Lessons) -> tuple:
    """Returns the parts of the step, and its arguments' shapes and shardings; see `compile_step`."""
    e, mesh, abstract = built.experiment, built.mesh, built.abstract()
    pieces = steps.parts(
        built.network,
        built.plugs.update,
        built.objective.terms,
        prepare=built.data.augment,
        inputs=built.data.inputs,
        teach=lessons.teach,
        gradients=built.plugs.gradients,
        exchange=built.plugs.exchange,
        mesh=mesh,
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
    return pieces, (abstract, batch, key, *frozen)


def on_the_wire(built: Built, step: "Steps") -> str:
    """Describes the bytes that each device sends in a step."""
    if built.plugs.exchange is None and hasattr(step.largest, "as_text"):
        return wire.describe(wire.compiled_wire(step.largest)).removeprefix("wire ")
    spec = built.data.specs(built.experiment.batch)[-1]
    pieces, arguments = traceable(built, spec, step.lessons)
    if not pieces.fused:
        return "not known: the gradients are compiled in pieces"
    sent = wire.wire(steps.compose(pieces), *arguments)
    return wire.describe(sent).removeprefix("wire ")
