"""Trains the experiment, or goes on where an earlier run of the same work directory stopped."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import loop, optim, sharding
from squeeze_jax.train import step as steps
from squeeze_jax.train.checkpoint import Checkpoints, Restored
from squeeze_jax.train.log import Log
from squeeze_jax.train.state import State

BEGINS = True  # a run, where the work directory holds none yet


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Trains to the end; the final state is in the newest checkpoint.

    Raises:
      UserError: the loss is not finite, or the checkpoints do not fit.
      loop.Interrupted: stopped by a signal, and saved.
    """
    if inputs:
        raise UserError(f"the job fit takes no files: {inputs[0]}")
    main = jax.process_index() == 0
    say = print if main else lambda *_: None
    say(plan(built, workdir))
    directory = workdir / "checkpoints"
    settings = built.experiment.checkpoint
    with contextlib.closing(Checkpoints(directory, **settings)) as checkpoints:
        abstract = built.abstract()
        restored = checkpoints.restore(abstract)
        start = int(restored.state.step) if restored else 0
        if start == built.experiment.steps:
            say("trained    already, to the last step")
            return
        step = compile_step(built, abstract)
        say(f"memory     {memory(step)}\n")
        if restored:
            say(f"continuing from the checkpoint of step {start}")
        begin = restored or Restored(built.create(), 0)
        with contextlib.closing(
            Log(workdir, built.experiment.steps, start=start, quiet=not main)
        ) as log:
            train(built, step, begin, log, checkpoints)


def train(
    built: Built, step, begin: Restored, log: Log, checkpoints: Checkpoints
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
            put=lambda batch: put(batch, built.mesh),
            evaluate=evaluator(built),
            log=log,
            checkpoints=checkpoints,
            config=dataclasses.asdict(e),
            log_every=e.log_every,
            eval_every=e.eval_every,
            save_every=e.save_every,
            learning_rate=optim.schedule_of(e.optim, e.steps),
        )


def put(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """What of a batch goes to the devices."""
    return sharding.put_batch({k: batch[k] for k in ("image", "label", "mask")}, mesh)


def evaluator(built: Built):
    """Returns `state → {"eval_loss", "eval_accuracy", "eval_top5"}` over the whole test set."""
    e, mesh = built.experiment, built.mesh
    shards = math.prod(mesh.shape[a] for a in sharding.BATCH)
    batch = math.ceil(min(e.batch, built.data.num_eval) / shards) * shards
    step = jax.jit(
        steps.make_evaluation(
            built.model,
            prepare=built.data.normalise,
            weights=built.weights,
            dtype=e.dtype,
        ),
        out_shardings=sharding.replicated(mesh),
    )
    process = (jax.process_index(), jax.process_count())

    def evaluate(state: State) -> dict[str, float]:
        batches = built.data.eval(batch, process)
        return loop.evaluate(step, state.variables(), batches, lambda b: put(b, mesh))

    return evaluate


def compile_step(built: Built, abstract: State):
    """Compiles the training step for the shapes and shardings it will get."""
    e, mesh = built.experiment, built.mesh

    def prepare(key, batch):
        batch = built.data.augment(key, batch)
        return batch | {"image": built.data.normalise(batch["image"])}

    step = steps.make(
        built.model,
        built.tx,
        built.objective,
        prepare=prepare,
        weights=built.weights,
        exchange=built.exchange,
        mesh=mesh,
        dtype=e.dtype,
        accumulate=e.accumulate,
        ema=e.ema,
    )
    rows, one = sharding.over_batch(mesh), sharding.replicated(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (e.batch, *built.data.shape), jnp.uint8, sharding=rows
        ),
        "label": jax.ShapeDtypeStruct((e.batch,), jnp.int32, sharding=rows),
        "mask": jax.ShapeDtypeStruct((e.batch,), jnp.bool_, sharding=rows),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=one)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    return (
        jax.jit(step, donate_argnums=0, out_shardings=(placed, one))
        .lower(abstract, batch, key)
        .compile()
    )


def plan(built: Built, workdir: pathlib.Path) -> str:
    """What is about to be done, a line for each part."""
    e, data, mesh = built.experiment, built.data, built.mesh
    shapes = built.abstract()
    h, w, c = data.shape
    image = jax.ShapeDtypeStruct((1, h, w, c), jnp.float32)
    variables = {"params": shapes.params, "batch_stats": shapes.stats}
    macs = count.macs(
        lambda v, x: built.model.apply(v, x, train=False)[0], variables, image
    ).total
    variant = f" {e.model['variant']}" if "variant" in e.model else ""
    devices = jax.devices()
    local = e.batch // math.prod(mesh.shape[a] for a in sharding.BATCH)
    epochs = e.steps * e.batch / data.num_train
    optimizer = f"{e.optim.get('name', 'sgd')}, lr {e.optim['lr']:g} {e.optim.get('schedule', 'cosine')}"
    rows = {
        "work dir": str(workdir),
        "data": f"{data.num_train:,} train + {data.num_eval:,} test images at {h}x{w}x{c}, {data.num_classes} classes",
        "model": f"{e.model['name']}{variant}: {tree.size(shapes.params):,} parameters, {macs:,} MACs an image",
        "mesh": f"{len(devices)} x {devices[0].device_kind}: "
        + " x ".join(f"{k} {v}" for k, v in mesh.shape.items()),
        "batch": f"{e.batch} = {local} a device"
        + (f", in {e.accumulate} parts" if e.accumulate > 1 else ""),
        "training": f"{e.steps:,} steps ({epochs:.1f} epochs), {optimizer}, {e.dtype}",
    }
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
