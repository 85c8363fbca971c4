"""The work directory of a run: whose it is, and that nobody else is writing to it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from squeeze_jax import files
from squeeze_jax.data.vision import CROP, SQUASH
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _noted, _phases
from squeeze_jax.jobs._experiment import Experiment
from squeeze_jax.jobs._settings import canonical, current, jobs, with_resize

# Keys that may differ from those a work directory was begun with: they do not change what is learned.
FREE = (
    "steps",  # more of them continue the run
    "seeds",
    "checkpoint",
    "compilation",
    "sharding",
    "log_every",
    "eval_every",
    "save_every",
)
FREE += ("data.workers", "data.threads", "data.cache_mb", "data.source.data_dir")
FREE += ("data.source.root", "data.source.path", "data.folder")  # not the classes
FREE += ("distill.cache", "distill.cache_dtype")

_locks: dict[pathlib.Path, TextIO] = {}  # held until the process ends


def begin(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Makes the work directory of a run that is to train, or continues that of the same experiment.

    A directory without a checkpoint holds nothing yet that another config could harm. Another number of steps continues
    the same experiment: weights, optimizer state, order of examples and random keys go on exactly, and from there on the
    learning rate follows the schedule of the new number.

    Raises:
      UserError: not writable, in use by another process, begun with another config, or trained for more steps already.
    """
    if jax.process_index() == 0:
        with contextlib.ExitStack() as undo:
            if again := _locks.pop(workdir.resolve(), None):
                again.close()  # this process is the one that holds it, as a notebook
            with writable(workdir):
                lock = undo.enter_context(open(workdir / ".lock", "a+"))
            _hold(lock, workdir)
            if (workdir / "config.json").exists() and _steps_done(workdir) is not None:
                same(workdir, config)
                _say_steps(workdir, config)
            kept = json.dumps(with_resize(config, CROP), indent=2)
            files.write(workdir / "config.json", kept + "\n")
            undo.pop_all()
            _locks[workdir.resolve()] = lock
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("work directory")


@contextlib.contextmanager
def writable(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory; what the system refuses in it or inside the block is a UserError."""
    files.check_utf8(workdir, "--workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the work directory {workdir} ({error.strerror}); choose another --workdir"
        ) from None


def same(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Checks that a work directory was begun with this config, as far as it decides what is learned.

    Raises:
      UserError: there is no run, keys differ (names the first), or the run has more steps behind it than the config has.
    """
    begun, now = _whole(read(workdir)), _whole(config)
    done, steps = _steps_done(workdir), now.get("steps")
    if done is not None and isinstance(steps, int) and steps < done:
        raise UserError(
            f"config.steps = {steps}, but {workdir} is trained for {done} steps already: name at least {done}, or choose"
            " another --workdir"
        )
    free = (*FREE, *jobs())  # a job's settings are its own
    different = [
        f"{k} = {begun.get(k)!r} there, {now.get(k)!r} here"
        for k in sorted(begun.keys() | now.keys())
        if begun.get(k) != now.get(k)
        and not any(k == f or k.startswith(f + ".") for f in free)
    ]
    if different == [f"data.resize = {SQUASH!r} there, {CROP!r} here"]:
        raise UserError(
            f"{workdir} squashes images of another aspect ratio, and this config crops them: add"
            f" --config.data.resize={SQUASH} to go on there, or choose another --workdir"
        )
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{workdir} holds another experiment: {'; '.join(different[:3])}{more}; choose another --workdir or"
            " remove it"
        )


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """The config a work directory was begun with; a damaged one is read from the newest checkpoint, which has it too.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_bytes())
        wrong = "" if isinstance(config, dict) else f"{path} is no config"
    except FileNotFoundError:
        raise UserError(
            f"{workdir} holds no experiment (no config.json); run the job fit there first"
        ) from None
    except ValueError as error:
        wrong = f"{path} is not valid JSON ({error})"
    if wrong:
        config = _noted.of_checkpoint(workdir).get("config")
        if not isinstance(config, dict):
            raise UserError(f"{wrong}; restore it or remove the work directory")
        warnings.warn(f"{wrong}; the newest checkpoint's is taken", stacklevel=2)
    return current(canonical(config))


def _steps_done(workdir: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint; None if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _say_steps(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Tells that a run goes on to another number of steps than it was begun with."""
    before, now = _whole(read(workdir)).get("steps"), _whole(config).get("steps")
    if before != now:
        print(
            f"steps      {now:,} in place of {before:,}: after step {_steps_done(workdir):,} the learning rate follows the"
            f" schedule of {now:,} steps"
        )


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{"optim": {"lr": 1}}` as `{"optim.lr": 1, ...}`, with the defaults of the top level.

    "steps" is the sum over all phases; the last phase in "phases" is without its own.
    """
    known = {field.name for field in dataclasses.fields(Experiment)} - {"jobs"}
    config = with_resize(config, CROP)
    keys = {k: v for k, v in config.items() if k in known}
    required = {"data", "optim", "batch"}
    if required <= keys.keys():
        config = {**Experiment(**keys).config(), **config}
    if phases := config.get("phases"):
        *first, last = phases
        last = {k: v for k, v in last.items() if k != "steps"}
        config = {**config, "steps": _phases.total(phases), "phases": (*first, last)}
    return _flat(config)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in config.items():
        rows |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return rows


def _hold(lock: TextIO, workdir: pathlib.Path) -> None:
    """Locks the directory for this process; the system lets go of it however the process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"{workdir} is in use by process {lock.read().strip() or 'unknown'}; wait for it or choose another --workdir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
