"""That memory freed by one computation serves the next."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
{prepare}
import resource

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

"""
STEPS = """
import jax, jax.numpy as jnp

@jax.jit
@jax.grad
def f(w, x):  # backwards needs the 16 results of 4 MB each: 64 MB, or 16384 pages of 4 kB
    for _ in range(16):
        x = jnp.tanh(x @ w)
    return x.sum()

w, x = jnp.eye(64), jnp.ones((2**14, 64))
counts = []
for _ in range(15):
    f(w, x).block_until_ready()
    counts.append(faults())
print(sorted(b - a for a, b in zip(counts[4:], counts[5:]))[5])
"""
AT_ONCE = """
before = faults()
for _ in range(4):
    bytes([1]) * (5 << 28)  # 1.25 GB, or 327680 pages of 4 kB
print(faults() - before)
"""
# Without large pages, which some systems give to all.
PLAIN = "import ctypes; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE"
KEEP = "from squeeze_jax.jobs._allocator import keep_memory; keep_memory()"


def faults(prepare, program):
    """Page faults of a step, the median of ten, or of taking gigabytes four times."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(prepare=prepare) + program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": ""},
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is for glibc alone")
def test_freed_memory_is_not_faulted_in_again():
    assert faults(PLAIN, STEPS) > 16384 / 2
    assert faults(KEEP, STEPS) < 16384 / 50


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is for glibc alone")
def test_gigabytes_are_not_faulted_in_again():
    assert faults(PLAIN, AT_ONCE) > 3 * 327680
    large = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    granted = large.exists() and "[never]" not in large.read_text()
    assert faults(KEEP, AT_ONCE) < 327680 * (0.1 if granted else 1.1)
