"""A request to stop is heard in every job, ends in a safe place, and at the second time at once."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from squeeze_jax import stop
from squeeze_jax.cost import timing
from squeeze_jax.export import process
from squeeze_jax.jobs import _experiment, cost

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    '--config.model={"name": "squeezenet", "variant": "tiny"}',
    "--config.steps=4",
    "--config.batch=16",
    "--config.eval_every=0",
)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not stop.requested() and time.monotonic() < end:
        time.sleep(0.01)


CONFIG = dict(
    data=dict(source=dict(name="digits"), size=8),
    model=dict(name="squeezenet", variant="tiny"),
    optim=dict(name="sgd", lr=0.1),
    batch=16,
    steps=4,
)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_is_a_flag_until_a_safe_place(number):
    before = signal.getsignal(number)
    with stop.listening(), stop.listening():
        stop.check()
        send(number)
        assert stop.requested() == number
        with pytest.raises(stop.Stopped) as stopped:
            stop.check()
        assert stopped.value.status == 128 + number
    assert stop.requested() == 0
    assert signal.getsignal(number) == before


def test_a_signal_before_the_work_begins_is_no_traceback(tmp_path):
    """It arrives while the program imports its libraries."""
    package = tmp_path / "squeeze_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "machine.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    script = (ROOT / "run.py").read_text()
    (tmp_path / "run.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, tmp_path / "run.py", "--list"], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "stopped")


def test_other_threads_leave_signals_alone():
    found = []

    def work():
        with stop.listening():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def python(program, *signals):
    """Runs a program that prints "ready", sends it signals with these pauses before, and returns its status and output."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    for pause, number in signals:
        time.sleep(pause)
        child.send_signal(number)
    printed, _ = child.communicate(timeout=60)
    return child.returncode, printed


BUSY = """
    import hashlib, time
    from squeeze_jax import stop
    with stop.listening():
        print("ready", flush=True)
        {work}
        print("ended")
"""
# Python runs no handler of a signal inside one call of C code, such as a compiler's.
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def test_the_second_request_ends_at_once_though_python_is_busy():
    work = BUSY.format(work=IN_C)
    begin = time.monotonic()
    status, printed = python(work, (0.2, signal.SIGINT), (1, signal.SIGINT))
    assert status == 128 + signal.SIGINT
    assert "ended" not in printed
    assert "once more to end at once" in printed
    assert time.monotonic() - begin < 50


def test_signals_that_come_together_are_one_request():
    """As of `timeout`, which sends one to the process and one to its group."""
    work = BUSY.format(work="time.sleep(1)")
    status, printed = python(work, (0.2, signal.SIGTERM), (0, signal.SIGINT))
    assert (status, "ended" in printed) == (0, True)


def test_a_child_ends_with_the_request(tmp_path):
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(60)")
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, stop.listening():
        patch.setenv("PYTHONPATH", str(tmp_path))
        threading.Timer(0.5, send).start()
        with pytest.raises(stop.Stopped):
            process.run_module("slow_module", what="it", timeout=60)
    assert time.monotonic() - begin < 30
    assert not stop.children


@pytest.mark.usefixtures("compiled_once")
def test_the_main_job_stops_between_two_files_and_goes_on(tmp_path):
    command = [sys.executable, "-u", "run.py", f"--workdir={tmp_path}", *TINY]
    command += ["--config.export.formats=('stablehlo', 'tflite')"]
    command += ["--config.benchmark.runs=3"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = subprocess.Popen(command, cwd=ROOT, **pipes)
    for line in running.stdout:
        if line.startswith("exported "):
            running.send_signal(signal.SIGTERM)
            break
    rest = running.communicate(timeout=300)[0]
    assert running.returncode == 128 + signal.SIGTERM, rest
    assert "stopped; the same command goes on" in rest
    assert "Traceback" not in rest
    files = {"files.json", "model.mlir", "model.stablehlo"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == files
    done = subprocess.run(
        [*command, "--job=export"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files |= {"model.tflite"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == files


def test_the_line_names_the_reason_and_whether_work_is_left():
    with stop.listening():
        stop.check_done()
        stop.request(signal.SIGPIPE, "nobody listens")
        with pytest.raises(stop.Stopped, match=r"^nobody listens; stopped; the same"):
            stop.check()
        with pytest.raises(stop.Stopped, match=r"^nobody listens; asked to stop when"):
            stop.check_done()


def test_a_request_during_a_job_that_never_looks_is_not_lost(tmp_path):
    job = tmp_path / "own_job.py"
    job.write_text(
        "import os, signal, time\nRUN = 'ignores'\n"
        "def run(built, workdir, inputs=()):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.5)\n"
    )
    command = [sys.executable, "run.py", f"--job={job}", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run([*command, *TINY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.endswith("asked to stop when all was done; nothing is left to do\n")  # fmt: skip


def test_the_job_cost_stops(tmp_path):
    with stop.listening():
        built = _experiment.build(_experiment.check(CONFIG))
        stop.request(signal.SIGTERM)
        with pytest.raises(stop.Stopped):
            cost.run(built, tmp_path)
    assert not list(tmp_path.iterdir())


def test_timing_stops_between_two_runs():
    with stop.listening(), pytest.raises(stop.Stopped):
        timing.times(lambda: stop.request(signal.SIGTERM), 2)


def test_a_tool_that_is_stopped_is_one_line():
    tool = """
    import signal, time
    from squeeze_jax import machine
    # A shell may start a process in the background without Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def main():
        print("ready", flush=True)
        time.sleep(60)
    machine.run_tool(main)
    """
    assert python(tool, (0.1, signal.SIGINT)) == (130, "\nstopped\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_named(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "run.py", "--list"],
            **dict(cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True),
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == "\nstopped: cannot write the output to /dev/full: No space left on device\n"  # fmt: skip


@pytest.mark.usefixtures("compiled_once")
def test_an_output_on_a_full_disk_loses_no_training(tmp_path):
    command = [sys.executable, "run.py", "--job=fit", f"--workdir={tmp_path}", *TINY]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--config.log_every=1"],
            **dict(cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True),
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == (
        "\ncannot write the output to /dev/full: No space left on device; stopped at step 2 and saved; run the same"
        " command again to continue\n"
    )
    assert (tmp_path / "checkpoints" / "2").is_dir()
