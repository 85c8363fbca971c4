"""Saves and restores checkpoints with Orbax.

Saving is asynchronous and atomic. A directory keeps the newest N checkpoints and the best one. `restore` detects damaged
checkpoints and skips them.

A checkpoint holds two items: the training state and a note. The note is a JSON dict with these keys:

    position    examples consumed in this phase, which is the position in the data
    config      the run's config
    checksums   a checksum of every array; it detects damaged arrays that the file system does not report
    checksums_over_bits    true; absent in checkpoints of earlier versions, whose checksums missed bits of narrow floats
    phase, options, …    the phase, the network's options, and what else the caller of `save` adds

Checksums are computed on the devices and do not depend on the sharding.
"""

import contextlib
import functools
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
from squeeze_jax.errors import UserError, message_of
from squeeze_jax.methods import METHODS
from squeeze_jax.nn.norm import SHARES
from squeeze_jax.ranges import Count
from squeeze_jax.train import forward, trees
from squeeze_jax.train.scores import Scores
from squeeze_jax.train.state import State

# Both libraries log the errors of damaged files. The same errors arrive as exceptions, so the log would repeat them.
for library in ("absl", "orbax"):
    logging.getLogger(library).setLevel(logging.CRITICAL)


# Earlier versions saved the parameters of losses under this key of `params`, and no other methods had parameters.
# Today the parameters of all methods stand under `METHODS`.
_OLD_METHODS = "objective"

# The key of a note whose checksums are over the bits of all arrays; in earlier versions some were over values.
_OVER_BITS = "checksums_over_bits"

_METADATA_BYTES = 2**18  # upper estimate of a checkpoint's files that hold no arrays

# What `restore` restores into: a state of `jax.ShapeDtypeStruct`s, a function from a checkpoint's note to such a state,
# or any other pytree.
Template = State | Callable[[Mapping[str, Any]], State] | Any


class Restored(NamedTuple):
    """A restored training state and the note that was saved with it.

    Attributes:
      state: the saved `State`, or the saved pytree.
      position: examples consumed in this phase when the state was saved.
      note: the saved note, described at the top of this file, with the key "step"; {} for a state that was never saved.
        "phase" is counted from 0.
    """

    state: State
    position: int
    note: Mapping[str, Any] = {}


class _PreservationPolicy(NamedTuple):
    """An Orbax preservation policy that keeps the checkpoints whose steps a function chooses.

    Attributes:
      choose: steps of all checkpoints → steps of those to keep.
    """

    choose: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Returns for each checkpoint whether Orbax keeps it; Orbax deletes the others."""
        del context
        steps = [each.step for each in checkpoints]
        kept = self.choose(steps)
        return [step in kept for step in steps]


class _Manager(ocp.CheckpointManager):
    """Orbax' manager, without the metrics of checkpoints.

    Earlier versions wrote their scores where Orbax reads metrics, and Orbax would fail on a damaged file. `Scores` reads them.
    """

    def _get_metrics(self, step: int) -> None:
        del step


class Checkpoints:
    """Saves and restores the checkpoints of one work directory, and remembers the scores of their evaluations."""

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
        """Opens the checkpoints in `directory`; creates the directory if it does not exist, unless `read_only` is set.

        Args:
          directory: holds one sub-directory per checkpoint, named by the step.
          keep: number of newest checkpoints to keep, at least 1.
          best: name of a score, such as "eval_accuracy". The checkpoint with its best finite value is also kept.
          lowest: whether the lowest value of that score is the best, as for a loss; otherwise the highest is.
          use: which checkpoint holds the trained network: the newest, or the best by the score `best`. Evaluation and
            export use that checkpoint; training always continues from the newest.
          read_only: whether to save, rename and delete nothing, because another process may be saving to the directory.

        Raises:
          UserError: the path is not UTF-8.
        """
        self._use, self._best, self._read_only = use, best, read_only
        self._keep = keep
        self.directory = files.path(directory).absolute()
        files.check_utf8(self.directory, "the folder of checkpoints")
        self._scores = Scores(self.directory, best, lowest=lowest)
        self._manager = _Manager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "note": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_PreservationPolicy(self._steps_to_keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def saved_steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order.

        A step counts as soon as `save` starts it; call `wait` first to get complete checkpoints only.
        """
        return sorted(self._manager.all_steps())

    def _steps_to_keep(self, steps: Sequence[int]) -> set[int]:
        """Returns the steps whose checkpoints are kept: the newest `keep` of `steps`, and the one with the best score."""
        return {*sorted(steps)[-self._keep :], self._scores.best(steps)} & set(steps)

    def has_scores(self, step: int) -> bool:
        """Returns whether the scores of a step's evaluation are recorded."""
        return step in self._scores

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Records the evaluation scores of a step, and deletes the checkpoints that no longer need to be kept.

        Waits first until all checkpoints are on disk. The first process writes the scores to `scores.json`, and drops those of
        other steps that have no checkpoint any more.

        Args:
          step: the step whose state was evaluated.
          scores: the scores by name, such as {"eval_accuracy": 0.9}.

        Raises:
          UserError: the scores cannot be written to disk.
          DiskFull: see `wait`.
        """
        self.wait()
        steps = self.saved_steps()
        if jax.process_index() == 0:
            self._scores.record(step, scores, steps)
        else:
            self._scores.remember(step, scores)
        for old in set(steps) - self._steps_to_keep(steps):
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
        """Starts to save a checkpoint in the background.

        Returns once the arrays are copied, so that the next training step may overwrite them; `wait` waits for the files.
        Does nothing if the step of a `State` already has a checkpoint.

        Args:
          state: a `State`, or any pytree of arrays, which `trees.pack` turns into a `State`.
          position: examples consumed in this phase.
          config: the run's config.
          note: further entries of the note, such as {"phase": 0, "options": {...}}.
          step: the step under which a pytree is saved, above all saved steps; None takes the pytree's attribute `step`. A
            `State` always uses its own step.

        Raises:
          DiskFull: the disk has too little space; the message names the newest complete checkpoint.
          UserError: a value that a checkpoint cannot hold, a pytree without a step, or one whose step is no whole number or
            is not above that of the newest checkpoint.
          RuntimeError: Orbax refused to save.
        """
        if not isinstance(state, State):
            step = getattr(state, "step", None) if step is None else step
            if step is None or np.shape(step):
                raise UserError(
                    f"a {type(state).__name__} has no step: tell under which it is saved by step="
                )
            self._check_new_step(step)
            note = dict(note or {}) | {"dtypes": trees.dtypes(state)}
            state = trees.pack(state, int(step))
        elif isinstance(state.step, int | np.generic):
            state = state._replace(step=jnp.asarray(state.step, jnp.int32))
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.check_free_space(state, f"step {step}")
        note = {
            "position": position,
            "config": trees.to_json(config or {}),
            "checksums": checksums(_to_dict(state)),
            _OVER_BITS: True,
            **trees.to_json(note or {}, "note"),
        }
        with self._reporting_full_disk(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax calls its own deprecated functions
            was_saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_to_dict(state)),
                    note=ocp.args.JsonSave(note),
                ),
            )
        if not was_saved:
            raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")

    def _check_new_step(self, step: Any) -> None:
        """Raises a UserError for the step of a pytree that cannot be saved."""
        value = step.item() if hasattr(step, "item") else step
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 0 <= value < 2**31:
            raise UserError(
                f"step = {step!r} should be a whole number from 0 to {2**31 - 1}"
            )
        newest = max(self.saved_steps(), default=-1)
        if value <= newest:
            raise UserError(
                f"step = {value}, but {self.directory} has a checkpoint of step {newest}: steps ascend"
            )

    def wait(self) -> None:
        """Waits until all checkpoints that `save` started are on disk under their final names.

        Raises:
          DiskFull: one of them does not fit on the disk; the message names the newest complete checkpoint.
        """
        with self._reporting_full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for all checkpoints as `wait` does, then ends Orbax' threads. The object cannot be used afterwards.

        Raises:
          DiskFull: see `wait`.
        """
        with self._reporting_full_disk():
            self._manager.close()

    def check_free_space(self, state: State, what: str = "a step") -> None:
        """Raises `DiskFull` if a state is larger than the free space of the disk.

        Without this check a save that fills the disk would leave its unfinished files behind.

        Args:
          state: arrays or their shapes.
          what: how the error calls the checkpoint.
        """
        leaves = jax.tree.leaves(_to_dict(state))
        size = sum(x.size * x.dtype.itemsize for x in leaves) + _METADATA_BYTES
        if shutil.disk_usage(self.directory).free < size:
            raise self._disk_full(f"{what}, {size / 1e6:.1f} MB")

    @contextlib.contextmanager
    def _reporting_full_disk(self):
        """Turns an exception that a full disk causes within this context into `DiskFull`; lets others pass."""
        try:
            yield
        except Exception as error:  # Orbax raises many types for a full disk
            if files.is_full(error):
                raise self._disk_full("a step") from None
            raise

    def _disk_full(self, what: str) -> files.DiskFull:
        """Returns the error for a full disk; it says what could not be saved, and names the newest complete checkpoint."""
        # Orbax gives a checkpoint its final name when all of its files are on disk.
        steps = [s for s in self.saved_steps() if (self.directory / str(s)).is_dir()]
        last = (
            f"the checkpoint of step {steps[-1]} is whole"
            if steps
            else "none was saved"
        )
        return files.DiskFull(
            f"cannot save {what}: no space left in {self.directory}; {last}: make space and run the same command again"
        )

    def restore_trained(self, like: Template) -> Restored | None:
        """Restores the checkpoint that holds the trained network: the newest or the best, as the option `use` says.

        Arguments, result and errors are those of `restore`. With `use="best"`, a damaged best checkpoint is an error:
        no other checkpoint replaces it.

        Raises:
          UserError: see `restore`; or `use` is "best" and no checkpoint has a finite value of the score `best`, also if
            there is no checkpoint at all.
        """
        best = self._best_step()
        return self.restore(like) if best is None else self.restore(like, [best])

    def _best_step(self) -> int | None:
        """Returns the step of the best checkpoint, or None if the option `use` is "newest".

        Raises:
          UserError: `use` is "best", but no checkpoint has a finite value of the score `best`.
        """
        if self._use == "newest":
            return None
        best = self._scores.best(self.saved_steps())
        if best is None:
            raise UserError(
                f"no checkpoint in {self.directory} was evaluated with a finite {self._best}: set config.eval_every, or"
                " config.checkpoint.use='newest'"
            )
        return best

    def note(self) -> Mapping[str, Any] | None:
        """Returns the note of the checkpoint that holds the trained network, with its "step".

        With `use="newest"` this is the newest note that can be read. Returns None if no note can be read.

        Raises:
          UserError: there are checkpoints, `use` is "best", and none of them has a finite value of the score `best`.
        """
        best = self._best_step() if self.saved_steps() else None
        for step in self.saved_steps()[::-1] if best is None else [best]:
            # `restore` reports damaged checkpoints.
            with contextlib.suppress(Exception):
                return self._read_note(step)
        return None

    def _read_note(self, step: int) -> Mapping[str, Any]:
        """Returns the note of one step's checkpoint, and adds the key "step"; raises Orbax' exception if it is damaged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = ocp.args.Composite(note=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["note"] | {"step": step}

    def trained_variables(self) -> dict[str, Any] | None:
        """Returns the trained network's variables as numpy arrays, for `forward.run`.

        Needs no template, because it takes the shapes from the checkpoint. The option `use` chooses the checkpoint.
        Returns the averaged weights if the run averages its weights, and None if there is no checkpoint whose metadata
        can be read.

        Raises:
          UserError: all checkpoints are damaged, or `use` is "best" and none has a finite value of the score `best`.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        newest = self.saved_shapes(device)
        if newest is None:
            return None
        restored = self.restore_trained(
            lambda note: self.saved_shapes(device, note["step"]) or newest
        )
        return None if restored is None else jax.device_get(restored.state.variables())

    def restore_network(self, like: Template) -> Restored | None:
        """Restores the trained network as `restore_trained` does, for a run with another optimizer or other methods.

        Only the network's parameters and running statistics have to match `like`. The optimizer's state and the parameters
        and state of methods are restored in the shapes in which they were saved.

        Args:
          like: a `State` of `jax.ShapeDtypeStruct`s with shardings, or a function from a checkpoint's note to one.

        Returns:
          The state and its note; None if there is no checkpoint and `use` is "newest". `opt` and `carry` of the state are
          dicts of arrays by name. The network's parameters and running statistics and their averages get the shardings of
          `like`; all other arrays get the sharding of `like.step`.

        Raises:
          UserError: see `restore_trained`.
        """

        def template(note):
            network = like(note) if _is_function(like) else like
            saved = self.saved_shapes(network.step.sharding, note["step"])
            if saved is None:
                return network
            params = forward.parameters(network.params)
            own = saved.params.get(METHODS)
            params |= {METHODS: own} if own else {}
            ema = saved.ema and {"params": params, "stats": network.stats}
            return saved._replace(params=params, stats=network.stats, ema=ema)

        return self.restore_trained(template)

    def saved_shapes(self, sharding, step: int | None = None) -> State | None:
        """Returns a saved state as `jax.ShapeDtypeStruct`s, read from Orbax' metadata; None if they cannot be read.

        Args:
          sharding: the sharding of every array in the result.
          step: the checkpoint's step; None takes the newest checkpoint whose metadata can be read.

        Returns:
          A `State` with today's names of arrays, see `_with_new_names`. `opt` and `carry` are dicts by name, as
          `_to_dict` saves them.
        """
        for candidate in self.saved_steps()[::-1] if step is None else [step]:
            # `restore` reports damaged checkpoints.
            with contextlib.suppress(Exception):
                metadata = dict(self._manager.item_metadata(candidate)["state"])
                break
        else:
            return None
        shapes = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding),
            metadata,
        )
        shapes = _with_new_names(shapes)
        return State(**shapes | {"ema": shapes["ema"] or None})

    def restore(
        self, like: Template, steps: Sequence[int] | None = None
    ) -> Restored | None:
        """Restores the newest undamaged checkpoint.

        Warns of each damaged checkpoint and tries the next older one. After success it renames the damaged directories to
        `damaged-STEP`, so that training can save these steps again; a read-only object renames nothing.

        Args:
          like: the template of the result, in one of three forms. A `State` of `jax.ShapeDtypeStruct`s in the saved dtypes,
            whose shardings place the restored arrays; they may differ from the shardings of the run that saved the
            checkpoint. A function from a checkpoint's note to such a `State`. Or a pytree of the structure and dtypes that
            were saved, see `save`; then the result's `state` is such a pytree.
          steps: saved steps to try, in this order; None for all, newest first.

        Returns:
          The state and its note, or None if there is no checkpoint.

        Raises:
          UserError: a checkpoint does not fit the template: the message names the first arrays that differ with both shapes,
            or an array of another dtype. Or all checkpoints are damaged.
        """
        if not isinstance(like, State) and not _is_function(like):

            def template(note):
                trees.check_dtypes(note.get("dtypes"), like)
                return trees.pack(like, 0)

            restored = self.restore(template, steps)
            return restored and restored._replace(
                state=trees.unpack(restored.state, like)
            )
        if isinstance(like, State) and isinstance(like.step, int | np.generic):
            like = like._replace(step=jnp.asarray(like.step, jnp.int32))
        steps, damaged = self.saved_steps()[::-1] if steps is None else steps, []
        _ignore_closed_event_loops()
        for step in steps:
            try:
                restored = self._restore_step(step, like)
            except UserError:
                raise
            except Exception as error:  # Orbax raises many types for damaged files
                damaged.append(step)
                warnings.warn(
                    f"checkpoint {self.directory / str(step)} is damaged and skipped ({message_of(error)[:200]})",
                    stacklevel=2,
                )
                continue
            self._set_damaged_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be read (tried {damaged}); remove the directory to start anew"
            )
        return None

    def _set_damaged_aside(self, damaged: Sequence[int]) -> None:
        """Renames the directories of damaged checkpoints to `damaged-STEP`, replacing earlier ones of the same name.

        The first process renames; all processes wait for it and then read the directory again. Does nothing if the
        object is read-only or `damaged` is empty.
        """
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                with contextlib.suppress(OSError):
                    aside.unlink()  # a file of that name
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self._manager.reload()

    def _restore_step(self, step: int, like: Template) -> Restored:
        """Restores the checkpoint of one step, also one that an earlier version saved.

        Compares the shapes with the template before it reads the arrays, and then the arrays with the checksums in the note.
        Converts the names of an earlier version to today's, and sets shares of batches that were not saved to 1.

        Args:
          step: the checkpoint's step.
          like: a `State` of `jax.ShapeDtypeStruct`s with shardings, or a function from the note to one.

        Raises:
          UserError: the shapes, names or dtypes do not match the template.
          Exception: the checkpoint is damaged: an `OSError` for a wrong checksum, or any exception of Orbax.
        """
        note = self._read_note(step)
        like = like(note) if _is_function(like) else like
        expected = _to_dict(like)
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise OSError("the state's description is missing")
        # Earlier versions did not save the shares of batches in the running statistics.
        shares = {}
        if SHARES not in (metadata.get("extra") or {}):
            expected, shares = _split_off_shares(expected)
        self._check_shapes(step, expected, _with_new_names(dict(metadata)))
        if _OLD_METHODS in metadata["params"]:
            expected = _with_old_names(expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(expected)),
            )["state"]
        compute = checksums if note.get(_OVER_BITS) else _checksums_of_values
        wrong = [
            name
            for name, checksum in compute(restored).items()
            if note["checksums"].get(name) != checksum
        ]
        if wrong:
            raise OSError(f"checksum of {wrong[0]} differs")
        if shares:
            # A share of 1 says that the statistics need no correction for their initial values.
            extra = restored.get("extra", {}) | {SHARES: jax.tree.map(_ones, shares)}
            restored = restored | {"extra": extra}
        state = _from_dict(_with_new_names(restored), like)
        return Restored(state, note["position"], note)

    def _check_shapes(self, step, expected, saved) -> None:
        """Raises a UserError if two states differ in the names, shapes or dtypes of their arrays.

        The message names the first three arrays that differ in name or shape, those of `params` first. Otherwise it names the
        first one that differs in its dtype.

        Args:
          step: the checkpoint's step, for the message.
          expected: the template, as a dict of `_to_dict`.
          saved: the checkpoint's metadata, as such a dict.
        """
        place = self.directory / str(step)
        problems = [
            line
            for part in sorted(expected.keys() | saved.keys(), key=_params_first)
            for line in tree.differences(
                {part: expected.get(part, {})}, {part: saved.get(part) or {}}
            )
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            if all(line.startswith("extra/") for line in problems):
                raise UserError(
                    f"checkpoint {place} does not fit the state of a method: {'; '.join(problems[:3])}{more}"
                )
            raise UserError(
                f"checkpoint {place} does not fit the model: {'; '.join(problems[:3])}{more}; make the network and the optimizer"
                " with the options that it was saved with, or take another directory"
            )
        # Converted arrays would have other checksums, and the checkpoint would count as damaged.
        dtypes = {name: leaf.dtype for name, leaf in tree.flatten(saved).items()}
        for name, leaf in tree.flatten(expected).items():
            if leaf.dtype != dtypes[name]:
                raise UserError(
                    f"checkpoint {place} has {name} in {dtypes[name]}, the template in {leaf.dtype}: give a template of the"
                    " saved dtypes, and convert what is restored"
                )


def _split_off_shares(expected: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Splits the shares of batches in the running statistics off a state, because earlier versions did not save them.

    `BatchNorm` explains the shares.

    Args:
      expected: a state as a dict of `_to_dict`.

    Returns:
      The state without `extra[SHARES]`, and the tree of shares, {} if the state has none.
    """
    extra = dict(expected.get("extra", {}))
    shares = extra.pop(SHARES, {})
    others = {k: v for k, v in expected.items() if k != "extra"}
    return others | ({"extra": extra} if extra else {}), shares


def _ones(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array of ones with the shape, dtype and sharding of a `jax.ShapeDtypeStruct`."""
    return jax.device_put(np.ones(shape.shape, shape.dtype), shape.sharding)


def _is_function(like: Template) -> bool:
    """Returns whether a template is a function, and not a pytree that can be called, such as a module."""
    return callable(like) and jax.tree_util.all_leaves([like])


def _params_first(part: str) -> tuple[bool, str]:
    """Returns a sort key for the fields of a state: "params" comes first, the others follow in alphabetical order."""
    return part != "params", part


def _ignore_closed_event_loops() -> None:
    """Keeps Python from printing the exception "Event loop is closed"; installs a hook for that once per process.

    When Orbax meets a damaged checkpoint, it abandons reads that still run. They end in threads that nobody waits for, and
    try to report to an event loop that is closed. The hook that prints such exceptions still prints all others.
    """
    previous_hook = sys.unraisablehook
    if getattr(previous_hook, "installed_by", None) is _ignore_closed_event_loops:
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    hook.installed_by = _ignore_closed_event_loops
    sys.unraisablehook = hook


def checksums(arrays) -> dict[str, int]:
    """Returns a 32-bit checksum of each array of a pytree, as {name: checksum}.

    A checksum is a sum over the elements modulo 2^32, each multiplied by an odd number that depends on its index. It
    does not depend on the sharding. Elements count by their bits as uint32; those of more than 32 bits count as several.
    """
    sums = _compute_checksums(tree.flatten(arrays), _bits)
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _checksums_of_values(arrays) -> dict[str, int]:
    """Returns the checksums that earlier versions saved, in which floats of other widths than 32 bits lost their fraction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex numbers lost their imaginary part
        sums = _compute_checksums(tree.flatten(arrays), _bits_or_values)
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _bits_or_values(x: jax.Array) -> jax.Array:
    """Returns the bits of an array of 4-byte elements, and the values of any other array, as uint32."""
    return _bits(x) if x.dtype.itemsize == 4 else x.astype(jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits of the elements of an array as uint32 [..., n], n of each element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if jnp.issubdtype(x.dtype, jnp.floating):
        width = min(jnp.finfo(x.dtype).bits, 32)
        x = jax.lax.bitcast_convert_type(x, f"uint{width}")
    elif x.dtype.itemsize > 4:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return x.astype(jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _compute_checksums(
    arrays: dict[str, jax.Array], as_integers: Callable
) -> dict[str, jax.Array]:
    """Computes `checksums` on the devices, {name: uint32 []}, from the uint32 that `as_integers` makes of each array."""

    def checksum(x):
        bits = as_integers(x).reshape(-1)
        # An odd weight is invertible modulo 2^32, so that the change of a single element always changes the sum.
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(
            2654435761
        ) | jnp.uint32(1)
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return {name: checksum(x) for name, x in arrays.items()}


def _to_dict(state: State) -> dict[str, Any]:
    """Turns a state into nested dicts of arrays, which is what Orbax stores.

    `opt` and `carry`, which may contain named tuples, become flat dicts {name: array}, see `tree.flatten`. `ema` is {} if
    it is None; "extra" and "carry" are left out if they are None.
    """
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
    """Turns the dicts of `_to_dict` back into a state, whose `opt` and `carry` get the tree structure of `like`."""

    def structured(field):
        template = getattr(like, field)
        leaves = [saved[field][name] for name in tree.flatten(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    return State(
        saved["step"],
        saved["params"],
        saved["stats"],
        structured("opt"),
        saved["ema"] or None,
        saved.get("extra"),
        structured("carry") if "carry" in saved else None,
    )


def _with_new_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the arrays of a state that an earlier version saved to today's names; leaves a newer state as it is.

    Moves the parameters of losses from "objective" to `METHODS`, in `params`, in the averaged weights and in the
    optimizer's state. Nothing is copied.

    Args:
      saved: a state as a dict of `_to_dict`, of arrays, shapes or Orbax' metadata.
    """

    def move(params):
        if _OLD_METHODS not in params:
            return params
        network = {k: v for k, v in params.items() if k != _OLD_METHODS}
        return network | {METHODS: params[_OLD_METHODS]}

    renamed = dict(saved) | {"params": move(saved["params"])}
    if ema := saved.get("ema"):
        renamed["ema"] = {**ema, "params": move(ema["params"])}
    opt = saved.get("opt") or {}
    renamed["opt"] = {
        k.replace(f"/{_OLD_METHODS}/", f"/{METHODS}/"): v for k, v in opt.items()
    }
    return renamed


def _with_old_names(expected: dict[str, Any]) -> dict[str, Any]:
    """Renames the arrays of a state to the names of an earlier version, so that Orbax finds them in its files.

    The inverse of `_with_new_names`: it moves the parameters of methods from `METHODS` to "objective".

    Args:
      expected: the template, as a dict of `_to_dict`.
    """

    def move(params):
        network = {k: v for k, v in params.items() if k != METHODS}
        return network | ({_OLD_METHODS: params[METHODS]} if METHODS in params else {})

    renamed = expected | {"params": move(expected["params"])}
    if "params" in expected["ema"]:
        renamed["ema"] = expected["ema"] | {"params": move(expected["ema"]["params"])}
    renamed["opt"] = {
        k.replace(f"/{METHODS}/", f"/{_OLD_METHODS}/"): v
        for k, v in expected["opt"].items()
    }
    return renamed
