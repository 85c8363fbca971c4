"""The training loop, which all runs share: methods enter through the five plug points of the training step.

A run has one or more phases; `run` is called once for each phase.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from squeeze_jax import stop
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.train.log import Log
from squeeze_jax.train.state import State

# Number of steps in flight: enough to hide the dispatch, few enough to react soon to a request to stop.
RUN_AHEAD = 2


class Interrupted(Reported):
    """The run was asked to stop and saved its state; the same command continues it.

    Attributes:
      step: the last step that was trained.
      status: exit status of the process, 128 plus the number of the signal.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"{stop.reason()}stopped at step {step} and saved; run the same command again to continue"
        )
        self.step, self.status = step, 128 + signum


def run(
    step: Callable[[State, dict, jax.Array], tuple[State, dict]],
    state: State,
    batches: Iterator[dict],
    key: jax.Array,
    *,
    steps: int,
    batch: int,
    put: Callable[[dict], dict],
    evaluate: Callable[[State], dict[str, float]],
    log: Log,
    checkpoints: Checkpoints,
    config: dict,
    note: Mapping[str, Any] | None = None,
    first: int = 0,
    log_every: int = 50,
    eval_every: int = 0,
    save_every: int = 0,
    learning_rate: Callable[[int], float] | None = None,
) -> State:
    """Trains until `state.step == steps`, and logs, saves and evaluates at the given intervals.

    Each training record has an entry `examples_crc32`: a checksum of the indices of the examples that this process used
    since the last record. Runs that use the same examples in the same order have the same checksums.

    A state is saved before it is evaluated, so that an evaluation that fails loses no training. It is also saved if a batch
    cannot be read, except with several processes, which save together.

    Args:
      step: the compiled training step, (state, batch, key) → (state, metrics); it may donate its state.
      state: the state to begin with.
      batches: this process's part of the global batches, from the state's position in the data on.
      key: the run's random key; the training step folds the step number into it.
      steps: the number of steps after which to stop, counted over all phases.
      batch: size of the global batch, for examples/s and the position in the data.
      put: places a numpy batch on the devices.
      evaluate: state → {"eval_loss", "eval_accuracy", ...}.
      log: receives the metrics.
      checkpoints: saves the states.
      config: the run's config, stored in each checkpoint.
      note: stored there too: the phase and the network's options.
      first: the step at which this phase and its data began.
      log_every: interval between training records in steps, at least 1.
      eval_every, save_every: intervals in steps; 0 means only at the end.
      learning_rate: step of this phase → learning rate, for the log.

    Raises:
      UserError: the loss or the norm of the gradients is not finite; the message names the step and the last checkpoint. Or
        a batch cannot be read.
      Interrupted: SIGINT or SIGTERM arrived; the state is saved.
    """
    pending, input_wait, digest, since = [], 0.0, 0, time.perf_counter()
    start = int(state.step)

    def flush(at: int) -> dict[str, float]:
        """Returns the record of the pending steps and clears them; {} if none are pending, a UserError if they diverged."""
        nonlocal pending, input_wait, digest, since
        if not pending:
            return {}
        means = _means(jax.device_get(pending), at - len(pending) + 1, checkpoints)
        seconds = time.perf_counter() - since
        missing = len(pending) * (batch - means.pop("examples"))
        record = means | {
            "examples_per_s": len(pending) * batch / seconds,
            "input_wait": input_wait / seconds,
            "skipped": round(missing),
        }
        if learning_rate is not None:
            record["learning_rate"] = float(learning_rate(at - 1 - first))
        record["examples_crc32"] = digest
        pending, input_wait, digest, since = [], 0.0, 0, time.perf_counter()
        return record

    def log_and_save(at: int, saves: bool) -> None:
        record = flush(at)
        try:
            if record:
                log.train(at, record)
        finally:  # a full disk must not lose the training
            if saves:
                checkpoints.save(state, (at - first) * batch, config, note)

    def next_batch(at: int) -> dict:
        """Returns the batch of a step; if it cannot be read, first saves the state of the step before it."""
        try:
            return next(batches)
        except Exception as error:
            if at - 1 == start or jax.process_count() > 1:
                raise
            log_and_save(at - 1, saves=True)
            checkpoints.wait()
            if not isinstance(error, UserError):
                raise
            raise UserError(
                f"{error}; step {at - 1} is saved, and the same command continues there"
            ) from None

    def is_due(at: int, every: int) -> bool:
        return at == steps or (every > 0 and at % every == 0)

    def evaluate_and_record(at: int) -> None:
        scores = evaluate(state)
        log.evaluation(at, scores)
        checkpoints.record_scores(at, scores)

    with stop.listening():
        evaluates = start > first and is_due(start, eval_every)
        if evaluates and not checkpoints.has_scores(start):
            evaluate_and_record(start)  # the run ended between saving and evaluating
        for at in range(start + 1, steps + 1):
            begin = time.perf_counter()
            host_batch = next_batch(at)
            device_batch = put(host_batch)
            input_wait += time.perf_counter() - begin
            digest = zlib.crc32(host_batch["index"].tobytes(), digest)
            state, metrics = step(state, device_batch, key)
            pending.append(metrics)
            if len(pending) > RUN_AHEAD:
                jax.block_until_ready(pending[-1 - RUN_AHEAD])
            log.tick(at)
            signum = _signal_to_stop(at % log_every == 0 or at == start + 1)
            saves = is_due(at, save_every) or is_due(at, eval_every) or signum
            if saves or is_due(at, log_every):
                log_and_save(at, saves)
            if signum:
                checkpoints.wait()
                raise Interrupted(signum, at)
            if is_due(at, eval_every):
                evaluate_and_record(at)
            if saves:
                # The next rate of examples counts the time of training alone.
                since = time.perf_counter()
        checkpoints.wait()
        # A signal may have arrived during the last evaluation.
        if signum := _signal_to_stop(communicate=True):
            raise Interrupted(signum, steps)
    return state


def evaluate(
    step: Callable,
    variables,
    batches: Iterator[dict],
    put: Callable,
    score: Callable[[dict, dict], dict[str, float]],
) -> dict[str, float]:
    """Runs an evaluation step over all batches and returns the scores that `score` computes from its results.

    Args:
      step: (variables, batch) → (sums, rows), see `step.make_evaluation`.
      variables: the network's variables, see `forward.run`.
      batches: finitely many numpy batches.
      put: places a batch on the devices.
      score: (sums, rows) → scores, see `metrics._metric.Metric`. `sums` are added up over the batches, and `rows` are
        joined over them, without examples that the mask leaves out.
    """
    results = []
    for batch in batches:
        if jax.process_count() == 1:
            stop.check()
        results.append(step(variables, put(batch)))
    results = jax.device_get(results)
    sums = {k: _total([s[k] for s, _ in results]) for k in results[0][0]}
    rows = {
        k: np.concatenate([r[k][r["mask"]] for _, r in results])
        for k in results[0][1]
        if k != "mask"
    }
    return score(sums, rows)


def _total(parts: list[np.ndarray]) -> float | np.ndarray:
    """Adds up the values of all batches: scalars to a float, arrays in 64 bits, so that large counts stay exact."""
    if np.ndim(parts[0]) == 0:
        return float(np.sum(parts))
    wide = np.int64 if np.issubdtype(parts[0].dtype, np.integer) else np.float64
    return np.sum(parts, axis=0, dtype=wide)


def _means(
    metrics: list[dict], first: int, checkpoints: Checkpoints
) -> dict[str, float]:
    """Returns the mean of each metric over steps.

    Args:
      metrics: one dict of scalars per step.
      first: number of the first of these steps, for the error.
      checkpoints: name the last checkpoint in the error.

    Raises:
      UserError: the loss or the norm of the gradients is not finite at a step.
    """
    for i, each in enumerate(metrics):
        # A gradient that is not finite has already destroyed the weights, even if the loss of that step was finite.
        diverged = next(
            (k for k in ("loss", "grad_norm") if not np.isfinite(each.get(k, 0.0))),
            None,
        )
        if diverged:
            checkpoints.wait()
            saved_steps = checkpoints.saved_steps()
            last = (
                f"the last good checkpoint is {checkpoints.directory / str(saved_steps[-1])}"
                if saved_steps
                else "none was saved"
            )
            advice = (
                "no update came before it: see whether inputs and labels fit config.objective, and the initial weights"
                if first + i == 1
                else "try a lower config.optim.lr, more config.optim.warmup, or config.optim.clip=1.0, in a new --workdir"
            )
            raise UserError(
                f"the {diverged} is {each[diverged]} at step {first + i}; {last}; {advice}"
            )
    return {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}


def _signal_to_stop(communicate: bool) -> int:
    """Returns the number of the signal that asks the run to stop, the same on every process; 0 if there is none.

    Args:
      communicate: whether several processes exchange their signals now; if not, they all return 0.
    """
    if jax.process_count() == 1:
        return stop.requested()
    if not communicate:
        return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(stop.requested()))))
