"""Datasets of texts, or of pairs of texts, with labels: the parts that the tasks `texts` and `glue` share."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from squeeze_jax.data import answering, tables, text, text_files
from squeeze_jax.data.source import class_name
from squeeze_jax.data.text import SequenceReader, Stream
from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError, shortened, shown

log = logging.getLogger(__name__)

BETWEEN = "|||"  # separates the two texts of a pair on the command line
PREDICTED = 32  # texts in one batch of the job predict


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled texts.

    Attributes:
      texts: one column of n texts, or two columns for pairs.
      labels: int32 [n] for classes, float32 [n] for a regression, float32 [n, classes] of zeros and ones for several labels
        per text, None for a test set without labels.
      parts: how many examples come from each part, in order, such as {"dev_matched": 9815, "dev_mismatched": 9832}.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, indices: Sequence[int]) -> "Split":
        """Returns the examples at `indices`, as one part."""
        texts = tuple([column[i] for i in indices] for column in self.texts)
        labels = None if self.labels is None else self.labels[np.asarray(indices, int)]
        return Split(texts, labels, {"": len(indices)})


def check_text(text: str, where: str) -> None:
    """Raises a UserError for a text with bytes that are not UTF-8, or half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} is not text: it has bytes that are not UTF-8, or half of a surrogate pair"
        ) from None


def path_like(word: str) -> bool:
    """Returns whether a word of the command line looks like a file's name: without spaces, with a suffix of texts or tables."""
    suffixes = (".txt", *tables.SUFFIXES)
    return not re.search(r"\s", word) and tables.unzipped_suffix(word) in suffixes


def random_subset(total: int, count: int) -> list[int]:
    """Returns `count` of the indices 0 to total - 1, in order; the choice depends on the arguments alone.

    The chosen indices of a smaller count are among those of a larger count.
    """
    words = np.random.Philox(key=0).random_raw(total)
    return sorted(np.argsort(words, kind="stable")[:count].tolist())


def warn_of_overlap(train: Split, evaluated: Split) -> None:
    """Logs a warning that counts the evaluation examples whose texts are training examples too."""
    train_texts = set(zip(*train.texts, strict=True))
    shared = sum(texts in train_texts for texts in zip(*evaluated.texts, strict=True))
    if shared:
        log.warning(
            "config.data.train has %d of the %d examples of config.data.eval",
            shared,
            len(evaluated),
        )


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Labelled texts under one tokenizer, see `pipeline.Data`.

    Batches are dicts of numpy arrays: "tokens", "segments" int32 [b, l], "attended" bool [b, l] (False: padding), "label" as
    in `Split`, "mask" bool [b] (False: padding), "index" int64 [b].

    Attributes:
      tokenizer: turns texts into tokens.
      length: tokens of a sequence at most.
      buckets: shorter lengths that batches may have, ascending.
      train_split, eval_split: the examples; `train_split` is None for evaluation alone.
      label_names: of the classes; () for a regression.
      source: what the examples are, in a phrase, such as "GLUE's sst2".
      objective, metrics: see `pipeline.Data`.
      answer: turns the outputs for one text, float32 [outputs], into the words that the job predict prints.
      columns: the columns of a table that hold the texts; () if predictions read no tables.
      separator: the character between a table's cells, see `tables.read`.
      notes: lines of the plan that is printed before training.
    """

    reads = "tokens"
    noun = "sequence"
    fixed = True

    tokenizer: Tokenizer
    length: int
    buckets: tuple[int, ...]
    train_split: Split | None
    eval_split: Split
    label_names: tuple[str, ...]
    source: str
    objective: Mapping[str, Any]
    metrics: str
    answer: Callable[[np.ndarray], str]
    columns: tuple[str, ...] = ()
    separator: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def pair(self) -> bool:
        """Whether an example is a pair of texts."""
        return len(self.eval_split.texts) == 2

    @property
    def describe(self) -> str:
        """A phrase about the dataset."""
        kind = "pairs of texts" if self.pair else "texts"
        train = f"{self.num_train:,} train + " if self.train_split else ""
        return f"{train}{self.num_eval:,} test {kind} of {self.source}, up to {self.length} tokens"

    @property
    def num_train(self) -> int:
        """The number of training examples."""
        return len(self.train_split) if self.train_split else 0

    @property
    def num_eval(self) -> int:
        """The number of evaluation examples."""
        return len(self.eval_split)

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self.tokenizer.size

    @property
    def model(self) -> dict[str, Any]:
        """Options of the model that follow from the data, see `pipeline.Data`."""
        return {"task": "classification", "num_classes": max(1, len(self.label_names))}

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Stream:
        """Returns the endless stream of shuffled batches, see `text.SequenceReader.train`.

        Raises:
          UserError: there is no training split, or what `text.SequenceReader.train` raises.
        """
        if self.train_split is None:
            raise UserError("config.data.train is None: it names no split to train on")
        return self._train_reader.train(batch, seed, start, process)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Returns each evaluation example once, see `text.SequenceReader.eval`."""
        return self._eval_reader.eval(batch, process)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes of batches, one dict per length."""
        labels = {"label": self.eval_split.labels}
        return text.batch_specs(rows, (*self.buckets, self.length), labels)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Returns the batch as it is."""
        del key
        return batch

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the inputs of a network, see `text.inputs`."""
        return text.inputs(batch)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an exported file's inputs, without the batch axis."""
        return text.exported_inputs(self.length)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the network inputs for a batch of one example."""
        return text.example_inputs(self.length)

    # A split is tokenized when it is first read, because not every job reads every split.
    @functools.cached_property
    def _train_reader(self) -> SequenceReader:
        return self.reader(self.train_split)

    @functools.cached_property
    def _eval_reader(self) -> SequenceReader:
        return self.reader(self.eval_split)

    def reader(self, split: Split) -> SequenceReader:
        """Tokenizes a split and returns its reader."""
        first, second = (*split.texts, None)[:2]
        labels = {} if split.labels is None else {"label": split.labels}
        sequences = text.tokenize(self.tokenizer, first, second, self.length, **labels)
        return SequenceReader(
            sequences, self.length, self.buckets, self.tokenizer.pad or 0
        )

    def predict(self, arguments: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields one line per text: the network's answer, or the reason why there is none.

        Args:
          arguments: texts, pairs "a ||| b", or names of files with one text or pair per line.
          run: see `pipeline.Data`.

        Raises:
          UserError: there is no text; or, after all answers, a text or a file has no answer.
        """
        attempts = [attempt for word in arguments for attempt in self._texts(word)]
        if not attempts:
            form = f"'A SENTENCE. {BETWEEN} ANOTHER.'" if self.pair else "'A SENTENCE.'"
            raise UserError(
                f"the job predict needs texts, or files of them: run.py --job=predict --workdir=DIR {form}"
            )
        reasons = [reason for _, reason in attempts if reason]
        if len(attempts) == 1:
            answering.check(reasons, 1, "text")
        for begin in range(0, len(attempts), PREDICTED):
            batch = attempts[begin : begin + PREDICTED]
            usable = [parts for parts, reason in batch if not reason]
            rows = iter(self._outputs(usable, run) if usable else ())
            for parts, reason in batch:
                yield (
                    reason or f"{self.answer(next(rows))}  {f' {BETWEEN} '.join(parts)}"
                )
        answering.check(reasons, len(attempts), "text")

    def _outputs(self, texts: Sequence[tuple[str, ...]], run: Callable) -> np.ndarray:
        """Returns the network's outputs for texts or pairs, float32 [b, outputs]."""
        columns = tuple(list(column) for column in zip(*texts, strict=True))
        reader = dataclasses.replace(self.reader(Split(columns, None)), buckets=())
        batch = next(reader.eval(len(texts)))
        batch = {name: batch[name].astype(np.int32) for name in text.INPUT_KEYS}
        return np.asarray(run(batch), np.float32)

    def _texts(self, word: str) -> list[tuple[tuple[str, ...] | None, str]]:
        """Returns (parts, "") or (None, why it cannot be used) for each text that a word of the command line names."""
        if not word.strip():
            return [(None, f"{word!r} is no file and no text")]
        try:
            path = Path(word)
            is_file, is_folder = path.is_file(), path.is_dir()
            is_other = path.exists() and not is_file and not is_folder
        except (OSError, ValueError):  # a long sentence is not a valid file name
            is_file = is_folder = is_other = False
        if is_other:
            return [(None, f"{shortened(word, 200)} is no file and no text")]
        if is_folder:
            return [(None, f"{shortened(word, 200)} is a folder: name files of texts")]
        if not is_file and path_like(word):
            return [(None, f"no such file: {shortened(word, 200)}")]
        if not is_file:
            return [answering.attempt(self._parts, word, shown(word, 200))]
        if self.columns and tables.unzipped_suffix(path) in tables.SUFFIXES:
            rows, reason = answering.attempt(self._table, path)
            return [(None, reason)] if reason else rows
        content, reason = answering.attempt(text_files.read_text, path)
        if not reason and not content.strip():
            reason = f"{word} holds no text"
        if reason:
            return [(None, reason)]
        return [
            answering.attempt(self._parts, line, f"{word}:{number}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]

    def _table(self, path: Path) -> list[tuple[tuple[str, ...] | None, str]]:
        """Returns (parts, "") or (None, why it cannot be used) for each row of a table."""
        table = tables.read(path, self.separator)
        for name in self.columns:
            table.check_column(name, "config.data.text")

        def row_parts(row, line):
            parts = tuple(row.get(name) for name in self.columns)
            if not all(isinstance(part, str) and part.strip() for part in parts):
                raise UserError(f"{path}:{line} lacks a text")
            return parts

        return [
            answering.attempt(row_parts, row, line)
            for row, line in zip(table.rows, table.lines, strict=True)
        ]

    def _parts(self, line: str, where: str) -> tuple[str, ...]:
        """Returns the one or two texts of a line; `where` names the line in an error."""
        check_text(line, where)
        separator = BETWEEN if BETWEEN in line else "\t"
        parts = tuple(part.strip() for part in line.split(separator))
        if len(parts) != (2 if self.pair else 1) or not all(parts):
            expected = f"two, as 'a {BETWEEN} b'" if self.pair else "one"
            count = len([part for part in parts if part])
            raise UserError(
                f"{where}: {count} texts where {self.source} takes {expected}"
            )
        return parts


def format_class(label_names: Sequence[str], logits: np.ndarray) -> str:
    """Returns the likeliest class and its probability, such as "positive 93.1%"."""
    best = int(logits.argmax())
    probability = 1 / np.exp(logits - logits[best]).sum()
    return f"{class_name(label_names, best)} {probability:.1%}"


def format_number(outputs: np.ndarray) -> str:
    """Returns the output of a regression as text with two decimals, such as "4.25"."""
    return f"{outputs.reshape(-1)[0]:.2f}"
