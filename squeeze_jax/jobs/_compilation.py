"""Keeps compiled programs on disk, so that later runs, resumed runs and jobs need not compile them anew.

JAX's persistent compilation cache does the work. Its key contains the program, the compiler's options and flags, and the
versions of jaxlib and of the device's runtime. XLA's CPU compiler also optimizes for the CPU's features and the number of
cores, so each kind of machine has its own folder here.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from squeeze_jax.errors import UserError, message_of
from squeeze_jax.ranges import Count, PathStr

MIN_COMPILE_SECONDS = 0.5  # programs that compile faster are not kept
LOCK_SECONDS = (
    5.0  # time to wait at the start for another process that has locked the cache
)
QUIET_SECONDS = 2.0  # without a terminal, only longer compilations are announced

# The cache of the environment or of the calling program: a folder or None, and a size in bytes.
_INITIAL_CACHE = (
    jax.config.jax_compilation_cache_dir,
    jax.config.jax_compilation_cache_max_size,
)
_MIN_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# JAX's warnings about the cache.
_READ_ERROR = r"Error reading persistent compilation cache entry for '([^']*)': (.*)"
_TOO_LARGE = r"Cache value for key '([^']*)-[^'-]*' of size .* exceeds"
_WRITE_ERROR = r"Error writing persistent compilation cache entry for '([^']*)': (.*)"


def enable(
    directory: PathStr | None = None, size_mb: Count = 2000, enabled: bool = True
) -> str:
    """Turns on the cache of compiled programs; the parameters are the keys of `config.compilation`.

    Call it before the first compilation, and after `jax.distributed.initialize`. If the cache cannot be used, the run goes on
    without it. The environment variable JAX_COMPILATION_CACHE_DIR replaces `directory` and leaves all settings to JAX;
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

    Several CPU devices get no cache: XLA's CPU runtime (jaxlib 0.10.2) starts the independent collectives of a loaded
    program in a different order on each device. The devices then wait for each other until XLA ends the process.

    Args:
      directory: the cache's folder; by default `squeeze_jax/xla` in XDG_CACHE_HOME or ~/.cache. Whoever can write to it can
        run code in your name.
      size_mb: the largest size of the cache in MB of 10^6 bytes, at least 1; a full cache drops the programs that were not
        used for the longest time.
      enabled: whether compiled programs are kept.

    Returns:
      One line: where the cache is, or why there is none.

    Raises:
      UserError: a size below 1.
    """
    if size_mb < 1:
        raise UserError(
            f"config.compilation.size_mb = {size_mb} should be at least 1; enabled=False turns the cache off"
        )
    if not jax.config.jax_enable_compilation_cache:
        return "programs are not kept: JAX_ENABLE_COMPILATION_CACHE is off"
    if not enabled:
        return _turn_off("config.compilation.enabled is off")
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return _turn_off("XLA cannot run loaded ones on several CPU devices")
    if _INITIAL_CACHE[0]:
        folder, size = os.path.expanduser(_INITIAL_CACHE[0]), _INITIAL_CACHE[1]
        _set_cache(folder, size)
        return f"programs are kept in {folder}, set by JAX_COMPILATION_CACHE_DIR"
    try:
        folder = _default_folder() if directory is None else pathlib.Path(directory)
        folder = folder.expanduser().absolute() / machine_name()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_partial_programs(folder)
    except (OSError, RuntimeError) as error:  # no home, or a file system without locks
        return _turn_off(message_of(error))
    if _MIN_SECONDS_VARIABLE not in os.environ:
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS
        )
    _set_cache(str(folder), size_mb * 10**6)
    _handle_cache_warnings(folder)
    return f"programs are kept in {folder}, at most {size_mb} MB"


def machine_name() -> str:
    """Returns a name for the CPU: its architecture, usable cores and a digest of its features."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    feature_lines = r"^(?:model name|flags|Features|CPU (?:implementer|part))\s*:.*$"
    features = sorted(set(re.findall(feature_lines, text, re.MULTILINE))) or [text]
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count()
    digest = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{cores}-{digest}"


@contextlib.contextmanager
def compiling(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Announces what is compiled within this context, then the time that it took and whether the cache had it.

    On a terminal the first line comes at once; elsewhere it comes after two seconds, from another thread.

    Args:
      say: prints a line.
      what: what is compiled, such as "the training step".
    """
    events = {"compile_requests_use_cache": 0, "cache_hits": 0}

    def listen(event: str, **_) -> None:
        name = event.rpartition("/")[2]
        if name in events:
            events[name] += 1

    first_line = f"compiling  {what} ..."
    timer = threading.Timer(QUIET_SECONDS, say, [first_line])
    timer.daemon = True
    if sys.stdout.isatty():
        say(first_line)
    else:
        timer.start()
    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    try:
        yield
        seconds = time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_listener(listen)
        timer.cancel()
        if timer.ident is not None:  # if the first line is being printed, wait for it
            timer.join()
    programs, loaded = events.values()
    if loaded and loaded == programs:
        say(f"loaded     {what} in {seconds:.1f} s, compiled by an earlier run")
    else:
        hits = f", {loaded} of {programs} programs by an earlier run" if loaded else ""
        say(f"compiled   {what} in {seconds:.1f} s{hits}")


def _default_folder() -> pathlib.Path:
    """Returns the default folder of the cache; raises a RuntimeError if the user has no home directory."""
    cache = pathlib.Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "")))
    if not cache.is_absolute():  # the XDG standard ignores relative paths
        cache = pathlib.Path.home() / ".cache"
    return cache / "squeeze_jax" / "xla"


def _turn_off(reason: str) -> str:
    _set_cache(None, _INITIAL_CACHE[1])
    return f"programs are not kept: {reason}"


def _set_cache(folder: str | None, size: int) -> None:
    """Sets JAX's cache, in place of one that an earlier run in this process has set.

    Args:
      folder: the cache's folder; None for no cache.
      size: its largest size in bytes.
    """
    current = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_compilation_cache_max_size,
    )
    if current != (folder, size):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", size)
        compilation_cache.reset_cache()


def _remove_partial_programs(folder: pathlib.Path) -> None:
    """Removes programs that killed processes may have written only in part.

    JAX writes a program first and then the time of its last use, so a program without that time may be incomplete.
    """
    with (
        contextlib.suppress(filelock.Timeout),  # another process cleans up or writes
        filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS),
    ):
        for entry in folder.glob("*-cache"):
            if not _last_use_file(entry).exists():
                entry.unlink(missing_ok=True)


def _last_use_file(entry: pathlib.Path) -> pathlib.Path:
    """Returns the file with the time of a program's last use; without it JAX cannot remove the program from a full cache."""
    return entry.with_name(entry.name.removesuffix("-cache") + "-atime")


def _handle_cache_warnings(folder: pathlib.Path) -> None:
    """Prints JAX's warnings about the cache as one line each, and removes programs that JAX cannot read.

    JAX compiles such a program anew, but it never replaces the file.
    """
    original = getattr(warnings.showwarning, "original", warnings.showwarning)

    def show(message, *args, **kwargs):
        match = re.match(_READ_ERROR, str(message))
        if match and match[2].startswith(filelock.Timeout.__name__):
            line = f"another process holds {folder}, so {match[1]} is compiled anew"
        elif match:
            for entry in folder.glob(f"{match[1]}-*-cache"):
                entry.unlink(missing_ok=True)
            line = f"{match[1]} cannot be loaded and is compiled anew: {match[2]}"
        elif match := re.match(_WRITE_ERROR, str(message)):
            line = f"{match[1]} is not kept: {match[2]}"
        elif match := re.match(_TOO_LARGE, str(message)):
            line = f"{match[1]} is not kept: raise config.compilation.size_mb"
        else:
            return original(message, *args, **kwargs)
        print(f"compiled programs: {line}", file=sys.stderr)

    show.original = original
    warnings.showwarning = show
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation")
