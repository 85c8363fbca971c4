"""Metrics of a run: a progress line for eyes, JSON lines for programs, TensorBoard for browsers."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping

from squeeze_jax import files
from squeeze_jax.errors import UserError

# What each record has, whatever the objective; it is not shown, or in a form of its own.
EVERY_RECORD = ("loss", "grad_norm", "examples_per_s", "input_wait", "skipped")
EVERY_RECORD += ("learning_rate", "examples_crc32")
# Accuracies that are further apart get a line with the likely causes.
FAR = 0.3
_STATISTICS = (
    "; batch normalisation's running statistics may be those of older weights: train for more steps, or set"
    " config.model.norm_momentum=0.9 or lower"
)
_OVERFITTED = (
    "; or the network overfits, or the test data differ: use more data, augmentation or config.optim.decay, and look at"
    " the test data's images and classes"
)


class Log:
    """Writes one record a call to the screen, to `metrics.jsonl` and to TensorBoard."""

    def __init__(
        self,
        workdir: pathlib.Path,
        steps: int,
        *,
        start: int = 0,
        quiet: bool = False,
        phase: str = "",
        batch_norm: bool = False,
    ):
        """Opens the files; records after step `start` (from a run that died) are dropped.

        Args:
          workdir: holds `metrics.jsonl` and `tensorboard/`.
          steps: length of the run, for the time left.
          start: the step the run continues from.
          quiet: write nothing at all (every process but the first).
          batch_norm: whether the network has running statistics, for the advice on accuracies that are far apart.
          phase: such as "phase 1/2"; stands before each line, in each record and in TensorBoard's text.
        """
        self.steps, self.start, self.quiet = steps, start, quiet
        self.phase, self._lead = phase, f"{phase} · " if phase else ""
        self._batch_norm, self._trained = batch_norm, {}
        self._begin = time.monotonic()
        self._live, self._shown, self._line = sys.stdout.isatty(), 0.0, ""
        if quiet:
            return
        path = workdir / "metrics.jsonl"
        kept = [r for r in read(path) if r["step"] <= start] if path.exists() else []
        files.write(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115, closed in close()
        self._board = _writer(workdir / "tensorboard", purge_step=start + 1)
        if phase:
            self._board.add_text("phase", phase, start)

    def train(self, step: int, record: dict[str, float]) -> None:
        """Records the mean of the last steps: loss, the objective's own metrics, speed, share of time waiting for input."""
        done, spent = step - self.start, time.monotonic() - self._begin
        left = spent / max(done, 1) * (self.steps - step)
        parts = [f"{self._lead}step {step}/{self.steps}", f"loss {record['loss']:.4f}"]
        parts += [f"{k} {v:.3f}" for k, v in record.items() if k not in EVERY_RECORD]
        parts += [
            f"{record['examples_per_s']:,.0f} examples/s",
            f"input wait {record['input_wait']:.1%}",
            f"{clock(left)} left",
        ]
        if record["skipped"]:
            parts.append(f"{record['skipped']} examples skipped")
        self._line, self._trained = " · ".join(parts), record
        self._write(step, record, self._line)

    def evaluation(self, step: int, record: dict[str, float]) -> None:
        self._write(
            step,
            record,
            f"{self._lead}step {step}/{self.steps} · {scores(record)}",
            keep=True,
        )
        if step == self.steps and (line := apart(self._trained, record)):
            self.say(line + (_STATISTICS if self._batch_norm else "") + _OVERFITTED)

    def tick(self, step: int) -> None:
        """Shows on a terminal, between records, how far the run is; at most once a second."""
        now = time.monotonic()
        if self._live and not self.quiet and now - self._shown > 1:
            self._shown = now
            rest = self._line.removeprefix(self._lead).partition(" · ")[2]
            now = f"{self._lead}step {step}/{self.steps} · {rest or 'under way'}"
            print(f"\r\033[K{now}", end="", flush=True)

    def say(self, text: str) -> None:
        """A line for eyes only."""
        if not self.quiet:
            print(("\r\033[K" if self._live else "") + text, flush=True)

    def _write(self, step, record, text, keep=False):
        if self.quiet:
            return
        phase = {"phase": self.phase} if self.phase else {}
        try:
            self._file.write(json.dumps({"step": step, **phase, **record}) + "\n")
            for key, value in record.items():
                if isinstance(value, float):  # counts and checksums are for programs
                    self._board.add_scalar(key, value, step)
        except OSError as error:
            kind = files.DiskFull if files.is_full(error) else UserError
            raise kind(f"cannot write {self._file.name}: {error.strerror}") from None
        if self._live and not keep:
            print("\r\033[K" + text, end="", flush=True)
        else:
            self.say(text)

    def close(self) -> None:
        if not self.quiet:
            if self._live:
                print()
            for each in self._file, self._board:
                with contextlib.suppress(OSError):  # a full disk was reported already
                    each.close()


def _writer(folder: pathlib.Path, **options):
    """Returns a TensorBoard writer.

    tensorboardX loads PyTorch where it is installed, which takes seconds, to accept tensors that are never passed here.
    """
    unused = "torch" not in sys.modules
    if unused:
        sys.modules["torch"] = None  # an import of it raises an ImportError
    try:
        import tensorboardX
    finally:
        if unused:
            del sys.modules["torch"]
    return tensorboardX.SummaryWriter(str(folder), **options)


def scores(record: dict[str, float]) -> str:
    """What an evaluation found, such as `test accuracy 0.9861 · top5 1.0000 · loss 0.0521`; the loss last."""
    found = {k.removeprefix("eval_"): v for k, v in record.items() if k != "step"}
    found = sorted(found.items(), key=lambda item: item[0] == "loss")
    return "test " + " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found)


def apart(trained: Mapping[str, float], evaluated: Mapping[str, float]) -> str | None:
    """Describes a training accuracy that is far above the evaluation's; None if it is not, or there is none.

    Args:
      trained: a record of training: "accuracy", 0 to 1, of batches that the network has just been trained on.
      evaluated: a record of an evaluation: "eval_accuracy".
    """
    high, low = trained.get("accuracy"), evaluated.get("eval_accuracy")
    if high is None or low is None or not high - low > FAR:
        return None
    return f"warning: training accuracy {high:.3f} and test accuracy {low:.3f} are far apart"


def read(path: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl`; those from a damaged line on are dropped."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no text
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def clock(seconds: float) -> str:
    """`75.2` as `1:15`, `3700` as `1:01:40`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
