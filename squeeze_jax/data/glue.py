"""The nine tasks of GLUE on English sentences and sentence pairs: a table of the tasks, their files, and files to submit.

Wang et al., arXiv 1804.07461. The files are in the folders that GLUE distributes, or prepared by TFDS.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from squeeze_jax.data import tsv
from squeeze_jax.data.text_set import Split
from squeeze_jax.errors import UserError, nearest

log = logging.getLogger(__name__)


class Task(NamedTuple):
    """One task.

    Attributes:
      folder: the folder of its files; also the name of the file to submit.
      columns: the names of the columns of its one or two texts.
      label: the name of the label's column.
      names: of the classes, in the order of GLUE and TFDS; () for a regression.
      features: the names of the texts in TFDS.
      named: whether the files hold class names; otherwise they hold class numbers.
      header: the names of all columns, if the files for training and evaluation have no header.
      incomplete: whether the published files for training and evaluation have lines that lack columns.
    """

    folder: str
    columns: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    features: tuple[str, ...]
    named: bool = False
    header: tuple[str, ...] | None = None
    incomplete: bool = False


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        ("sentence",),
        header=("source", "label", "original", "sentence"),
    ),
    "sst2": Task(
        "SST-2", ("sentence",), "label", ("negative", "positive"), ("sentence",)
    ),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        SENTENCES,
    ),
    "stsb": Task("STS-B", SENTENCES, "score", (), SENTENCES),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("question1", "question2"),
        incomplete=True,
    ),
    "mnli": Task(
        "MNLI",
        SENTENCES,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        named=True,
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        ENTAILMENT,
        ("question", "sentence"),
        named=True,
    ),
    "rte": Task("RTE", SENTENCES, "label", ENTAILMENT, SENTENCES, named=True),
    "wnli": Task(
        "WNLI", SENTENCES, "label", ("not_entailment", "entailment"), SENTENCES
    ),
}
# MNLI has two evaluation and two test splits: "matched" from the genres of the training split, "mismatched" from others.
# Networks for MNLI are also evaluated on GLUE's diagnostic set.
GENRES = ("matched", "mismatched")
DIAGNOSTIC = "diagnostic"
SUBMITTED = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", DIAGNOSTIC: "AX"}
UNDECIDED = "-"  # the label of examples that annotators did not agree about
SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\]")


class Folder(NamedTuple):
    """The folder that GLUE's own script makes, with CoLA/train.tsv and so on, .tsv or .tsv.gz."""

    root: Path

    def read(self, task: str, part: str, labels: bool) -> Split | None:
        """Reads one file; returns None if it is missing.

        Args:
          task: a key of `TASKS`.
          part: the file's name without ".tsv", such as "train" or "dev_matched".
          labels: whether the file has labels.

        Raises:
          UserError: the file has not the format of the task; the error names the line.
        """
        path = tsv.find_file(self.path(task, part))
        if path is None:
            return None
        kind = TASKS[task]
        header = kind.header if labels else None
        # Predictions for a test set are numbered by line, so no line of it can be left out.
        table = tsv.read(path, header, skip_broken=kind.incomplete and labels)
        if labels and kind.named:
            table = _without_undecided(kind, table)
        texts = tuple(table.column(name) for name in kind.columns)
        values = _labels(kind, table) if labels else None
        return Split(texts, values, {part: len(texts[0])})

    def path(self, task: str, part: str) -> Path:
        """Returns the path of a file, without ".gz"."""
        folder = DIAGNOSTIC if part == DIAGNOSTIC else TASKS[task].folder
        return self.root / folder / f"{part}.tsv"


def _without_undecided(kind: Task, table: tsv.Table) -> tsv.Table:
    """Leaves out the examples that annotators did not agree about: the files of MultiNLI and SNLI have some, GLUE's none."""
    kept = [cell != UNDECIDED for cell in table.column(kind.label)]
    if all(kept):
        return table
    log.warning(
        "%s: %d examples of the label %r left out",
        table.path,
        kept.count(False),
        UNDECIDED,
    )
    rows, lines = (list(itertools.compress(c, kept)) for c in (table.rows, table.lines))
    return table._replace(rows=rows, lines=lines)


def _labels(kind: Task, table: tsv.Table) -> np.ndarray:
    cells = table.column(kind.label)
    places = zip(cells, table.lines, strict=True)
    if not kind.names:
        numbers = [_parse_number(cell, f"{table.path}:{line}") for cell, line in places]
        return np.array(numbers, np.float32)
    names = kind.names if kind.named else [str(n) for n in range(len(kind.names))]
    number = {name: n for n, name in enumerate(names)}
    for cell, line in places:
        if cell not in number:
            raise UserError(
                f"{table.path}:{line} has the unknown label {cell!r}{nearest(cell, names)}"
            )
    return np.array([number[cell] for cell in cells], np.int32)


def _parse_number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{where} has the label {cell!r}, which is not a number")
    return value


def open_files(folder: str | None, data_dir: str | None):
    """Returns the files of GLUE, as an object with the methods `read` and `path` of `Folder`.

    Args:
      folder: the folder that GLUE's own script makes, or None.
      data_dir: the folder where TFDS has prepared the dataset glue, or None.

    Raises:
      UserError: both or neither are given, or there is no such folder.
    """
    if (folder is None) == (data_dir is None):
        raise UserError(
            "config.data needs either folder, where GLUE's files are, or data_dir, where TFDS has prepared glue"
        )
    key, value = ("folder", folder) if folder is not None else ("data_dir", data_dir)
    root = Path(value).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.{key} = {value!r} is not a folder")
    if folder is not None:
        return Folder(root)
    from squeeze_jax.data.glue_tfds import Prepared

    return Prepared(root)


def read(files, task: str, split: str, option: str) -> Split:
    """Reads the labelled examples of a split.

    Args:
      files: from `open_files`.
      task: a key of `TASKS`.
      split: "train", "dev", "dev_matched", or a slice of one, "dev[:500]" or "train[90%:]". "dev" of MNLI is the matched
        examples followed by the mismatched ones, as far as their files exist.
      option: the config key that names the split, for errors, such as "config.data.train".

    Raises:
      UserError: the split does not exist, or it is empty.
    """
    match = SLICE.fullmatch(split)
    name = match["name"] if match else split
    if "[" in name or not name:
        raise UserError(
            f"{option} = {split!r} is no split: write 'dev', 'dev[:500]' or 'dev[90%:]'"
        )
    splits = _read_parts(files, task, name, labels=True)
    if not splits:
        raise UserError(
            f"{files.path(task, _first_part(task, name))} is not there: {option} = {split!r} may name another split,"
            " such as 'dev', or a part of one, such as 'dev[:90%]'"
        )
    if match:
        splits = [_slice(each, match["first"], match["last"]) for each in splits]
    joined = join(splits)
    if not len(joined):
        raise UserError(f"{option} = {split!r} of {task} has no examples")
    return joined


def read_test(files, task: str) -> Split:
    """Reads the test examples, which have no labels.

    For MNLI these are the examples of both genres and of the diagnostic set, as far as their files exist.

    Args:
      files: from `open_files`.
      task: a key of `TASKS`.

    Raises:
      UserError: there is no file.
    """
    splits = _read_parts(files, task, "test", labels=False)
    if task == "mnli":
        diagnostic = files.read(task, DIAGNOSTIC, labels=False)
        splits += [diagnostic] if diagnostic else []
    if not splits:
        raise UserError(
            f"{files.path(task, _first_part(task, 'test'))} is not there: without it there is nothing to submit"
        )
    return join(splits)


def _first_part(task: str, name: str) -> str:
    both = task == "mnli" and name in ("dev", "test")
    return f"{name}_{GENRES[0]}" if both else name


def _read_parts(files, task: str, name: str, labels: bool) -> list[Split]:
    names = [name]
    if task == "mnli" and name in ("dev", "test"):
        names = [f"{name}_{genre}" for genre in GENRES]
    splits = [files.read(task, each, labels) for each in names]
    return [split for split in splits if split is not None]


def _slice(split: Split, first: str | None, last: str | None) -> Split:
    def place(bound, default):
        if bound is None:
            return default
        share = bound.endswith("%")
        return len(split) * int(bound[:-1]) // 100 if share else int(bound)

    indices = range(len(split))[place(first, 0) : place(last, len(split))]
    part = split.take(indices)
    return dataclasses.replace(part, parts={next(iter(split.parts)): len(part)})


def join(splits: Sequence[Split]) -> Split:
    """Joins splits one after the other; either all of them have labels, or none."""
    columns = zip(*(split.texts for split in splits), strict=True)
    texts = [list(itertools.chain.from_iterable(column)) for column in columns]
    labels = None
    if splits[0].labels is not None:
        labels = np.concatenate([s.labels for s in splits])
    parts = {name: n for s in splits for name, n in s.parts.items()}
    return Split(tuple(texts), labels, parts)


def submission(task: str, predictions: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the files to submit to gluebenchmark.com, {"SST-2.tsv": content}.

    Args:
      task: a key of `TASKS`.
      predictions: {part of the test set: class numbers int [n], or numbers for a regression}. The parts are "test", or for
        MNLI "test_matched", "test_mismatched" and "diagnostic".

    Returns:
      One file per part, with the columns "index" and "prediction". Classes are written as in the task's own files. Numbers are
      clipped to 0..5 and written with three decimals.
    """
    kind, files = TASKS[task], {}
    for part, values in predictions.items():
        if not kind.names:
            cells = [f"{value:.3f}" for value in np.clip(values, 0, 5)]
        else:
            cells = [kind.names[n] if kind.named else str(int(n)) for n in values]
        lines = ["index\tprediction", *(f"{n}\t{cell}" for n, cell in enumerate(cells))]
        files[f"{SUBMITTED.get(part, kind.folder)}.tsv"] = "\n".join(lines) + "\n"
    return files
