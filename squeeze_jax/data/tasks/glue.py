"""GLUE: classes, or for STS-B a number, of English sentences and pairs of them. Wang et al., arXiv 1804.07461."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from squeeze_jax import registry
from squeeze_jax.data import glue, text, text_set, tokens
from squeeze_jax.data.text import SequenceReader, Stream
from squeeze_jax.data.text_set import Split, TextSet, likeliest, number
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
        answer=partial(likeliest, kind.names) if kind.names else number,
    )


@dataclasses.dataclass(frozen=True)
class Glue(TextSet):
    """One task of GLUE, with its test set and the files to submit; `make` builds it.

    Attributes:
      task: its name.
      files: of GLUE, see `glue.source`.
    """

    task: str = ""
    files: Any = None

    @property
    def matched(self) -> int:
        """Returns how many of the evaluation examples, the first ones, are MNLI's matched ones."""
        parts = self.eval_split.parts.items()
        return sum(n for name, n in parts if not name.endswith("_mismatched"))

    def test(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Returns each example of the test set once, without "label"; of MNLI that of all three test sets.

        Raises:
          UserError: the files are missing or wrong.
        """
        return self._test_reader.eval(batch, process)

    def submission(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Returns the files to submit, {"SST-2.tsv": text}.

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
