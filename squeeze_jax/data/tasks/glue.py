"""GLUE: classifies English sentences or sentence pairs, or for STS-B predicts a number. Wang et al., arXiv 1804.07461."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from squeeze_jax import registry
from squeeze_jax.data import glue, text, text_set, tokens
from squeeze_jax.data.text import SequenceReader, Stream
from squeeze_jax.data.text_set import Split, TextSet, format_class, format_number
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count, PathStr, Whole


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
      tokenizer: a folder with the files of a tokenizer, or one of them: tokenizer.json, vocab.txt (WordPiece), or vocab.json
        beside merges.txt (byte-level BPE).
      folder: the folder of GLUE's files as its own script lays them out, FOLDER/SST-2/train.tsv, also .tsv.gz.
      data_dir: instead of `folder`, a folder where TFDS has prepared the dataset glue.
      length: the largest number of tokens of a sequence, special tokens included; longer texts are cut off.
      buckets: shorter lengths that batches of shorter texts are padded to, ascending. Texts of similar length form a batch;
        it gets the shortest of these lengths that fits it, or `length`. The training step is compiled once for each.
      train, eval: the splits to train and to evaluate on, such as "train" and "dev", or parts of a split, such as
        "dev_matched", "dev[:90%]" or "train[1000:]". "dev" of MNLI is the matched examples followed by the mismatched ones, as
        far as their files exist. None for `train` allows evaluation alone.
      limit_train: the number of training examples, chosen at random but always the same; those of a smaller number are among
        those of a larger one. 0 takes all.

    Raises:
      UserError: the task is unknown, a file or the tokenizer is missing or wrong, or a value is out of range.
    """
    kind = registry.row(glue.TASKS, task, "GLUE task")
    files = glue.open_files(folder, data_dir)
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
        if training.parts.keys() & held.parts.keys():  # parts of one file
            text_set.warn_of_overlap(training, held)
        if 0 < limit_train < len(training):
            chosen = text_set.random_subset(len(training), limit_train)
            training = training.take(chosen)
    loss = "cross_entropy" if kind.names else "squared_error"
    return Glue(
        task=task,
        tokenizer=loaded,
        files=files,
        length=length,
        buckets=tuple(buckets),
        train_split=training,
        eval_split=held,
        label_names=kind.names,
        source=f"GLUE's {task}",
        objective={"name": f"losses.{loss}"},
        metrics="glue",
        answer=partial(format_class, kind.names) if kind.names else format_number,
    )


@dataclasses.dataclass(frozen=True)
class Glue(TextSet):
    """One task of GLUE, with its test set and the files to submit; `make` builds it.

    Attributes:
      task: its name.
      files: the files of GLUE, see `glue.open_files`.
    """

    task: str = ""
    files: Any = None

    @property
    def matched(self) -> int:
        """The number of evaluation examples that are not MNLI's mismatched ones; they come first."""
        parts = self.eval_split.parts.items()
        return sum(n for name, n in parts if not name.endswith("_mismatched"))

    def test(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Returns each test example once, without "label"; for MNLI these are the examples of all three test sets.

        Args:
          batch, process: see `pipeline.evaluation`.

        Raises:
          UserError: the files are missing or wrong.
        """
        return self._test_reader.eval(batch, process)

    def submission(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Returns the files to submit to gluebenchmark.com, {"SST-2.tsv": content}.

        Args:
          rows: "logits" [n, classes] and "index" [n] of all examples of `test`, in any order.

        Raises:
          ValueError: `rows` do not hold each example once.
        """
        order = np.argsort(rows["index"])
        logits = np.asarray(rows["logits"], np.float32)[order]
        if not np.array_equal(rows["index"][order], np.arange(len(self._test))):
            raise ValueError(
                f"{len(order)} rows, not each of {len(self._test)} test examples once"
            )
        answers = logits.argmax(-1) if self.label_names else logits.reshape(-1)
        ends = np.cumsum(list(self._test.parts.values()))
        parts = np.split(answers, ends[:-1])
        return glue.submission(
            self.task, dict(zip(self._test.parts, parts, strict=True))
        )

    @functools.cached_property
    def _test(self) -> Split:
        return glue.read_test(self.files, self.task)

    @functools.cached_property
    def _test_reader(self) -> SequenceReader:
        return self.reader(self._test)
