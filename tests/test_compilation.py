"""The cache of compiled programs: across processes, damaged, held by others, off; and what is said of compiling."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from squeeze_jax.data import text
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _compilation, fit

# Trains a little from fixed numbers; prints what `enable` says, and for each round the programs loaded, the weights'
# bytes, and whether the old weights were donated. Arguments: the cache's folder, and what happens before each round.
CHILD = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from squeeze_jax.jobs import _compilation

line = _compilation.enable(sys.argv[1])
loaded = []
jax.monitoring.register_event_listener(
    lambda event, **_: loaded.append(event) if event.endswith("/cache_hits") else None
)

def step(w, x):
    loss, g = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - 0.1 * g, loss

def train(level):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)
    lowered = jax.jit(step, donate_argnums=0).lower(w, x)
    compiled = lowered.compile({"xla_backend_optimization_level": level})
    new, loss = compiled(w, x)
    for _ in range(3):
        new, loss = compiled(new, x)
    return np.asarray(new).tobytes().hex(), w.is_deleted()

rounds = []
for before in sys.argv[2:]:
    for file in pathlib.Path(sys.argv[1]).rglob("*"):
        if file.is_file() and before == "truncate":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if file.is_file() and before == "garbage":
            file.write_bytes(b"garbage" * 100)
    loaded.clear()
    jax.clear_caches()
    made = []
    with _compilation.compiling(made.append, "the step"):
        weights, donated = train(0 if before == "unoptimized" else 2)
    rounds.append([len(loaded), weights, donated, made[-1].split()[0]])
print(json.dumps([line, rounds]))
"""


def start(folder, *rounds, **environment):
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    mine |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), *rounds],
        env=mine | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return *json.loads(out.splitlines()[-1]), err


def test_programs_are_loaded_by_later_processes_and_survive_damage(tmp_path):
    first, second = [start(tmp_path, "none") for _ in range(2)]  # at once
    line, ((_, weights, donated, _),), err = result(first)
    assert line.startswith(f"programs are kept in {tmp_path}/")
    assert donated
    assert err == ""
    assert result(second)[1][0][1:3] == [weights, True]
    assert list(tmp_path.glob("*/jit_step-*-cache"))
    line, rounds, err = result(
        start(tmp_path, "none", "unoptimized", "truncate", "none", "garbage", "none")
    )
    assert [said for *_, said in rounds] == [
        "loaded",
        "compiled",  # the compiler's options are in the key
        "compiled",
        "loaded",  # what was damaged has been replaced
        "compiled",
        "loaded",
    ]
    assert {donated for _, _, donated, _ in rounds} == {True}
    assert {found for _, found, *_ in rounds[:1] + rounds[2:]} == {weights}
    said = [line for line in err.splitlines() if "jit_step" in line]
    assert len(said) == 2
    assert all("cannot be loaded and is compiled anew" in each for each in said)


def test_the_users_choice_wins(tmp_path):
    users = tmp_path / "users"
    own, off = (
        start(tmp_path / "ours", "none", JAX_COMPILATION_CACHE_DIR=str(users)),
        start(tmp_path / "ours", "none", JAX_ENABLE_COMPILATION_CACHE="0"),
    )
    line, _, err = result(own)
    assert line == f"programs are kept in {users}, set by JAX_COMPILATION_CACHE_DIR"
    assert list(users.glob("jit_step-*-cache"))
    assert err == ""
    line, rounds, _ = result(off)
    assert line == "programs are not kept: JAX_ENABLE_COMPILATION_CACHE is off"
    assert rounds[0][0] == 0
    assert not (tmp_path / "ours").exists()


@pytest.fixture
def users_cache(monkeypatch):
    """The cache as it is without the tests' own folder; JAX's settings as they were at the end."""
    monkeypatch.setattr(_compilation, "_INITIAL_CACHE", (None, -1))
    names = ("dir", "max_size")
    names = [f"jax_compilation_cache_{name}" for name in names]
    names.append("jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    _compilation.compilation_cache.reset_cache()


@pytest.mark.usefixtures("users_cache")
def test_where_the_cache_is(tmp_path, monkeypatch):
    def place():
        return Path(jax.config.jax_compilation_cache_dir)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    _compilation.enable()
    default = tmp_path / ".cache" / "squeeze_jax" / "xla" / _compilation.machine_name()
    assert place() == default
    assert default.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # does not count, by the standard
    _compilation.enable()
    assert place() == default
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    line = _compilation.enable(size_mb=7)
    assert place().parent == tmp_path / "xdg" / "squeeze_jax" / "xla"
    assert line == f"programs are kept in {place()}, at most 7 MB"
    assert jax.config.jax_compilation_cache_max_size == 7_000_000
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5
    monkeypatch.setenv("XDG_CACHE_HOME", "~/here")
    _compilation.enable()
    assert place().parent == tmp_path / "here" / "squeeze_jax" / "xla"
    _compilation.enable("~/other")
    assert place().parent == tmp_path / "other"
    monkeypatch.setattr(_compilation, "_INITIAL_CACHE", ("~/of_jax", -1))
    line = _compilation.enable()
    assert place() == tmp_path / "of_jax"
    assert line.startswith(f"programs are kept in {place()}, set by JAX_COMPILATION")
    line = _compilation.enable(enabled=False)
    assert line == "programs are not kept: config.compilation.enabled is off"
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("users_cache")
def test_machines_do_not_share_programs(monkeypatch):
    here = _compilation.machine_name()
    assert here == _compilation.machine_name()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    more = _compilation.machine_name()
    monkeypatch.setattr(Path, "read_text", lambda _: "flags\t: fpu avx512f\n")
    other = _compilation.machine_name()
    assert len({here, more, other}) == 3


@pytest.mark.usefixtures("users_cache")
def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, "/proc/none"):
        line = _compilation.enable(str(folder))
        assert line.startswith("programs are not kept: [Errno ")
        assert str(folder) in line
        assert "\n" not in line
        assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("users_cache")
def test_what_killed_processes_left_is_removed(tmp_path):
    folder = tmp_path / _compilation.machine_name()
    folder.mkdir()
    for name in ("whole-1-cache", "whole-1-atime", "killed-2-cache"):
        (folder / name).write_bytes(b"x")
    _compilation.enable(str(tmp_path))
    assert {f.name for f in folder.glob("*-*")} == {"whole-1-cache", "whole-1-atime"}


@pytest.mark.usefixtures("users_cache")
def test_a_cache_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(_compilation, "LOCK_SECONDS", 0.01)
    folder = tmp_path / _compilation.machine_name()
    folder.mkdir()
    with _compilation.filelock.FileLock(folder / ".lockfile"):
        line = _compilation.enable(str(tmp_path))
    assert line == f"programs are kept in {folder}, at most 2000 MB"


@pytest.mark.usefixtures("four_devices")
def test_several_cpu_devices_have_no_cache(tmp_path):
    line = _compilation.enable(str(tmp_path))
    assert line.startswith("programs are not kept: XLA cannot run loaded ones")
    assert jax.config.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_makes_no_sense():
    with pytest.raises(UserError, match=r"size_mb = 0 should be at least 1; enabled"):
        _compilation.enable(size_mb=0)


def test_compiling_is_announced(monkeypatch):
    def compile_and_wait(seconds):
        said = []
        with _compilation.compiling(said.append, "it"):
            jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
            time.sleep(seconds)
        return said

    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    (short,) = compile_and_wait(0)
    assert short.startswith("compiled   it in 0.")
    monkeypatch.setattr(_compilation, "QUIET_SECONDS", 0.1)
    begin, end = compile_and_wait(0.3)
    assert begin == "compiling  it ..."
    assert end[:16] == "compiled   it in"
    assert float(end.split()[3]) >= 0.3
    monkeypatch.setattr(_compilation, "QUIET_SECONDS", 1e6)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert compile_and_wait(0)[0] == "compiling  it ..."


def test_the_compilation_for_each_length_says_why():
    (only,) = text.batch_specs(8, (64,), {})
    assert fit.step_name(only, 1, 1) == "the training step"
    specs = text.batch_specs(8, (32, 64), {})
    names = [fit.step_name(s, n, 2) for n, s in enumerate(specs[::-1], 1)]
    assert names[0].startswith("the training step for 64 tokens (1 of 2: one for each")
    assert names[1].startswith("the training step for 32 tokens (2 of 2: one for each")
    assert "config.data.buckets" in names[0]


def test_failed_compilations_are_not_announced_as_done():
    said = []
    with pytest.raises(ZeroDivisionError), _compilation.compiling(said.append, "it"):
        raise ZeroDivisionError
    assert not [line for line in said if line.startswith("compiled")]
