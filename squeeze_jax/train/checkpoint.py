"""Checkpoints with Orbax: asynchronous, atomic, the newest N plus the best; a damaged one is noticed and skipped.

A checkpoint holds the state, the position in the data (examples consumed), the config, and a checksum of every array,
computed on the devices, so that it is the same for every sharding and catches what a file system does not.
"""

import contextlib
import logging
import operator
import pathlib
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.train.state import OBJECTIVE, State, network

for noisy in ("absl", "orbax"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


class Restored(NamedTuple):
    """A state and where in the data it stood (examples consumed)."""

    state: State
    position: int


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        keep: int = 2,
        best: str = "eval_accuracy",
        use: Literal["newest", "best"] = "newest",
        read_only: bool = False,
    ):
        """Opens (and makes) `directory`.

        Args:
          directory: where they live, one sub-directory a step.
          keep: how many of the newest to keep, at least 1.
          best: the score of evaluations whose highest value is kept besides.
          use: which of them a trained network is: the newest, or the best by `best`. Training always goes on from the
            newest.
          read_only: for a look while another process may be saving there.
        """
        self._use, self._best, self._read_only = use, best, read_only
        self.directory = pathlib.Path(directory).absolute()
        newest = policies.LatestN(keep)
        score = operator.itemgetter(best)
        highest = policies.BestN(
            get_metric_fn=score,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "note": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, highest]),
                best_fn=score,  # makes Orbax write the metrics down
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: State,
        position: int,
        config: dict,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts saving; returns as soon as the arrays are copied off the devices' way."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        note = {"position": position, "config": config, "checksums": checksums(state)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax warns of its own deprecations
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_to_dict(state)),
                    note=ocp.args.JsonSave(note),
                ),
                metrics=metrics,
            )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")

    def wait(self) -> None:
        """Returns when everything that was saved is on disk under its final name."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def trained(self, like: State) -> Restored | None:
        """Restores the checkpoint that the trained network is, as `use` says; else as `restore`."""
        if self._use == "newest":
            return self.restore(like)
        scores = {step: self._manager.metrics(step) for step in self.steps()}
        scores = {
            step: m[self._best] for step, m in scores.items() if self._best in (m or {})
        }
        if not scores:
            raise UserError(
                f"no checkpoint in {self.directory} was evaluated: set config.eval_every, or"
                " config.checkpoint.use='newest'"
            )
        return self.restore(like, [max(scores, key=scores.get)])

    def weights(self) -> dict[str, Any] | None:
        """The trained network's {"params", "batch_stats"}, numpy arrays, whatever it is; None without a checkpoint.

        Of the steps the one that `use` names; averaged weights where the run has them.

        Raises:
          UserError: the checkpoint cannot be read, or was not evaluated.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        described = self._described(device)
        found = None if described is None else self.trained(described)
        return None if found is None else jax.device_get(found.state.variables())

    def network(self, like: State) -> Restored | None:
        """As `trained`, but only the network has to be that of `like`: not the optimizer, nor what an objective learnt."""
        saved = self._described(like.step.sharding)
        if saved is None:
            return self.trained(like) if self.steps() else None
        extra = (
            {OBJECTIVE: saved.params[OBJECTIVE]} if OBJECTIVE in saved.params else {}
        )
        params = network(like.params)
        ema = saved.ema and {"params": params | extra, "stats": like.stats}
        return self.trained(
            saved._replace(params=params | extra, stats=like.stats, ema=ema)
        )

    def _described(self, sharding: jax.sharding.Sharding) -> State | None:
        """The shapes of what was saved last, the optimizer's arrays by their names; None where nothing tells them."""
        for step in self.steps()[::-1]:
            # A damaged one is noticed and told of when it is read.
            with contextlib.suppress(Exception):
                saved = dict(self._manager.item_metadata(step)["state"])
                break
        else:
            return None
        found = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), saved
        )
        return State(**found | {"ema": found["ema"] or None})

    def restore(
        self, like: State, steps: Sequence[int] | None = None
    ) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Damaged ones before it are set aside as `damaged-STEP`, so that their steps can be saved again.

        Args:
          like: a state of ShapeDtypeStructs whose shardings say where the arrays should go; they need not be those
            of the run that saved it.
          steps: the steps to try in turn; all from the newest on by default.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          UserError: the checkpoint is of another model (names the first parameters that differ and both shapes), or
            every checkpoint is damaged.
        """
        steps, damaged = self.steps()[::-1] if steps is None else steps, []
        _hush_abandoned_reads()
        for step in steps:
            try:
                restored = self._restore(step, like)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes of Orbax
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                damaged.append(step)
                warnings.warn(
                    f"checkpoint {self.directory / str(step)} is damaged and skipped ({reason[:200]})",
                    stacklevel=2,
                )
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be read (tried {damaged}); remove the directory to start anew"
            )
        return None

    def _set_aside(self, damaged: Sequence[int]) -> None:
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self._manager.reload()

    def _restore(self, step: int, like: State) -> Restored:
        expected = _to_dict(like)
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise OSError("the state's description is missing")
        problems = [
            line
            for part in sorted(expected, key=lambda k: k != "params")
            for line in tree.differences({part: expected[part]}, {part: saved[part]})
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit the model: {'; '.join(problems[:3])}{more}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(expected),
                    note=ocp.args.JsonRestore(),
                ),
            )
        state = _from_dict(restored["state"], like)
        wrong = [
            k
            for k, v in checksums(state).items()
            if restored["note"]["checksums"].get(k) != v
        ]
        if wrong:
            raise OSError(f"checksum of {wrong[0]} differs")
        return Restored(state, restored["note"]["position"])


def _hush_abandoned_reads() -> None:
    """Keeps Python from printing what becomes of reads under way when Orbax gave a damaged checkpoint up.

    They end in threads that nobody waits for, and report to an event loop that is closed.
    """
    before = sys.unraisablehook
    if getattr(before, "hushes", None) is _hush_abandoned_reads:
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.hushes = _hush_abandoned_reads
    sys.unraisablehook = hook


def checksums(state) -> dict[str, int]:
    """A 32-bit sum over each array's bits, weighted by position; the same for every sharding."""
    return {
        k: int(v) for k, v in jax.device_get(_checksums(tree.flatten(state))).items()
    }


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(x):
        bits = (
            jax.lax.bitcast_convert_type(x, jnp.uint32)
            if x.dtype.itemsize == 4
            else x.astype(jnp.uint32)
        )
        bits = bits.reshape(-1)
        weight = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(
            2654435761
        ) | jnp.uint32(1)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return {k: one(x) for k, x in arrays.items()}


def _to_dict(state: State) -> dict[str, Any]:
    """Orbax stores plain containers only: the optimizer's named tuples become flat names."""
    return {
        "step": state.step,
        "params": state.params,
        "stats": state.stats,
        "opt": tree.flatten(state.opt),
        "ema": state.ema or {},
    }


def _from_dict(saved: dict[str, Any], like: State) -> State:
    opt = jax.tree.unflatten(
        jax.tree.structure(like.opt), [saved["opt"][n] for n in tree.flatten(like.opt)]
    )
    return State(
        saved["step"], saved["params"], saved["stats"], opt, saved["ema"] or None
    )
