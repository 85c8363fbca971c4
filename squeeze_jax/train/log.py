"""Logs the metrics of a run: progress lines on the screen, JSON lines for programs, and TensorBoard."""

import contextlib
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from squeeze_jax import files, machine, stop
from squeeze_jax.errors import UserError

# Entries that each training record has with any objective. The progress line formats them itself or leaves them out.
EVERY_RECORD = ("loss", "grad_norm", "examples_per_s", "input_wait", "skipped")
EVERY_RECORD += ("learning_rate", "examples_crc32")
# If training and test accuracy differ by more than this, a line warns and names likely causes.
LARGE_GAP = 0.3
# {score of an evaluation: the entry of a training record that measures the same on training examples}
_TRAINING_ACCURACIES = {
    "eval_accuracy": "accuracy",
    "eval_pixel_accuracy": "accuracy",  # the mean over pixels
    "eval_label_accuracy": "label_accuracy",
}
_STATISTICS = (
    "; batch normalisation's running statistics may be those of older weights: train for more steps, or set"
    " config.model.norm_momentum=0.9 or lower"
)
_OVERFITTED = (
    "; or the network overfits, or the test data differ: use more data, augmentation or config.optim.decay, and look at"
    " the test data's images and classes"
)


class Log:
    """Writes records to the screen, to `metrics.jsonl` and to TensorBoard, one record per call."""

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
        """Opens the files, and drops records after step `start`, which an interrupted run may have left.

        Args:
          workdir: the directory of `metrics.jsonl` and `tensorboard/`.
          steps: the number of steps of the run, for the remaining time.
          start: the step from which the run continues.
          quiet: whether to write nothing at all, as all processes but the first do.
          phase: name of the phase, such as "phase 1/2". It stands before each line, in each record and in TensorBoard's
            text.
          batch_norm: whether the network has running statistics; the warning of a large gap then names them.
        """
        self.steps, self.start, self.quiet = steps, start, quiet
        self.phase, self._prefix = phase, f"{phase} · " if phase else ""
        self._batch_norm, self._last_training = batch_norm, {}
        self._begin = time.monotonic()
        self._is_terminal, self._last_tick, self._line = sys.stdout.isatty(), 0.0, ""
        if quiet:
            return
        path = workdir / "metrics.jsonl"
        records = read(path) if path.exists() else []
        kept = [record for record in records if record["step"] <= start]
        self._file = _rewrite(path, kept)
        self._tensorboard = _tensorboard_writer(
            workdir / "tensorboard", purge_step=start + 1
        )
        if phase:
            self._tensorboard.add_text("phase", phase, start)

    def train(self, step: int, record: dict[str, float]) -> None:
        """Writes a training record and its progress line.

        Args:
          step: the last of the steps that the record averages over.
          record: "loss" and the other entries of `EVERY_RECORD`, and the objective's own metrics.
        """
        done, seconds = step - self.start, time.monotonic() - self._begin
        left = seconds / max(done, 1) * (self.steps - step)
        parts = [f"{self._prefix}step {step}/{self.steps}"]
        parts += [f"loss {record['loss']:.4f}"]
        parts += [f"{k} {v:.3f}" for k, v in record.items() if k not in EVERY_RECORD]
        parts += [
            f"{record['examples_per_s']:,.0f} examples/s",
            f"input wait {record['input_wait']:.1%}",
            f"{clock(left)} left",
        ]
        if record["skipped"]:
            parts.append(f"{record['skipped']} examples skipped")
        self._line, self._last_training = " · ".join(parts), record
        self._write(step, record, self._line)

    def evaluation(self, step: int, record: dict[str, float]) -> None:
        """Writes the scores of an evaluation; after the last step, warns if training and test accuracy differ a lot.

        An evaluation of the step from which the run continues replaces a record of it: the earlier run ended between
        writing the record and noting the scores beside its checkpoint.
        """
        if step == self.start and not self.quiet:
            self._drop_evaluation(step)
        self._write(
            step,
            record,
            f"{self._prefix}step {step}/{self.steps} · {format_scores(record)}",
            keep=True,
        )
        if bad := [name for name, value in record.items() if not math.isfinite(value)]:
            self.say(
                f"warning: {', '.join(bad)} not finite: outputs overflow, or weights or running statistics are invalid"
            )
        if step == self.steps and (line := accuracy_gap(self._last_training, record)):
            self.say(line + (_STATISTICS if self._batch_norm else "") + _OVERFITTED)

    def _drop_evaluation(self, step: int) -> None:
        """Removes the evaluation records of a step from `metrics.jsonl`."""
        self._file.close()
        path = pathlib.Path(self._file.name)
        kept = [
            record
            for record in read(path)
            if record["step"] != step or not any(k.startswith("eval_") for k in record)
        ]
        self._file = _rewrite(path, kept)

    def tick(self, step: int) -> None:
        """Updates the step number in a terminal's progress line between records, at most once a second."""
        now = time.monotonic()
        if self._is_terminal and not self.quiet and now - self._last_tick > 1:
            self._last_tick = now
            metrics = self._line.removeprefix(self._prefix).partition(" · ")[2]
            line = f"{self._prefix}step {step}/{self.steps} · {metrics or 'under way'}"
            _print(f"\r\033[K{line}", end="")

    def say(self, text: str) -> None:
        """Prints a line on the screen, which is in no file."""
        if not self.quiet:
            _print(("\r\033[K" if self._is_terminal else "") + text)

    def _write(self, step, record, text, keep=False):
        """Writes a record to the files and its line to the screen; on a terminal the next line replaces it unless `keep`."""
        if self.quiet:
            return
        phase = {"phase": self.phase} if self.phase else {}
        try:
            self._file.write(json.dumps({"step": step, **phase, **record}) + "\n")
            for key, value in record.items():
                # TensorBoard shows no counts and checksums.
                if isinstance(value, float):
                    self._tensorboard.add_scalar(key, value, step)
        except OSError as error:
            kind = files.DiskFull if files.is_full(error) else UserError
            raise kind(f"cannot write {self._file.name}: {error.strerror}") from None
        if self._is_terminal and not keep:
            _print("\r\033[K" + text, end="")
        else:
            self.say(text)

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        if not self.quiet:
            if self._is_terminal:
                _print("")
            for file in self._file, self._tensorboard:
                with contextlib.suppress(OSError):  # a full disk was reported before
                    file.close()


def _print(text: str, end: str = "\n") -> None:
    """Prints a text at once; if the output takes nothing any more, asks the run to save and stop."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        reason = machine.describe_output(error)
        machine.drop_output()
        stop.request(signal.SIGPIPE, reason)


def _rewrite(path: pathlib.Path, records: Sequence[Mapping]) -> TextIO:
    """Writes records to a file of JSON lines, and returns the file, open for more lines."""
    files.write(path, "".join(json.dumps(record) + "\n" for record in records))
    return open(path, "a", buffering=1)


def _tensorboard_writer(folder: pathlib.Path, **options):
    """Returns a TensorBoard writer; keeps tensorboardX from importing PyTorch.

    tensorboardX imports PyTorch if it is installed, to accept its tensors. That takes seconds, and no tensors come here.
    """
    hides_torch = "torch" not in sys.modules
    if hides_torch:
        sys.modules["torch"] = None  # makes `import torch` raise an ImportError
    try:
        import tensorboardX
    finally:
        if hides_torch:
            del sys.modules["torch"]
    return tensorboardX.SummaryWriter(str(folder), **options)


def format_scores(record: dict[str, float]) -> str:
    """Formats an evaluation as `test accuracy 0.9861 · top5 1.0000 · loss 0.0521`, with the loss at the end."""
    scores = {k.removeprefix("eval_"): v for k, v in record.items() if k != "step"}
    items = sorted(scores.items(), key=lambda item: item[0] == "loss")
    return "test " + " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in items)


def accuracy_gap(
    training: Mapping[str, float], evaluation: Mapping[str, float]
) -> str | None:
    """Returns a warning if the training accuracy is far above the test accuracy; None otherwise.

    Args:
      training: a training record. Its accuracies, 0 to 1, are measured on batches that the network was just trained on.
      evaluation: an evaluation record with an accuracy of the same kind: of examples, of pixels, or of the labels of
        examples with several.
    """
    for score, entry in _TRAINING_ACCURACIES.items():
        high, low = training.get(entry), evaluation.get(score)
        if high is not None and low is not None and high - low > LARGE_GAP:
            name = score.removeprefix("eval_").replace("_", " ")
            return f"warning: training {name} {high:.3f} and test {name} {low:.3f} are far apart"
    return None


def read(path: pathlib.Path) -> list[dict]:
    """Reads the records of a `metrics.jsonl`, up to the first damaged line."""
    records = []
    for line in files.read_file(path).splitlines():
        try:
            record = files.parse_json(line)
        except ValueError:  # neither JSON nor UTF-8
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


def clock(seconds: float) -> str:
    """Formats seconds as a clock does: 75.2 as `1:15`, 3700 as `1:01:40`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
