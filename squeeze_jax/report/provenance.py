"""Records where a result comes from: package versions, revision of the code, machine, time and command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import squeeze_jax

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "litert-converter",
    "litert-quantizer",
    "ai-edge-litert",
    "flatbuffers",
    "numpy",
)


def collect() -> dict[str, Any]:
    """Returns dict(time, command, squeeze_jax, python, packages, git, machine); all values are plain JSON."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "time": now.isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "squeeze_jax": squeeze_jax.__version__,
        "python": platform.python_version(),
        "packages": versions(),
        "git": revision(),
        "machine": machine(),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Returns {package: version} of the packages that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def revision(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Returns the git commit of a folder's files, by default of this package.

    Returns:
      dict(revision: 40 hexadecimal digits, changed: whether tracked files differ from it), or None if git does not track the
      files or is not installed. A repository that contains the folder without tracking it does not count.
    """
    folder = Path(folder or squeeze_jax.__file__)
    folder = folder if folder.is_dir() else folder.parent
    if not _git(folder, "ls-files", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": commit, "changed": bool(changed)}


def machine() -> dict[str, Any]:
    """Returns dict(cpu, cores, memory_gb, system, devices) of this machine; `cores` counts those this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    devices = [f"{d.platform}: {d.device_kind}" for d in jax.local_devices()]
    return {
        "cpu": _cpu(),
        "cores": cores,
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": devices,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return round(total / 1e9, 1)


def _git(folder: Path, *args: str) -> str | None:
    """Returns the output of a git command, or None if it fails."""
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
