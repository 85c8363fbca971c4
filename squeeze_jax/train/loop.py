"""The one training loop. Nobody forks it: methods come in through the step's five plug points.

A run is one or more phases; `run` is called once for each.
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

# Steps in flight: enough to hide the dispatch, few enough that a request to stop is soon heard.
RUN_AHEAD = 2


class Interrupted(Reported):
    """The run was asked to stop, has saved, and can go on later."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped at step {step} and saved; run the same command again to continue"
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
    """Trains until `state.step == steps`.

    Args:
      step: the compiled step; it may consume its state (donation).
      state: where to begin.
      batches: this process's part of the global batches, beginning at the state's position.
      key: the run's key; the step folds its number in.
      steps: when to stop, counted over all phases.
      batch: global batch size, for examples/s and the position in the data.
      put: places a numpy batch on the devices.
      evaluate: state → {"eval_loss", "eval_accuracy", ...}.
      log: where metrics go.
      checkpoints: where states go.
      config: stored in each checkpoint.
      note: stored there too: the phase and the network's options.
      first: the step at which this phase began; its data began there.
      log_every, eval_every, save_every: cadences in steps; 0 means only at the end.
      learning_rate: step of this phase → value, to be logged.

    Each record of training tells, in `examples_crc32`, which examples this process has seen since the one before: two
    runs that saw the same examples in the same order have the same records.

    A state is saved before it is evaluated; an evaluation that fails loses no training.

    Raises:
      UserError: the loss is not finite; names the step and the last good checkpoint.
      Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    pending, waited, digest, since = [], 0.0, 0, time.perf_counter()
    begun = int(state.step)

    def flushed(at: int) -> dict[str, float]:
        """Returns the record of the pending steps, or {}; raises a UserError where they diverged."""
        nonlocal pending, waited, digest, since
        if not pending:
            return {}
        means = _means(jax.device_get(pending), at - len(pending) + 1, checkpoints)
        spent = time.perf_counter() - since
        missing = len(pending) * (batch - means.pop("examples"))
        record = means | {
            "examples_per_s": len(pending) * batch / spent,
            "input_wait": waited / spent,
            "skipped": round(missing),
        }
        if learning_rate is not None:
            record["learning_rate"] = float(learning_rate(at - 1 - first))
        record["examples_crc32"] = digest
        pending, waited, digest, since = [], 0.0, 0, time.perf_counter()
        return record

    def due(at: int, every: int) -> bool:
        return at == steps or (every > 0 and at % every == 0)

    def scored(at: int) -> None:
        evaluated = evaluate(state)
        log.evaluation(at, evaluated)
        checkpoints.score(at, evaluated)

    with stop.listening():
        if begun > first and due(begun, eval_every) and not checkpoints.scored(begun):
            scored(begun)  # the run ended between saving and evaluating
        for at in range(begun + 1, steps + 1):
            begin = time.perf_counter()
            rows = next(batches)
            placed = put(rows)
            waited += time.perf_counter() - begin
            digest = zlib.crc32(rows["index"].tobytes(), digest)
            state, metrics = step(state, placed, key)
            pending.append(metrics)
            if len(pending) > RUN_AHEAD:
                jax.block_until_ready(pending[-1 - RUN_AHEAD])
            log.tick(at)
            number = _agreed(at % log_every == 0 or at == begun + 1)
            saving = due(at, save_every) or due(at, eval_every) or number
            if saving or due(at, log_every):
                record = flushed(at)
                try:
                    if record:
                        log.train(at, record)
                finally:  # a full disk must not lose the training
                    if saving:
                        checkpoints.save(state, (at - first) * batch, config, note)
            if number:
                checkpoints.wait()
                raise Interrupted(number, at)
            if due(at, eval_every):
                scored(at)
            if saving:
                since = time.perf_counter()  # the next rate is of training alone
        checkpoints.wait()
        if number := _agreed(meeting=True):  # during the last evaluation, say
            raise Interrupted(number, steps)
    return state


def evaluate(
    step: Callable,
    variables,
    batches: Iterator[dict],
    put: Callable,
    score: Callable[[dict, dict], dict[str, float]],
) -> dict[str, float]:
    """Runs an evaluation step over finite batches and returns what `score` makes of its sums and rows.

    Args:
      step: (variables, batch) → (sums, rows), see `step.make_evaluation`.
      variables: of the network.
      batches: numpy.
      put: places a batch on the devices.
      score: see `metrics._metric.Metric`.
    """
    found = []
    for batch in batches:
        if jax.process_count() == 1:
            stop.check()
        found.append(step(variables, put(batch)))
    found = jax.device_get(found)
    sums = {k: _total([s[k] for s, _ in found]) for k in found[0][0]}
    rows = {
        k: np.concatenate([r[k][r["mask"]] for _, r in found])
        for k in found[0][1]
        if k != "mask"
    }
    return score(sums, rows)


def _total(parts: list[np.ndarray]) -> float | np.ndarray:
    """Adds up over batches: returns a number, or an array with 64 bits, so that large counts stay exact."""
    if np.ndim(parts[0]) == 0:
        return float(np.sum(parts))
    wide = np.int64 if np.issubdtype(parts[0].dtype, np.integer) else np.float64
    return np.sum(parts, axis=0, dtype=wide)


def _means(
    metrics: list[dict], first: int, checkpoints: Checkpoints
) -> dict[str, float]:
    """Means over steps, after the check that every loss is finite."""
    for i, each in enumerate(metrics):
        # A gradient that is not finite has spoiled the weights already, whatever the loss before it was.
        worst = next(
            (k for k in ("loss", "grad_norm") if not np.isfinite(each.get(k, 0.0))),
            None,
        )
        if worst:
            checkpoints.wait()
            saved = checkpoints.steps()
            good = (
                f"the last good checkpoint is {checkpoints.directory / str(saved[-1])}"
                if saved
                else "none was saved"
            )
            raise UserError(
                f"the {worst} is {each[worst]} at step {first + i}; {good}; try a lower config.optim.lr, more"
                " config.optim.warmup, or config.optim.clip=1.0, in a new --workdir"
            )
    return {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}


def _agreed(meeting: bool) -> int:
    """Returns the signal to stop for, the same on every process; several processes compare notes only at meetings."""
    if jax.process_count() == 1:
        return stop.requested()
    if not meeting:
        return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(stop.requested()))))
