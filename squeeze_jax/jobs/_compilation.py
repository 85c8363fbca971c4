"""Compiled programs on disk: a second run, a resumed one and each job of a work directory start without compiling anew.

JAX's persistent compilation cache does the work. Its key holds the program, the compiler's options and flags, and the
versions of jaxlib and the device's runtime. XLA's CPU compiler also optimizes for the CPU's features and the number of
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

from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count, PathStr

SECONDS = 0.5  # programs that compile faster are not kept
LOCK_SECONDS = 5.0  # how long another process may keep the cache to itself at the start
QUIET_SECONDS = 2.0  # compiling for longer is announced also where no terminal is

# What the environment or the calling program set: a folder or None, and a size.
_USERS = (
    jax.config.jax_compilation_cache_dir,
    jax.config.jax_compilation_cache_max_size,
)
_KEPT = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_READ = r"Error reading persistent compilation cache entry for '([^']*)': (.*)"
_LARGE = r"Cache value for key '([^']*)-[^'-]*' of size .* exceeds"
_WRITTEN = r"Error writing persistent compilation cache entry for '([^']*)': (.*)"


def enable(
    directory: PathStr | None = None, size_mb: Count = 2000, enabled: bool = True
) -> str:
    """Turns on the cache of compiled programs.

    Call it before the first compilation, and after `jax.distributed.initialize`. A cache that cannot be used never ends
    a run. The environment variable JAX_COMPILATION_CACHE_DIR takes the place of `directory` and leaves all settings to
    JAX; JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

    Several CPU devices get no cache: XLA's CPU runtime (jaxlib 0.10.2) starts the independent collectives of a loaded
    program in a different order on each device. The devices then wait for each other until XLA ends the process.

    Args:
      directory: its folder; by default `squeeze_jax/xla` in XDG_CACHE_HOME or ~/.cache. Whoever can write to it can run
        code in your name.
      size_mb: its largest size, MB of 10^6 bytes, at least 1; programs that were not used for longest go first.
      enabled: whether there is a cache.

    Returns:
      One line that says where the cache is, or why there is none.

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
        return _off("config.compilation.enabled is off")
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return _off("XLA cannot run loaded ones on several CPU devices")
    if _USERS[0]:
        _use(*_USERS)
        return f"programs are kept in {_USERS[0]}, set by JAX_COMPILATION_CACHE_DIR"
    try:
        folder = _default() if directory is None else pathlib.Path(directory)
        folder = folder.expanduser().absolute() / machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
    except (OSError, RuntimeError) as error:  # no home, or a file system without locks
        return _off((str(error).splitlines() or [type(error).__name__])[0])
    if _KEPT not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    _use(str(folder), size_mb * 10**6)
    _repair(folder)
    return f"programs are kept in {folder}, at most {size_mb} MB"


def machine() -> str:
    """Returns a name for the CPU: its architecture, usable cores and a digest of its features."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    wanted = r"^(?:model name|flags|Features|CPU (?:implementer|part))\s*:.*$"
    features = sorted(set(re.findall(wanted, text, re.MULTILINE))) or [text]
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count()
    digest = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{cores}-{digest}"


@contextlib.contextmanager
def compiling(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Says that a program is being compiled, then how long it took and whether the cache had it.

    Args:
      say: prints a line. The first comes at once on a terminal, elsewhere after two seconds, from another thread.
      what: such as "the training step".
    """
    events = {"compile_requests_use_cache": 0, "cache_hits": 0}

    def listen(event: str, **_) -> None:
        name = event.rpartition("/")[2]
        if name in events:
            events[name] += 1

    begin = f"compiling  {what} ..."
    later = threading.Timer(QUIET_SECONDS, say, [begin])
    later.daemon = True
    if sys.stdout.isatty():
        say(begin)
    else:
        later.start()
    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    try:
        yield
        seconds = time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_listener(listen)
        later.cancel()
        if later.ident is not None:  # a line that has begun ends before the last one
            later.join()
    programs, loaded = events.values()
    if loaded and loaded == programs:
        say(f"loaded     {what} in {seconds:.1f} s, compiled by an earlier run")
    else:
        some = f", {loaded} of {programs} programs by an earlier run" if loaded else ""
        say(f"compiled   {what} in {seconds:.1f} s{some}")


def _default() -> pathlib.Path:
    """The user's folder of caches; raises a RuntimeError where the user has no home."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # by the standard a relative one does not count
        cache = pathlib.Path.home() / ".cache"
    return cache / "squeeze_jax" / "xla"


def _off(reason: str) -> str:
    _use(None, _USERS[1])
    return f"programs are not kept: {reason}"


def _use(folder: str | None, size: int) -> None:
    """Sets JAX's cache; replaces the one that an earlier run in this process has set."""
    now = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_compilation_cache_max_size,
    )
    if now != (folder, size):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", size)
        compilation_cache.reset_cache()


def _sweep(folder: pathlib.Path) -> None:
    """Removes programs that killed processes wrote in part: JAX writes a program first, then the time of its use."""
    with (
        contextlib.suppress(filelock.Timeout),  # then another process sweeps or writes
        filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS),
    ):
        for entry in folder.glob("*-cache"):
            if not _used(entry).exists():
                entry.unlink(missing_ok=True)


def _used(entry: pathlib.Path) -> pathlib.Path:
    """The file that says when a program was used last; without it JAX cannot make room for others."""
    return entry.with_name(entry.name.removesuffix("-cache") + "-atime")


def _repair(folder: pathlib.Path) -> None:
    """Removes a program when JAX warns that it cannot read it: JAX compiles it anew, but never replaces a file."""
    before = getattr(warnings.showwarning, "before", warnings.showwarning)

    def show(message, *args, **kwargs):
        match = re.match(_READ, str(message))
        if match and match[2].startswith(filelock.Timeout.__name__):
            line = f"another process holds {folder}, so {match[1]} is compiled anew"
        elif match:
            for entry in folder.glob(f"{match[1]}-*-cache"):
                entry.unlink(missing_ok=True)
            line = f"{match[1]} cannot be loaded and is compiled anew: {match[2]}"
        elif match := re.match(_WRITTEN, str(message)):
            line = f"{match[1]} is not kept: {match[2]}"
        elif match := re.match(_LARGE, str(message)):
            line = f"{match[1]} is not kept: raise config.compilation.size_mb"
        else:
            return before(message, *args, **kwargs)
        print(f"compiled programs: {line}", file=sys.stderr)

    show.before = before
    warnings.showwarning = show
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation")
