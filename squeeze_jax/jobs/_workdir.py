"""Creates, locks and reads a run's work directory, and checks that it belongs to the same experiment."""

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
from squeeze_jax.jobs import _experiment, _model_json, _phases, _places
from squeeze_jax.jobs._experiment import Experiment
from squeeze_jax.jobs._settings import canonical, job_names, upgrade, with_resize

# Keys that may change between two starts in a work directory, because they do not change what is learned.
FREE_KEYS = (
    "steps",  # a larger number continues the run
    "seeds",
    "checkpoint",
    "compilation",
    "sharding",
    "log_every",
    "eval_every",
    "save_every",
)
FREE_KEYS += ("data.workers", "data.threads", "data.cache_mb")
# The data may have moved; their classes may not change.
DATA_PATHS = ("data.source.root", "data.source.path", "data.source.data_dir")
DATA_PATHS += ("data.folder", "data.data_dir")
TABLES = ("data.train", "data.eval")  # of the task texts; elsewhere names of splits
FREE_KEYS += DATA_PATHS
FREE_KEYS += ("distill.cache", "distill.cache_dtype")
FREE_KEYS += ("data.corrupt",)  # a damaged image ended the run, or is skipped now

# Sections with such keys that a job on a trained network uses as the command has them.
FREE_SECTIONS = ("data", "checkpoint", "compilation", "sharding")
FREE_SECTIONS += ("log_every", "eval_every", "save_every")

_locks: dict[pathlib.Path, TextIO] = {}  # held until the process ends
_made: dict[pathlib.Path, list[pathlib.Path]] = {}  # folders that `begin` has made
_configs: dict[pathlib.Path, str] = {}  # the contents of config.json, not yet written


def begin(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Creates and locks the work directory of a run that is to train, or opens the directory of the same experiment again.

    A directory without a checkpoint may be used with another config. If only the number of steps differs, the run
    continues: weights, optimizer state, order of examples and random keys go on exactly. From then on the learning rate
    follows the schedule of the new number of steps.

    An existing config.json stays as it is until `write_config`, because the run may still be refused.

    Args:
      workdir: the work directory.
      config: the run's config.

    Raises:
      UserError: the directory is not writable, another process uses it, it was begun with another config, or its run has
        trained for more steps already.
    """
    if jax.process_index() == 0:
        with contextlib.ExitStack() as undo:
            key = _key(workdir)
            if own_lock := _locks.pop(key, None):
                own_lock.close()  # a notebook begins runs in one process
            missing = [p for p in (workdir, *workdir.parents) if not p.exists()]
            with writable(workdir):
                lock = undo.enter_context(open(workdir / ".lock", "a+"))
            _lock_directory(lock, workdir)
            if is_trained(workdir):
                check_same_experiment(workdir, config)
                _report_changes(workdir, config)
            _made[key] = missing
            _configs[key] = json.dumps(with_resize(config, CROP), indent=2) + "\n"
            if not is_begun(workdir):
                write_config(workdir)
            undo.pop_all()
            _locks[key] = lock
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("work directory")


def check(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Checks what `begin` checks about an existing work directory, and makes or changes nothing.

    Args:
      workdir, config: see `begin`.

    Raises:
      UserError: something else is in the place of the directory or of its files, another process uses it, it was begun with
        another config, or its run has trained for more steps already.
    """
    if jax.process_index() != 0:
        return
    files.check_utf8(workdir, "--workdir")
    _places.check(workdir)
    lock = workdir / ".lock"
    if lock.exists() and _key(workdir) not in _locks:
        with writable(workdir), open(lock, "a+") as opened:
            _acquire(opened, workdir)  # closing the file releases the lock
    if is_trained(workdir):
        check_same_experiment(workdir, config)


def abandon(workdir: pathlib.Path) -> None:
    """Removes a work directory that `begin` has made for a run that was refused, unless the run has left results there."""
    made = _made.pop(_key(workdir), ())
    if not made:
        return
    ours = {"config.json", ".lock", "checkpoints"}
    checkpoints = workdir / "checkpoints"
    with contextlib.suppress(OSError):
        if set(os.listdir(workdir)) <= ours and not (
            checkpoints.is_dir() and os.listdir(checkpoints)
        ):
            if own_lock := _locks.pop(_key(workdir), None):
                own_lock.close()
            for name in ours - {"checkpoints"}:
                (workdir / name).unlink(missing_ok=True)
            if checkpoints.is_dir():
                checkpoints.rmdir()
            for folder in made:
                folder.rmdir()


def write_config(workdir: pathlib.Path) -> None:
    """Writes the config.json of a run that `begin` began, once nothing refuses the run any more.

    Raises:
      UserError: the file cannot be written.
    """
    if text := _configs.pop(_key(workdir), None):
        files.write(workdir / "config.json", text)


def _key(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the path of a work directory without links, the same for all its names."""
    return pathlib.Path(os.path.realpath(workdir))


@contextlib.contextmanager
def writable(workdir: pathlib.Path) -> Iterator[None]:
    """Creates a work directory; turns every OSError there and within this context into a UserError."""
    files.check_utf8(workdir, "--workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the work directory {workdir} ({error.strerror}); choose another --workdir"
        ) from None


def check_same_experiment(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises a UserError unless a work directory was begun with this config; the keys in `FREE_KEYS` may differ.

    Raises:
      UserError: the directory holds no run, keys differ (names the first), or the run has trained for more steps than the
        config has.
    """
    config = _model_json.with_channels(workdir, config)
    before, now = _flat_with_defaults(read(workdir)), _flat_with_defaults(config)
    done, steps = _steps_done(workdir), now.get("steps")
    if done is not None and isinstance(steps, int) and steps < done:
        raise UserError(
            f"config.steps = {steps}, but {workdir} is trained for {done} steps already: name at least {done}, or choose"
            " another --workdir"
        )
    different = [
        line
        for k in sorted(before.keys() | now.keys())
        if not _is_free(k, now)
        for line in _differences(k, before.get(k), now.get(k))
    ]
    if different == [f"data.resize = {SQUASH!r} there, {CROP!r} here"]:
        raise UserError(
            f"{workdir} squashes images of another aspect ratio, and this config crops them: add"
            f" --config.data.resize={SQUASH} to go on there, or choose another --workdir"
        )
    if different:
        hidden = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{workdir} holds another experiment: {'; '.join(different[:3])}{hidden}; choose another --workdir, or"
            f" delete the folder {workdir} to start anew"
        )


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """Yields a line such as "optim.lr = 0.1 there, 0.3 here" for each difference inside a key's values; none if they are equal."""
    if before == now:
        return
    same_kind = type(before) is type(now)
    if same_kind and isinstance(before, Mapping):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif (
        same_kind
        and isinstance(before, tuple)
        and len(before) == len(now)
        and all(isinstance(item, Mapping) for item in (*before, *now))
    ):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{key}.{number}", *pair)
    else:
        yield f"{key} = {before!r} there, {now!r} here"


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the config that a work directory was begun with.

    If config.json is missing or damaged, or has keys or values that no config has, the function reads the config from the
    newest checkpoint and warns. Images get the channels that the run was trained on.

    Raises:
      UserError: there is no config.json and no checkpoint, or neither can be read.
    """
    _places.check(workdir)
    path = workdir / "config.json"
    config, problem = None, ""
    try:
        config = _upgraded(files.read_json(path))
        if is_trained(workdir) and (wrong := _experiment.find_fault(config)):
            problem = f"{path}: {wrong}"
    except _NoConfig as error:
        problem = f"{path} is no config{error}"
    except FileNotFoundError:
        problem = f"{path} is missing"
        if not is_trained(workdir):
            raise UserError(
                f"{workdir} holds no experiment (no config.json); run the job fit there first"
            ) from None
    except ValueError as error:
        problem = f"{path} is not valid JSON ({error})"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror})"
    if not problem:
        return _model_json.with_channels(workdir, config)
    try:
        saved = _upgraded(_model_json.checkpoint_note(workdir).get("config"))
    except _NoConfig:
        raise UserError(f"{problem}; restore it or remove the work directory") from None
    if config is not None and _experiment.find_fault(saved):
        return config  # such as a method's file that is gone: the job's checks tell
    warnings.warn(f"{problem}; the newest checkpoint's is taken", stacklevel=2)
    return _model_json.with_channels(workdir, saved)


class _NoConfig(Exception):
    """The content of a file is no config; the message says where, or is empty."""


def _upgraded(content: Any) -> dict[str, Any]:
    """Returns a config as today's version writes it; raises `_NoConfig` for other contents."""
    if not isinstance(content, dict):
        raise _NoConfig
    try:
        return upgrade(canonical(content))
    except (UserError, AttributeError, TypeError, ValueError) as error:
        # Sections of earlier versions are read before any section is checked.
        raise _NoConfig(f" ({error})") from None


def is_begun(workdir: pathlib.Path) -> bool:
    """Returns whether a work directory holds a run: its config, or a checkpoint with a copy of the config."""
    return (workdir / "config.json").exists() or is_trained(workdir)


def is_trained(workdir: pathlib.Path) -> bool:
    """Returns whether a work directory has a checkpoint."""
    return _steps_done(workdir) is not None


def _steps_done(workdir: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint; None if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _report_changes(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Prints a line for another number of steps than a run was begun with, and the lines of `report_data`."""
    before, now = _flat_with_defaults(read(workdir)), _flat_with_defaults(config)
    if before["steps"] != now["steps"]:
        steps = now["steps"]
        print(
            f"steps      {steps:,} in place of {before['steps']:,}: after step {_steps_done(workdir):,} the learning rate"
            f" follows the schedule of {steps:,} steps"
        )
    report_data(workdir, config)


def training_digest(config: Mapping[str, Any]) -> str:
    """Returns a text that is the same for two configs with which the same weights are trained.

    Paths of the data, settings of jobs and other keys that do not change the training may differ.
    """
    flat = _flat_with_defaults(config)
    kept = {k: v for k, v in flat.items() if not _is_free(k, flat)}
    kept.pop("data.channels", None)  # a run adds this key to its config
    return files.digest(sorted({**kept, "steps": flat["steps"]}.items()))


def _is_free(key: str, flat: Mapping[str, Any]) -> bool:
    """Returns whether a key does not change the training; `flat` is a config that `_flat_with_defaults` returns."""
    free = (*FREE_KEYS, *job_names())  # a job's settings do not change the training
    if flat.get("data.name") == "texts":
        free += TABLES
    return any(key == f or key.startswith(f + ".") for f in free)


def report_data(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Prints a line for each path of a run's data that a config changes."""
    before, now = _flat_with_defaults(read(workdir)), _flat_with_defaults(config)
    tables = TABLES if now.get("data.name") == "texts" else ()
    for key in (*DATA_PATHS, *tables):
        if before.get(key) != now.get(key):
            print(f"data       {now.get(key)} in place of {before.get(key)}")


def _flat_with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{"optim": {"lr": 1}}` as `{"optim.lr": 1, ...}`, with the defaults of the top level.

    "steps" is the sum over all phases. The last entry of "phases" has no "steps", so that a run may continue with a longer
    last phase.
    """
    names = {field.name for field in dataclasses.fields(Experiment)} - {"jobs"}
    config = with_resize(config, CROP)
    keys = {k: v for k, v in config.items() if k in names}
    required = {"data", "optim", "batch"}
    if required <= keys.keys():
        config = {**Experiment(**keys).config(), **config}
    if phases := config.get("phases"):
        *first, last = phases
        last = {k: v for k, v in last.items() if k != "steps"}
        config = {
            **config,
            "steps": _phases.total_steps(phases),
            "phases": (*first, last),
        }
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


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a work directory that this process has begun, and its lock with it.

    Raises:
      UserError: the target is a directory that is not empty, or cannot be written to.
    """
    key = _key(source)
    files.move(source, target)
    if lock := _locks.pop(key, None):
        if replaced := _locks.pop(_key(target), None):
            replaced.close()  # of a folder that was deleted
        _locks[_key(target)] = lock


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder of a work directory, such as `search`, and locks it for this process within this context.

    Raises:
      UserError: the folder cannot be written to, or another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / ".lock", "a+"))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        _lock_directory(lock, folder)
        yield


def _lock_directory(lock: TextIO, workdir: pathlib.Path) -> None:
    """Locks the directory for this process and writes the process id; for the arguments see `_acquire`."""
    _acquire(lock, workdir)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _acquire(lock: TextIO, workdir: pathlib.Path) -> None:
    """Locks the directory for this process; the system releases the lock when the file is closed or the process ends.

    Args:
      lock: the open lock file.
      workdir: the work directory, for the error message.

    Raises:
      UserError: another process holds the lock.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"{workdir} is in use by process {lock.read().strip() or 'unknown'}; wait for it or choose another --workdir"
        ) from None
