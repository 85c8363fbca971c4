"""The loop and its log: cadences, waiting, skipped images, records after a crash."""

import contextlib
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax import files, stop
from squeeze_jax.errors import UserError
from squeeze_jax.train import log, loop
from squeeze_jax.train.state import State

ROOT = pathlib.Path(__file__).parents[1]


class Recorder:
    """Stands in for checkpoints and log; remembers what it is told."""

    directory = pathlib.Path("somewhere")

    def __init__(self):
        self.saved, self.trained, self.evaluated = [], [], []

    def save(self, state, position, config, note=None):
        self.saved.append((int(state.step), position, None))

    def record_scores(self, step, scores):
        self.saved = [(s, p, scores if s == step else m) for s, p, m in self.saved]

    def has_scores(self, step):
        return False

    def saved_steps(self):
        return [s for s, _, _ in self.saved]

    def wait(self):
        pass

    def tick(self, step):
        pass

    def train(self, step, record):
        self.trained.append((step, record))

    def evaluation(self, step, record):
        self.evaluated.append((step, record))


def batches(missing=0):
    for i in range(1000):
        yield {"index": np.arange(4) + i, "mask": np.arange(4) >= missing}


def run(
    step=None, steps=10, missing=0, start=0, stream=None, recorder=None, **cadences
):
    recorder = recorder or Recorder()

    def default(state, batch, key):
        at = state.step + 1
        return state._replace(step=at), {
            "loss": jnp.float32(at),
            "examples": batch["mask"].sum(),
        }

    loop.run(
        step or default,
        State(jnp.int32(start), {}, {}, ()),
        stream or batches(missing),
        None,
        steps=steps,
        batch=4,
        put=lambda batch: batch,
        evaluate=lambda state: {"eval_accuracy": float(state.step)},
        log=recorder,
        checkpoints=recorder,
        config={},
        **cadences,
    )
    return recorder


def test_cadences_and_the_end():
    told = run(log_every=4, eval_every=5, save_every=3)
    assert [s for s, _ in told.trained] == [3, 4, 5, 6, 8, 9, 10]
    assert [s for s, _ in told.evaluated] == [5, 10]
    assert [(s, p) for s, p, _ in told.saved] == [
        (3, 12),
        (5, 20),
        (6, 24),
        (9, 36),
        (10, 40),
    ]
    assert [m for _, _, m in told.saved] == [
        None,
        {"eval_accuracy": 5.0},
        None,
        None,
        {"eval_accuracy": 10.0},
    ]


def test_records_are_means_since_the_last():
    told = run(log_every=4)
    assert [r["loss"] for _, r in told.trained] == [2.5, 6.5, 9.5]
    assert all(0 <= r["input_wait"] <= 1 for _, r in told.trained)


def test_skipped_images_are_counted():
    told = run(log_every=5, missing=1)
    assert [r["skipped"] for _, r in told.trained] == [5, 5]


@pytest.mark.parametrize("error", [UserError("x.png is cut off"), RuntimeError("no")])
@pytest.mark.parametrize("good", [0, 5])
def test_a_batch_that_cannot_be_read_loses_no_training(good, error):
    def stream():
        yield from itertools.islice(batches(), good)
        raise error

    recorder = Recorder()
    with pytest.raises(type(error)) as caught:
        run(stream=stream(), recorder=recorder, log_every=4)
    assert recorder.saved == [(good, 4 * good, None)] * (good > 0)
    said = f"; step {good} is saved, and the same command continues there"
    told = good and isinstance(error, UserError)
    assert str(caught.value) == str(error) + (said if told else "")


def test_a_checksum_tells_which_examples_came():
    one, other = run(log_every=1), run(log_every=1)
    sums = [r["examples_crc32"] for _, r in one.trained]
    assert sums == [r["examples_crc32"] for _, r in other.trained]
    assert len(set(sums)) == 10


def test_the_step_of_a_loss_that_is_not_finite_is_named():
    def step(state, batch, key):
        loss = jnp.where(state.step == 6, jnp.nan, 1.0)
        return state._replace(step=state.step + 1), {
            "loss": loss,
            "examples": jnp.float32(4),
        }

    with pytest.raises(
        UserError,
        match=r"loss is nan at step 7; the last good checkpoint is somewhere/5; try a lower",
    ):
        run(step, log_every=5, save_every=5)


def test_nothing_is_saved_from_a_loss_that_is_not_finite():
    def step(state, batch, key):
        return state._replace(step=state.step + 1), {
            "loss": jnp.float32(jnp.inf),
            "examples": jnp.float32(4),
        }

    with pytest.raises(UserError, match="at step 1; none was saved; no update came b"):
        run(step, log_every=100, save_every=2)


def test_a_gradient_that_is_not_finite_stops_before_the_save():
    """The loss of that step is still finite, the weights after it are not."""

    def step(state, batch, key):
        norm = jnp.where(state.step == 3, jnp.inf, 1.0)
        metrics = {
            "loss": jnp.float32(1),
            "grad_norm": norm,
            "examples": jnp.float32(4),
        }
        return state._replace(step=state.step + 1), metrics

    with pytest.raises(
        UserError,
        match=r"grad_norm is inf at step 4; the last good checkpoint is somewhere/2",
    ):
        run(step, log_every=100, save_every=2)


def test_records_after_the_checkpoint_are_dropped(tmp_path, capsys):
    record = {"loss": 1.0, "examples_per_s": 1.0, "input_wait": 0.0, "skipped": 0}
    with contextlib.closing(log.Log(tmp_path, 10)) as first:
        for step in range(1, 6):
            first.train(step, record)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the line a crash cut
    with contextlib.closing(log.Log(tmp_path, 10, start=3)) as second:
        second.train(4, record | {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(r["step"], r["loss"]) for r in map(json.loads, lines)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]
    assert (
        "step 4/10 · loss 2.0000 · 1 examples/s · input wait 0.0%"
        in capsys.readouterr().out
    )


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboardX.proto import event_pb2

    record = {"loss": 1.5, "examples_per_s": 1.0, "input_wait": 0.25, "skipped": 0}
    with contextlib.closing(log.Log(tmp_path, 10)) as writer:
        writer.train(7, record)
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, found = path.read_bytes(), {}
    while content:  # a record: length u64, crc u32, data, crc u32
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        content = content[16 + size :]
    assert found == {
        (7, "loss"): 1.5,
        (7, "examples_per_s"): 1.0,
        (7, "input_wait"): 0.25,
    }


def test_logging_loads_no_pytorch_and_leaves_it_importable(tmp_path):
    code = (
        "import pathlib, sys; from squeeze_jax.train import log;"
        f" log.Log(pathlib.Path({str(tmp_path)!r}), 1).close();"
        " assert 'torch' not in sys.modules; import torch; print(torch.ones(2).sum())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.stdout == "tensor(2.)\n", ran.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3700, "1:01:40")]
)
def test_clock(seconds, text):
    assert log.clock(seconds) == text


def test_a_terminal_shows_how_far_it_is_between_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    clock = iter([0.0, 10.0, 10.5, 12.0, 12.0, 14.0])
    fake = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(log, "time", fake)
    record = {"loss": 1.5, "examples_per_s": 7.0, "input_wait": 0.0, "skipped": 0}
    with contextlib.closing(log.Log(tmp_path, 10)) as writer:  # at 0.0
        for step in (1, 2):  # at 10.0, and too soon after it
            writer.tick(step)
        assert capsys.readouterr().out.endswith("step 1/10 · under way")
        writer.tick(3)  # at 12.0
        writer.train(4, record)  # at 12.0
        writer.tick(5)  # at 14.0
    assert "step 5/10 · loss 1.5000 · 7 examples/s" in capsys.readouterr().out
    assert [r["step"] for r in log.read(tmp_path / "metrics.jsonl")] == [4]


@pytest.mark.parametrize("what", ["train", "evaluation"])
def test_a_failing_evaluation_or_log_loses_no_training(monkeypatch, what):
    """The state is saved first, or all the same."""

    def full(self, step, record):
        raise OSError(28, "No space left on device")

    saved = []
    monkeypatch.setattr(Recorder, what, full)
    monkeypatch.setattr(
        Recorder, "save", lambda self, state, *rest: saved.append(int(state.step))
    )
    with pytest.raises(OSError, match="No space left"):
        run(log_every=5, eval_every=5)
    assert saved == [5]


def test_what_was_saved_but_not_evaluated_is_evaluated_on_the_way_on():
    told = run(start=5, eval_every=5)
    assert [s for s, _ in told.evaluated] == [5, 10]
    assert [s for s, _ in run(start=4, eval_every=5).evaluated] == [5, 10]
    assert [s for s, _ in run(start=10).evaluated] == [10]  # nothing else to do


def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    written = log.Log(tmp_path, 10)
    written._file.close()
    with open("/dev/full", "a", buffering=1) as full:
        written._file = full
        with pytest.raises(files.DiskFull, match="No space left on device"):
            written.train(
                1, {"loss": 1.0, "examples_per_s": 1, "input_wait": 0, "skipped": 0}
            )
        written.close()


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"st'])
def test_a_damaged_record_ends_the_log_that_goes_on(tmp_path, damage):
    good = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage)
    log.Log(tmp_path, 10, start=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_an_evaluation_that_is_repeated_replaces_its_record(tmp_path, capsys):
    with contextlib.closing(log.Log(tmp_path, 10)) as first:
        first.evaluation(5, {"eval_accuracy": 0.5})
    with contextlib.closing(log.Log(tmp_path, 10, start=5)) as second:
        second.evaluation(5, {"eval_accuracy": 0.5})
        second.evaluation(10, {"eval_loss": float("nan")})
    assert [r["step"] for r in log.read(tmp_path / "metrics.jsonl")] == [5, 10]
    assert "warning: eval_loss not finite" in capsys.readouterr().out


def test_a_closed_output_stops_the_run_after_saving(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    dropped = []
    monkeypatch.setattr(log, "print", closed, raising=False)
    monkeypatch.setattr(log.machine, "drop_output", lambda: dropped.append(1))
    monkeypatch.setattr(stop, "_received", 0)
    with contextlib.closing(log.Log(tmp_path, 10)) as opened:
        opened.say("a line")
    assert dropped == [1]
    assert stop.requested() == signal.SIGPIPE
