"""Checkpoints with Orbax: asynchronous, atomic, the newest N plus the best; a damaged one is noticed and skipped.

A checkpoint holds the state and a note: the position in the data (examples consumed in this phase), the config, the
phase, the network's options, and a checksum of every array, computed on the devices, so that it is the same for every
sharding and catches what a file system does not.
"""

import contextlib
import logging
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS
from squeeze_jax.nn.norm import SHARES
from squeeze_jax.ranges import Count
from squeeze_jax.train import forward, trees
from squeeze_jax.train.scores import Scores
from squeeze_jax.train.state import State

for noisy in (
    "absl",
    "orbax",
):  # what they report as errors of a damaged file comes as an exception too
    logging.getLogger(noisy).setLevel(logging.CRITICAL)


# Until methods of all plug points could own parameters, those of the losses stood under this name.
_OBJECTIVE = "objective"

_BESIDE = 2**18  # bytes of descriptions beside a state's arrays

Like = State | Callable[[Mapping[str, Any]], State] | Any


class Restored(NamedTuple):
    """A state and the note that was saved with it.

    Attributes:
      state: as it was.
      position: examples consumed in its phase.
      note: "config", and where they are known "phase" (from 0) and "options" of the network.
    """

    state: State
    position: int
    note: Mapping[str, Any] = {}


class _Kept(NamedTuple):
    """Orbax' question which checkpoints to keep, as a function of their steps."""

    of: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [each.step for each in checkpoints]
        kept = self.of(steps)
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        keep: Count = 2,
        best: str = "eval_accuracy",
        lowest: bool = False,
        use: Literal["newest", "best"] = "newest",
        read_only: bool = False,
    ):
        """Opens (and makes) `directory`.

        Args:
          directory: where they live, one sub-directory a step.
          keep: how many of the newest to keep, at least 1.
          best: the score of evaluations whose best checkpoint is kept besides; one that is not finite is never the best.
          lowest: whether the lowest value is the best, as of a loss; else the highest is.
          use: which of them a trained network is: the newest, or the best by `best`. Training always goes on from the
            newest.
          read_only: for a look while another process may be saving there.
        """
        self._use, self._best, self._read_only = use, best, read_only
        self._keep = keep
        self.directory = files.path(directory).absolute()
        self._scores = Scores(self.directory, best, lowest=lowest)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "note": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self._kept),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Returns which of these steps are kept: the newest ones and the best."""
        return {*sorted(steps)[-self._keep :], self._scores.best(steps)} & set(steps)

    def scored(self, step: int) -> bool:
        """Whether the state of a step was evaluated."""
        return step in self._scores

    def score(self, step: int, scores: Mapping[str, float]) -> None:
        """Records how the saved state of a step was evaluated, and removes what is the best no longer.

        Raises:
          UserError: the scores cannot be written down.
        """
        self.wait()
        steps = self.steps()
        if jax.process_index() == 0:
            self._scores.record(step, scores, steps)
        else:
            self._scores.remember(step, scores)
        for old in set(steps) - self._kept(steps):
            self._manager.delete(old)

    def save(
        self,
        state: State | Any,
        position: int = 0,
        config: Mapping[str, Any] | None = None,
        note: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
    ) -> None:
        """Starts saving; returns as soon as the arrays are copied off the devices' way.

        Args:
          state: what to save; or any pytree of arrays, see `trees.packed`.
          position: examples consumed in this phase.
          config: of the run.
          note: more to remember, such as {"phase": 0, "options": {...}}.
          step: under which a pytree is saved; None for its own `step`.

        Raises:
          DiskFull: there is no space for it; names the last good checkpoint.
          UserError: what a checkpoint cannot hold, or a pytree without a step.
        """
        if not isinstance(state, State):
            step = getattr(state, "step", None) if step is None else step
            if step is None or np.shape(step):
                raise UserError(
                    f"a {type(state).__name__} has no step: tell under which it is saved by step="
                )
            state = trees.packed(state, int(step))
        elif isinstance(state.step, int | np.generic):
            state = state._replace(step=jnp.asarray(state.step, jnp.int32))
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._check_space(step, state)
        note = {
            "position": position,
            "config": trees.plain(config or {}),
            "checksums": checksums(_to_dict(state)),
            **trees.plain(note or {}, "note"),
        }
        with self._writing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax warns of its own deprecations
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_to_dict(state)),
                    note=ocp.args.JsonSave(note),
                ),
            )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")

    def wait(self) -> None:
        """Returns when everything that was saved is on disk under its final name."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def _check_space(self, step: int, state: State) -> None:
        """Raises `DiskFull` where a state does not fit; a save that runs out of space in the middle leaves much behind."""
        arrays = sum(x.nbytes for x in jax.tree.leaves(_to_dict(state)))
        if shutil.disk_usage(self.directory).free < arrays + _BESIDE:
            raise self._full(f"step {step}, {(arrays + _BESIDE) / 1e6:.1f} MB")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax' own, of many kinds
            if files.is_full(error):
                raise self._full("a step") from None
            raise

    def _full(self, what: str) -> files.DiskFull:
        saved = self.steps()
        good = (
            f"the checkpoint of step {saved[-1]} is whole"
            if saved
            else "none was saved"
        )
        return files.DiskFull(
            f"cannot save {what}: no space left in {self.directory}; {good}: make space and run the same command again"
        )

    def trained(self, like: Like) -> Restored | None:
        """Restores the checkpoint that the trained network is, as `use` says; else as `restore`."""
        best = self._best_step()
        return self.restore(like) if best is None else self.restore(like, [best])

    def _best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None if the newest is to be used."""
        if self._use == "newest":
            return None
        best = self._scores.best(self.steps())
        if best is None:
            raise UserError(
                f"no checkpoint in {self.directory} was evaluated with a finite {self._best}: set config.eval_every, or"
                " config.checkpoint.use='newest'"
            )
        return best

    def note(self) -> Mapping[str, Any] | None:
        """Returns the note of the checkpoint that holds the trained network; None if none can be read."""
        best = self._best_step() if self.steps() else None
        for step in self.steps()[::-1] if best is None else [best]:
            # A damaged one is noticed and told of when it is read.
            with contextlib.suppress(Exception):
                return self._note(step)
        return None

    def _note(self, step: int) -> Mapping[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = ocp.args.Composite(note=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["note"] | {"step": step}

    def weights(self) -> dict[str, Any] | None:
        """Returns the trained network's variables for `forward.run`, numpy, whatever its shapes; None without a checkpoint.

        Of the steps the one that `use` names; averaged weights where the run has them.

        Raises:
          UserError: the checkpoint cannot be read, or was not evaluated.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        described = self._described(device)
        if described is None:
            return None
        restored = self.trained(
            lambda note: self._described(device, note["step"]) or described
        )
        return None if restored is None else jax.device_get(restored.state.variables())

    def network(self, like: Like) -> Restored | None:
        """Like `trained`, but only the network's parameters must match `like`.

        The optimizer's state and what losses learned are restored as they were saved.
        """

        def network_of(note):
            wanted = like(note) if callable(like) else like
            saved = self._described(wanted.step.sharding, note["step"])
            if saved is None:
                return wanted
            params = forward.parameters(wanted.params)
            own = saved.params.get(METHODS)
            params |= {METHODS: own} if own else {}
            ema = saved.ema and {"params": params, "stats": wanted.stats}
            return saved._replace(params=params, stats=wanted.stats, ema=ema)

        return self.trained(network_of)

    def _described(self, sharding, only: int | None = None) -> State | None:
        """Returns the shapes of a saved state, of one step or the newest, with the optimizer's arrays by name; None if unreadable."""
        for step in self.steps()[::-1] if only is None else [only]:
            # A damaged one is noticed and told of when it is read.
            with contextlib.suppress(Exception):
                saved = dict(self._manager.item_metadata(step)["state"])
                break
        else:
            return None
        found = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), saved
        )
        found = _renamed(found)
        return State(**found | {"ema": found["ema"] or None})

    def restore(
        self, like: Like, steps: Sequence[int] | None = None
    ) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Damaged ones before it are set aside as `damaged-STEP`, so that their steps can be saved again.

        Args:
          like: a state of ShapeDtypeStructs whose shardings say where the arrays should go; they need not be those
            of the run that saved it. Or a function from a checkpoint's note to such a state. Or a pytree like the one
            that was saved, which then is the `state` of what is returned.
          steps: the steps to try in turn; all from the newest on by default.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          UserError: the checkpoint is of another model (names the first parameters that differ and both shapes), or
            every checkpoint is damaged.
        """
        if not isinstance(like, State) and not callable(like):
            restored = self.restore(trees.packed(like, 0), steps)
            return restored and restored._replace(
                state=trees.unpacked(restored.state, like)
            )
        if isinstance(like, State) and isinstance(like.step, int | np.generic):
            like = like._replace(step=jnp.asarray(like.step, jnp.int32))
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

    def _restore(self, step: int, like: Like) -> Restored:
        note = self._note(step)
        like = like(note) if callable(like) else like
        expected = _to_dict(like)
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise OSError("the state's description is missing")
        # Earlier versions did not count the batches in running statistics.
        uncounted = SHARES not in (saved.get("extra") or {})
        expected, counted = _without_shares(expected) if uncounted else (expected, {})
        self._check_fit(step, expected, _renamed(dict(saved)))
        old = _OBJECTIVE in saved["params"]
        if old:
            expected = _old_names(expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(expected)),
            )["state"]
        wrong = [
            k for k, v in checksums(restored).items() if note["checksums"].get(k) != v
        ]
        if wrong:
            raise OSError(f"checksum of {wrong[0]} differs")
        if counted:
            whole = {SHARES: jax.tree.map(_one, counted)}
            restored = restored | {"extra": restored.get("extra", {}) | whole}
        state = _from_dict(_renamed(restored), like)
        return Restored(state, note["position"], note)

    def _check_fit(self, step, expected, saved) -> None:
        """Raises a UserError that names the first arrays that differ."""
        problems = [
            line
            for part in sorted(expected.keys() | saved.keys(), key=_params_first)
            for line in tree.differences(
                {part: expected.get(part, {})}, {part: saved.get(part) or {}}
            )
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit the model: {'; '.join(problems[:3])}{more}"
            )


def _without_shares(expected: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Splits a state's description into what earlier versions saved and the shares of batches in the statistics."""
    extra = dict(expected.get("extra", {}))
    counted = extra.pop(SHARES, {})
    kept = {k: v for k, v in expected.items() if k != "extra"}
    return kept | ({"extra": extra} if extra else {}), counted


def _one(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.ones(shape.shape, shape.dtype), shape.sharding)


def _params_first(part: str) -> tuple[bool, str]:
    return part != "params", part


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


def checksums(arrays) -> dict[str, int]:
    """A 32-bit sum over each array's bits, weighted by position; the same for every sharding."""
    sums = _checksums(tree.flatten(arrays))
    return {k: int(v) for k, v in jax.device_get(sums).items()}


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
    """Turns a state into plain dicts, which Orbax stores: the optimizer's named tuples and a carry become flat names."""
    arrays = {
        "step": state.step,
        "params": state.params,
        "stats": state.stats,
        "opt": tree.flatten(state.opt),
        "ema": state.ema or {},
    }
    if state.extra is not None:
        arrays["extra"] = state.extra
    if state.carry is not None:
        arrays["carry"] = tree.flatten(state.carry)
    return arrays


def _from_dict(saved: dict[str, Any], like: State) -> State:
    def structured(part):
        whole = getattr(like, part)
        leaves = [saved[part][n] for n in tree.flatten(whole)]
        return jax.tree.unflatten(jax.tree.structure(whole), leaves)

    return State(
        saved["step"],
        saved["params"],
        saved["stats"],
        structured("opt"),
        saved["ema"] or None,
        saved.get("extra"),
        structured("carry") if "carry" in saved else None,
    )


def _renamed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the arrays of an earlier version: moves the losses' parameters to those of the methods."""

    def moved(params):
        if _OBJECTIVE not in params:
            return params
        rest = {k: v for k, v in params.items() if k != _OBJECTIVE}
        return rest | {METHODS: params[_OBJECTIVE]}

    found = dict(saved) | {"params": moved(saved["params"])}
    if ema := saved.get("ema"):
        found["ema"] = {**ema, "params": moved(ema["params"])}
    opt = saved.get("opt") or {}
    found["opt"] = {
        k.replace(f"/{_OBJECTIVE}/", f"/{METHODS}/"): v for k, v in opt.items()
    }
    return found


def _old_names(expected: dict[str, Any]) -> dict[str, Any]:
    """Renames a state's description to the names of an earlier version, the inverse of `_renamed`."""

    def moved(params):
        rest = {k: v for k, v in params.items() if k != METHODS}
        return rest | ({_OBJECTIVE: params[METHODS]} if METHODS in params else {})

    found = expected | {"params": moved(expected["params"])}
    if "params" in expected["ema"]:
        found["ema"] = expected["ema"] | {"params": moved(expected["ema"]["params"])}
    found["opt"] = {
        k.replace(f"/{METHODS}/", f"/{_OBJECTIVE}/"): v
        for k, v in expected["opt"].items()
    }
    return found
