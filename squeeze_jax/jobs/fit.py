"""Trains the experiment, or continues an earlier run in the same work directory."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import stop, tree
from squeeze_jax.cost import wire
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _compilation,
    _model_json,
    _phases,
    _plan,
    _teachers,
    _transitions,
    _workdir,
)
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.report import units
from squeeze_jax.train import loop, optim, sharding
from squeeze_jax.train import step as training_step
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.log import Log
from squeeze_jax.train.state import State

RUN = "begins"  # a run, unless the work directory holds one


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Checks what can be checked before the work directory is created.

    Raises:
      UserError: the command line names files, examples are damaged, a batch is larger than the dataset, or state and batch are
        larger than the memory.
    """
    if inputs:
        raise UserError(f"the job fit takes no files: {inputs[0]}")
    if line := getattr(built.data, "unreadable", ""):
        raise UserError(line)
    for index in range(max(1, len(built.whole.phases))):
        batch, examples = (
            _phases.at_phase(built.whole, index)[0].batch,
            built.data.num_train,
        )
        if batch > examples:
            raise UserError(
                f"config.batch = {batch} is more than the {examples:,} training examples: choose a smaller batch"
            )
    _check_memory(built)
    built.count_macs()  # traces the network in evaluation, which may fail where it trains


def _check_memory(built: Built) -> None:
    """Raises a UserError if a device's memory is too small for its share of the training state and of one batch alone."""
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(built.abstract())
    )
    spec = built.data.specs(built.experiment.batch)[-1]
    inputs = jax.eval_shape(built.data.inputs, spec)
    batch = tree.nbytes((dict(spec), inputs)) // sharding.batch_shards(built.mesh)
    memory, device = sharding.device_memory()
    if state + batch > memory:
        raise UserError(
            f"training needs at least {units.size(state + batch)} on each device, {units.size(state)} for the state and"
            f" {units.size(batch)} for a batch of inputs, and {device} has {units.size(memory)}: choose a smaller network,"
            " config.batch or config.data.size"
        )


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> Built:
    """Trains all phases to their end, and saves the final state as the newest checkpoint.

    Returns:
      The experiment in its last phase.

    Raises:
      UserError: the loss is not finite, or the checkpoints or the network of `config.init` do not fit.
      loop.Interrupted, stop.Stopped: a signal stopped the run; everything that was trained is saved.
    """
    ready(built, inputs)
    with CompiledPhases() as compiled:
        return train_phases(built, workdir, compiled)


def train_phases(
    built: Built, workdir: pathlib.Path, compiled: "CompiledPhases"
) -> Built:
    """Trains all phases that are left, see `run`.

    Args:
      built: the experiment in its first phase.
      workdir: the work directory; a checkpoint in it is continued.
      compiled: may already hold training steps, compiled for the same experiment with another seed.

    Returns:
      The experiment in its last phase.
    """
    main = jax.process_index() == 0
    say = print if main else lambda *_: None
    settings = built.checkpoints
    directory = workdir / "checkpoints"
    with contextlib.closing(Checkpoints(directory, **settings)) as checkpoints:
        try:
            built, restored = _transitions.resume(built, checkpoints, say)
        except UserError:
            # If the classes differ, that explains more than the shapes that differ with them.
            _model_json.check_data(workdir, built.data)
            raise
        say(_plan.plan(built, workdir))
        initial = {} if restored else built.initial_variables()
        if restored and main:
            _model_json.check_data(workdir, built.data)
        start = int(restored.state.step) if restored else 0
        if start == built.whole.steps and checkpoints.has_scores(start):
            _write_files(built, workdir)
            say("trained    already, to the last step")
            return built
        for line in _transitions.rehearse(built):
            say(line)
        if main:
            checkpoints.check_free_space(built.abstract())
        start_from = restored
        while True:
            if (
                start_from is None
                or start < built.phase.end
                or not checkpoints.has_scores(start)
            ):
                step = compiled.step_of(built, say)
                say(f"memory     {_plan.describe_memory(step.largest)}")
                if jax.device_count() > 1:
                    say(f"wire       {describe_wire(built, step)}")
                say("")
                if restored:
                    say(f"continuing from the checkpoint of step {start}")
                start_from = start_from or Restored(built.create(initial), 0)
                if jax.process_count() == 1:
                    stop.check()
                _write_files(built, workdir)
                last_state = train_phase(
                    built, step, start_from, workdir, checkpoints, quiet=not main
                )
            else:
                last_state = start_from.state
            if built.phase.end == built.whole.steps:
                return built
            built, state = _transitions.next_phase(built, last_state, say)
            _write_files(built, workdir)
            start_from, restored, start = Restored(state, 0), None, built.phase.first
            say(f"\n{_plan.plan(built, workdir)}")


def _write_files(built: Built, workdir: pathlib.Path) -> None:
    """Writes config.json and model.json; until then a run that is refused has changed no file of its work directory."""
    if jax.process_index() == 0:
        _workdir.write_config(workdir)
        _model_json.write(workdir, built.options, built.checkpoints, built.data)


def train_phase(
    built: Built,
    step: "CompiledStep",
    start_from: Restored,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    quiet: bool = False,
) -> State:
    """Trains one phase to its last step, and returns the last state.

    Args:
      built: the phase.
      step: the compiled training step and the evaluation.
      start_from: the state to start from, and its position in the data.
      workdir: the work directory, for the log.
      checkpoints: where states are saved.
      quiet: whether to print nothing.
    """
    e, phase = built.experiment, built.phase
    process = (jax.process_index(), jax.process_count())
    # One key for the whole run: the step folds its number in, so a continued run draws the same random numbers.
    replicated = sharding.replicated(built.mesh)
    key = jax.jit(lambda: jax.random.key(e.seed + 1), out_shardings=replicated)()
    seed = _phases.data_seed(e.seed, phase)
    start = int(start_from.state.step)
    with (
        contextlib.closing(
            Log(
                workdir,
                built.whole.steps,
                start=start,
                quiet=quiet,
                phase=phase.label,
                batch_norm=bool(jax.tree.leaves(start_from.state.stats)),
            )
        ) as log,
        contextlib.closing(
            built.data.train(e.batch, seed, start_from.position, process)
        ) as batches,
    ):
        return loop.run(
            step,
            start_from.state,
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
                "noted": _model_json.contents(
                    built.options, built.checkpoints, built.data
                ),
            },
            first=phase.first,
            log_every=e.log_every,
            eval_every=e.eval_every,
            save_every=e.save_every,
            learning_rate=optim.schedule_of(e.optim, e.steps),
        )


def put_batch(batch: Mapping[str, np.ndarray], built: Built) -> dict[str, jax.Array]:
    """Places on the devices those arrays of a batch that the step reads, and the examples' indices as int32."""
    names = built.data.specs(1)[-1]
    arrays = {k: batch[k] for k in names if k in batch}  # a test set has no labels
    arrays["index"] = batch["index"].astype(np.int32)
    return sharding.put_batch(arrays, built.mesh)


def make_evaluator(built: Built) -> Callable[[State], dict[str, float]]:
    """Returns a function from a state to its scores on the whole evaluation set, such as {"eval_loss", "eval_accuracy"}."""
    metric = built.metric
    step = make_evaluation_step(built, metric.measure)
    return lambda state: run_evaluation(
        built, state, built.data.eval, metric.measure, metric.score, step
    )


def make_evaluation_step(built: Built, measure: Callable) -> Callable:
    """Returns the jitted step of an evaluation, see `train.step.make_evaluation`."""
    step = training_step.make_evaluation(
        built.network, measure, inputs=built.data.inputs
    )
    replicated = sharding.replicated(built.mesh)
    if not built.carries:
        return jax.jit(step, out_shardings=replicated)
    return jax.jit(step, out_shardings=(replicated, sharding.over_batch(built.mesh)))


def run_evaluation(
    built: Built,
    state: State,
    batches: Callable,
    measure: Callable,
    score: Callable,
    step: Callable | None = None,
):
    """Runs the network on a set of examples; returns the result of `score` on everything that `measure` returned.

    Args:
      built: the experiment.
      state: the trained state; averaged weights are used if there are any.
      batches: (batch size, process) → the batches, such as `data.eval`.
      measure, score: see `metrics._metric.Metric`.
      step: of `make_evaluation_step`; None to make a new one.
    """
    e, mesh = built.experiment, built.mesh
    shards = sharding.batch_shards(mesh)
    batch = math.ceil(min(e.batch, built.data.num_eval) / shards) * shards
    step = step or make_evaluation_step(built, measure)
    return loop.evaluate(
        _with_carry(built, step, batch) if built.carries else step,
        state.variables(),
        batches(batch, (jax.process_index(), jax.process_count())),
        lambda rows: put_batch(rows, built),
        score,
    )


def _with_carry(built: Built, step: Callable, rows: int) -> Callable:
    """Returns an evaluation step that passes a recurrent network's carry from one batch to the next."""
    over_batch = sharding.over_batch(built.mesh)
    initial_carry = jax.jit(
        lambda: built.model.initial_carry(rows), out_shardings=over_batch
    )
    carry = initial_carry()

    def step_with_carry(variables, batch):
        nonlocal carry
        measured, carry = step(variables, batch, carry)
        return measured

    return step_with_carry


class CompiledPhases:
    """Compiles the training step of each phase once; used in a `with` statement."""

    def __init__(self):
        self._steps, self._open = {}, contextlib.ExitStack()

    def __enter__(self) -> "CompiledPhases":
        return self

    def __exit__(self, *raised) -> None:
        self._open.close()

    def step_of(self, built: Built, say: Callable[[str], None]) -> "CompiledStep":
        """Returns a phase's training step, ready to run.

        Args:
          built: the phase.
          say: prints a line.
        """
        step = self._step_of(built)
        step.prepare(say)
        return step

    def evaluate(self, built: Built, state: State) -> dict[str, float]:
        """Returns the scores of a state; see `make_evaluator`."""
        return self._step_of(built).evaluate(state)

    def _step_of(self, built: Built) -> "CompiledStep":
        key = built.phase.index, repr(built.options)
        if key not in self._steps:
            self._steps[key] = self._open.enter_context(CompiledStep(built))
        return self._steps[key]


class CompiledStep:
    """The training step of a phase, compiled for each shape of its batches, and the evaluation; used in a `with` statement.

    A call takes (state, batch, key) and returns (state, metrics).

    Attributes:
      evaluate: state → scores, see `make_evaluator`.
      teacher_outputs: supplies the teachers' outputs; None before `prepare`.
    """

    def __init__(self, built: Built):
        self._built, self.teacher_outputs, self._say = built, None, print
        batch_specs = built.data.specs(built.experiment.batch)
        self._specs = {_shape_key(spec): spec for spec in batch_specs}
        self._compiled, self._open = {}, contextlib.ExitStack()
        self.evaluate = make_evaluator(built)

    def __enter__(self) -> "CompiledStep":
        return self

    def __exit__(self, *raised) -> None:
        self._open.close()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Opens the teachers' outputs; an incomplete cache is filled first.

        Args:
          say: prints a line.
        """
        if self.teacher_outputs is None:
            opened = _teachers.open_outputs(self._built, say)
            self.teacher_outputs = self._open.enter_context(opened)
        self._say = say

    @property
    def largest(self):
        """Returns the compiled step for the largest shape of batches; compiles it at the first call."""
        return self._compiled_for(list(self._specs)[-1])

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a batch on the devices, with cached teacher outputs as "teacher" if there are any."""
        placed = put_batch(batch, self._built)
        if outputs := self.teacher_outputs.cached_outputs(batch):
            placed["teacher"] = outputs
        return placed

    def __call__(self, state: State, batch: dict, key: jax.Array):
        """Runs one training step: (state, batch, key) → (state, metrics)."""
        names = self._built.data.specs(1)[-1]
        compiled = self._compiled_for(_shape_key({k: batch[k] for k in names}))
        return compiled(state, batch, key, *self.teacher_outputs.step_arguments)

    def _compiled_for(self, shape_key):
        if shape_key not in self._compiled:
            spec = self._specs[shape_key]
            name = step_name(spec, len(self._compiled) + 1, len(self._specs))
            gradients = self._built.plugs.gradients
            if gradients is None or gradients.method.fused:
                announced = _compilation.compiling(self._say, name)
            else:
                self._say(
                    f"compiling  {name} in pieces, each when a step first needs it"
                )
                announced = contextlib.nullcontext()
            with announced:
                step = compile_step(self._built, spec, self.teacher_outputs)
            self._compiled[shape_key] = step
        return self._compiled[shape_key]


def step_name(spec: Mapping[str, Any], number: int, count: int) -> str:
    """Returns how a progress line calls a compiled training step; if there are several, it says why.

    Args:
      spec: {name: shape} of the step's batches, see `data.specs`.
      number: which of the steps it is, from 1.
      count: the number of steps: one for each shape of batches.
    """
    if count == 1:
        return "the training step"
    length = spec["tokens"].shape[-1]
    return (
        f"the training step for {length} tokens ({number} of {count}: one for each length of config.data.buckets and"
        " config.data.length)"
    )


def _shape_key(arrays) -> tuple:
    """Returns the names and shapes of a batch's arrays as a dict key."""
    return tuple((name, tuple(arrays[name].shape)) for name in sorted(arrays))


def compile_step(built: Built, spec, teacher_outputs: _teachers.TeacherOutputs):
    """Compiles the training step for one shape of batches, with the shardings that its arguments will have.

    Args:
      built: the experiment.
      spec: {name: shape} of a batch, see `data.specs`.
      teacher_outputs: supplies the teachers' outputs.

    Returns:
      (state, batch, key, *teacher_outputs.step_arguments) → (state, metrics); the state's memory is reused.
    """
    pieces, arguments = traceable_step(built, spec, teacher_outputs)
    state_shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
    shardings = state_shardings, sharding.replicated(built.mesh)
    options = dict(donate_argnums=0, out_shardings=shardings)
    step = training_step.compose(pieces, **options)
    if not pieces.fused:
        return step
    return jax.jit(step, **options).lower(*arguments).compile()


def traceable_step(
    built: Built, spec, teacher_outputs: _teachers.TeacherOutputs
) -> tuple:
    """Returns (the parts of the training step, its arguments as shapes with shardings); see `compile_step`."""
    e, mesh, abstract = built.experiment, built.mesh, built.abstract()
    pieces = training_step.parts(
        built.network,
        built.plugs.update,
        built.objective.terms,
        prepare=built.data.augment,
        inputs=built.data.inputs,
        teach=teacher_outputs.teach,
        gradients=built.plugs.gradients,
        exchange=built.plugs.exchange,
        mesh=mesh,
        accumulate=e.accumulate,
        ema=e.ema,
    )
    over_batch, replicated = sharding.over_batch(mesh), sharding.replicated(mesh)
    spec = dict(spec) | {"index": jax.ShapeDtypeStruct((e.batch,), jnp.int32)}
    if cached_shapes := teacher_outputs.cached_shapes(spec):
        spec["teacher"] = cached_shapes
    step_arguments = teacher_outputs.step_arguments
    batch, key, step_arguments = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        (spec, jax.eval_shape(lambda: jax.random.key(0)), step_arguments),
        (
            jax.tree.map(lambda _: over_batch, spec),
            replicated,
            jax.tree.map(lambda _: replicated, step_arguments),
        ),
    )
    return pieces, (abstract, batch, key, *step_arguments)


def describe_wire(built: Built, step: CompiledStep) -> str:
    """Returns a line about the bytes that each device sends to others in a training step."""
    if built.plugs.exchange is None and hasattr(step.largest, "as_text"):
        return wire.describe(wire.compiled_wire(step.largest)).removeprefix("wire ")
    spec = built.data.specs(built.experiment.batch)[-1]
    pieces, arguments = traceable_step(built, spec, step.teacher_outputs)
    if not pieces.fused:
        return "not known: the gradients are compiled in pieces"
    sent = wire.wire(training_step.compose(pieces), *arguments)
    return wire.describe(sent).removeprefix("wire ")
