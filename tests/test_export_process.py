"""What export stands on: files written whole, processes of its own, packages that may be missing."""

import json
import subprocess
import sys

import pytest

from squeeze_jax import files
from squeeze_jax.errors import UserError
from squeeze_jax.export import process, runnable
from squeeze_jax.export.formats import tflite


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    assert files.write(path, "grün").read_bytes() == "grün".encode()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left"):
        files.write(path, b"half")
    assert path.read_text() == "grün"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/below"):
        files.write(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            process.Crash,
            "it was killed by SIGSEGV",
        ),
        ("time.sleep(60)", process.Crash, "it gave no answer within 0.5 s"),
        (
            "sys.exit('a.mlir:1: error: no\\nbye')",
            process.Crash,
            "status 1: .*error: no$",
        ),
        ("print('one line', file=sys.stderr); sys.exit(3)", UserError, "^one line$"),
    ],
)
def test_processes_that_fail(code, kind, message, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(f"import os, signal, sys, time\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(kind, match=message):
        process.run_module("child", what="it", timeout=0.5 if "sleep" in code else 30)


def test_child_processes_have_their_own_xla_settings(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(
        "import json, os; print(json.dumps({**os.environ}))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    found = json.loads(process.run_module("child", what="it", timeout=30))
    assert "XLA_FLAGS" not in found
    assert "JAX_ENABLE_X64" not in found
    assert found["JAX_PLATFORMS"] == "cpu"


def test_importing_the_package_loads_no_jax():
    code = "import sys, squeeze_jax.export.runtime; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=None, cwd=process._ROOT)
    assert done.returncode == 0


def test_a_format_whose_packages_are_missing_says_so(monkeypatch):
    """As on Linux for ARM, where the converter is not built."""
    monkeypatch.setattr(tflite, "NEEDS", ("litert-converter", "no-such-package"))
    with pytest.raises(UserError, match="tflite needs the package no-such-package"):
        runnable.load_format("tflite")
    assert runnable.load_format("stablehlo").NEEDS == ()
