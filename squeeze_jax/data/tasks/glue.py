"""GLUE: classes, or for STS-B a number, of English sentences and pairs of them. Wang et al., arXiv 1804.07461."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from squeeze_jax import registry
from squeeze_jax.data import answering, files, glue, text, tokens
from squeeze_jax.data.text import Reader, Stream
from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count, PathStr, Whole

log = logging.getLogger(__name__)

BETWEEN = "|||"  # two texts of the command line
PREDICTED = 32  # texts at a time


def make(
    task: str,
    tokenizer: PathStr,
    *,
    folder: PathStr | None = None,
    data_dir: PathStr | None = None,
    length: Count = 128,
    buckets: tuple[Count, ...] = (),
    train: PathStr | None = "train",
    eval: PathStr = "dev",
    limit_train: Whole = 0,
) -> "Glue":
    """Reads a task's examples; the parameters are the keys of `config.data`.

    Args:
      task: "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte" or "wnli".
      tokenizer: folder or file, see `tokens.load`.
      folder: GLUE's files as its own script lays them out: FOLDER/SST-2/train.tsv, also .tsv.gz.
      data_dir: instead of it, a folder where TFDS has prepared the data set glue.
      length: tokens of a sequence at most, special ones included; longer texts are cut off.
      buckets: shorter lengths that sequences may be padded to, ascending; see `text`.
      train, eval: splits, "train" and "dev"; or parts of one, "dev_matched", "dev[:90%]", "train[1000:]". Of MNLI, "dev" is
        the matched examples, followed by the mismatched ones where these are there. None for `train`: evaluation alone.
      limit_train: so many training examples, drawn at random but always the same, and a smaller number's are among a
        larger one's; 0 for all.

    Raises:
      UserError: an unknown task, a file that is missing or wrong, no tokenizer, or a value out of range.
    """
    kind = registry.row(glue.TASKS, task, "GLUE task")
    files = glue.source(folder, data_dir)
    loaded = tokens.load(tokenizer)
    pair = len(kind.columns) == 2
    loaded.room(length, pair)
    text.check_widths(length, buckets)
    if limit_train < 0:
        raise UserError(
            f"config.data.limit_train = {limit_train} should not be negative"
        )
    held = glue.read(files, task, eval, "config.data.eval")
    training = None
    if train is not None:
        training = glue.read(files, task, train, "config.data.train")
        _warn(training, held)
        if 0 < limit_train < len(training):
            training = training.take(_drawn(len(training), limit_train))
    return Glue(
        task=task,
        tokenizer=loaded,
        files=files,
        length=length,
        buckets=tuple(buckets),
        train_split=training,
        eval_split=held,
    )


def _warn(training: glue.Split, held: glue.Split) -> None:
    """Says so where both come from one file and share examples."""
    if training.parts.keys() & held.parts.keys():
        seen = set(zip(*training.texts, strict=True))
        both = sum(example in seen for example in zip(*held.texts, strict=True))
        if both:
            log.warning(
                "config.data.train has %d of the %d examples of config.data.eval",
                both,
                len(held),
            )


def _drawn(total: int, count: int) -> list[int]:
    """Which of `total` examples are kept: in order, random, and a function of the arguments alone."""
    words = np.random.Philox(key=0).random_raw(total)
    return sorted(np.argsort(words, kind="stable")[:count].tolist())


@dataclasses.dataclass(frozen=True)
class Glue:
    """One task, see `pipeline.Data`; `make` builds it.

    Batches: "tokens", "segments" int32 [b, l], "attended" bool [b, l] (False: padding), "label" int32 [b], or float32 [b] of
    STS-B, "mask" bool [b], "index" int64 [b].
    """

    reads = "tokens"
    noun = "sequence"
    metrics = "glue"
    fixed = True

    task: str
    tokenizer: Tokenizer
    files: Any
    length: int
    buckets: tuple[int, ...]
    train_split: glue.Split | None
    eval_split: glue.Split

    @property
    def kind(self) -> glue.Task:
        return glue.TASKS[self.task]

    @property
    def describe(self) -> str:
        what = "pairs of sentences" if self._pair else "sentences"
        train = f"{self.num_train:,} train + " if self.train_split else ""
        return (
            f"{train}{self.num_eval:,} test {what} of GLUE's {self.task}, up to"
            f" {self.length} tokens"
        )

    @property
    def num_train(self) -> int:
        return len(self.train_split) if self.train_split else 0

    @property
    def num_eval(self) -> int:
        return len(self.eval_split)

    @property
    def matched(self) -> int:
        """How many of the evaluation examples, the first ones, are MNLI's matched ones."""
        parts = self.eval_split.parts.items()
        return sum(n for name, n in parts if not name.endswith("_mismatched"))

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.kind.names

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.size

    @property
    def model(self) -> dict[str, Any]:
        return {"task": "classification", "num_classes": max(1, len(self.label_names))}

    @property
    def objective(self) -> dict[str, str]:
        name = "cross_entropy" if self.label_names else "squared_error"
        return {"name": f"losses.{name}"}

    @property
    def _pair(self) -> bool:
        return len(self.kind.columns) == 2

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Stream:
        """The endless stream of shuffled batches, see `text.Reader.train`.

        Raises:
          UserError: there is no training split, or what that raises.
        """
        if self.train_split is None:
            raise UserError("config.data.train is None: it names no split to train on")
        return self._train_reader.train(batch, seed, start, process)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Every evaluation example once, see `text.Reader.eval`."""
        return self._eval_reader.eval(batch, process)

    def test(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Every example of the test set once, of MNLI of all three, as `eval` but without "label"; for `submission`.

        Raises:
          UserError: the files are not there or wrong.
        """
        return self._test_reader.eval(batch, process)

    def submission(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Files to submit, {"SST-2.tsv": text}.

        Args:
          rows: "logits" [n, classes] and "index" [n] of all examples of `test`, in any order.

        Raises:
          ValueError: not each example once.
        """
        order = np.argsort(rows["index"])
        logits = np.asarray(rows["logits"], np.float32)[order]
        if not np.array_equal(rows["index"][order], np.arange(len(self._test))):
            raise ValueError(
                f"{len(order)} rows, not each of {len(self._test)} test examples once"
            )
        found = logits.argmax(-1) if self.label_names else logits.reshape(-1)
        ends = np.cumsum(list(self._test.parts.values()))
        parts = np.split(found, ends[:-1])
        return glue.submission(
            self.task, dict(zip(self._test.parts, parts, strict=True))
        )

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One dict a length."""
        labels = {"label": self.eval_split.labels}
        return text.specs(rows, (*self.buckets, self.length), labels)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Nothing."""
        del key
        return batch

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """See `text.inputs`."""
        return text.inputs(batch)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        return text.exported(self.length)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return text.example(self.length)

    @functools.cached_property
    def _test(self) -> glue.Split:
        return glue.read_test(self.files, self.task)

    # Tokenized when first asked for: not every job reads every split.
    @functools.cached_property
    def _train_reader(self) -> Reader:
        return self._reader(self.train_split)

    @functools.cached_property
    def _eval_reader(self) -> Reader:
        return self._reader(self.eval_split)

    @functools.cached_property
    def _test_reader(self) -> Reader:
        return self._reader(self._test)

    def _reader(self, split: glue.Split) -> Reader:
        first, second = (*split.texts, None)[:2]
        labels = {} if split.labels is None else {"label": split.labels}
        found = text.tokenize(self.tokenizer, first, second, self.length, **labels)
        return Reader(found, self.length, self.buckets, self.tokenizer.pad or 0)

    def predict(self, given: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the label of each text with its probability, or the number, or why a text has no answer.

        Texts are sentences, pairs "a ||| b", or files of them, one a line.

        Raises:
          UserError: no text; after all answers, texts or files that have none.
        """
        tried = [each for word in given for each in self._texts(word)]
        if not tried:
            form = f"'A SENTENCE. {BETWEEN} ANOTHER.'" if self._pair else "'A SENTENCE.'"  # fmt: skip
            raise UserError(
                f"the job predict needs texts, or files of them: run.py --job=predict --workdir=DIR {form}"
            )
        reasons = [reason for _, reason in tried if reason]
        if len(tried) == 1:
            answering.check(reasons, 1, "text")
        for begin in range(0, len(tried), PREDICTED):
            some = tried[begin : begin + PREDICTED]
            good = [words for words, reason in some if not reason]
            rows = iter(self._logits(good, run) if good else ())
            for words, reason in some:
                yield (
                    reason or f"{self._said(next(rows))}  {f' {BETWEEN} '.join(words)}"
                )
        answering.check(reasons, len(tried), "text")

    def _logits(self, texts: Sequence[tuple[str, ...]], run: Callable) -> np.ndarray:
        """Returns float32 [b, ...] of texts, one or two parts each."""
        columns = tuple(list(column) for column in zip(*texts, strict=True))
        reader = self._reader(glue.Split(columns, None, {}))
        reader = dataclasses.replace(reader, buckets=())
        batch = next(reader.eval(len(texts)))
        batch = {name: batch[name].astype(np.int32) for name in text.READ}
        return np.asarray(run(batch), np.float32)

    def _said(self, logits: np.ndarray) -> str:
        if not self.label_names:
            return f"{logits.reshape(-1)[0]:.2f}"
        best = int(logits.argmax())
        share = 1 / np.exp(logits - logits[best]).sum()
        names = self.label_names
        return f"{names[best] if best < len(names) else f'class {best}'} {share:.1%}"

    def _texts(self, given: str) -> list[tuple[tuple[str, ...] | None, str]]:
        """Returns (parts, "") or (None, why it cannot be used) of each text that a word of the command line stands for."""
        try:
            is_file = Path(given).is_file()
        except OSError:  # a long sentence is no name of a file
            is_file = False
        if not is_file:
            return [answering.attempt(self._parts, given, repr(given))]
        content, reason = answering.attempt(files.text, Path(given))
        if not reason and not content.strip():
            reason = f"{given} holds no text"
        if reason:
            return [(None, reason)]
        return [
            answering.attempt(self._parts, line, f"{given}:{number}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]

    def _parts(self, line: str, where: str) -> tuple[str, ...]:
        """Returns the one or two texts of a line, or raises a UserError that names the line by `where`."""
        between = BETWEEN if BETWEEN in line else "\t"
        words = tuple(part.strip() for part in line.split(between))
        if len(words) != len(self.kind.columns) or not all(words):
            wanted = f"two, as 'a {BETWEEN} b'" if self._pair else "one"
            raise UserError(
                f"{where}: {len([w for w in words if w])} texts where {self.task} takes {wanted}"
            )
        return words
