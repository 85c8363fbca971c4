"""GLUE, nine tasks of English sentences and pairs of them: what they are, their files, and files to submit.

Wang et al., arXiv 1804.07461. The files are the folders that GLUE gives out, or a data set of TFDS.
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
      folder: where its files are; also the name of the file to submit.
      columns: of its one or two texts.
      label: that of the label.
      names: of the classes, by number as GLUE and TFDS count them; () for a regression.
      features: what TFDS calls the texts.
      words: whether files have the classes' names, not their numbers.
      header: of files for training and evaluation where these have none.
      broken: whether the published files for training and evaluation have lines that lack columns.
    """

    folder: str
    columns: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    features: tuple[str, ...]
    words: bool = False
    header: tuple[str, ...] | None = None
    broken: bool = False


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
        broken=True,
    ),
    "mnli": Task(
        "MNLI",
        SENTENCES,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        words=True,
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        ENTAILMENT,
        ("question", "sentence"),
        words=True,
    ),
    "rte": Task("RTE", SENTENCES, "label", ENTAILMENT, SENTENCES, words=True),
    "wnli": Task(
        "WNLI", SENTENCES, "label", ("not_entailment", "entailment"), SENTENCES
    ),
}
# MNLI has two of each split but the training one, from genres that are in that and from others; and its networks are
# also asked about GLUE's diagnostic set.
GENRES = ("matched", "mismatched")
DIAGNOSTIC = "diagnostic"
SUBMITTED = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", DIAGNOSTIC: "AX"}
UNDECIDED = "-"
SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\]")


class Folder(NamedTuple):
    """The folder that GLUE's own script makes: CoLA/train.tsv and so on, .tsv or .tsv.gz."""

    root: Path

    def read(self, task: str, part: str, labels: bool) -> Split | None:
        """One file; None where it is not there.

        Raises:
          UserError: a file that is not as the task's are; says in which line.
        """
        path = tsv.find_file(self.path(task, part))
        if path is None:
            return None
        kind = TASKS[task]
        header = kind.header if labels else None
        # Predictions are known by the number of the line: of a test set none can be left out.
        table = tsv.read(path, header, skip_broken=kind.broken and labels)
        if labels and kind.words:
            table = _decided(kind, table)
        texts = tuple(table.column(name) for name in kind.columns)
        found = _labels(kind, table) if labels else None
        return Split(texts, found, {part: len(texts[0])})

    def path(self, task: str, part: str) -> Path:
        folder = DIAGNOSTIC if part == DIAGNOSTIC else TASKS[task].folder
        return self.root / folder / f"{part}.tsv"


def _decided(kind: Task, table: tsv.Table) -> tsv.Table:
    """Without the examples that people did not agree about: MultiNLI's own files and SNLI's have some, GLUE's none."""
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
        found = [_number(cell, f"{table.path}:{line}") for cell, line in places]
        return np.array(found, np.float32)
    names = kind.names if kind.words else [str(n) for n in range(len(kind.names))]
    number = {name: n for n, name in enumerate(names)}
    for cell, line in places:
        if cell not in number:
            raise UserError(
                f"{table.path}:{line} has the unknown label {cell!r}{nearest(cell, names)}"
            )
    return np.array([number[cell] for cell in cells], np.int32)


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{where} has the label {cell!r}, which is not a number")
    return value


def source(folder: str | None, data_dir: str | None):
    """The files, in a folder of GLUE's or prepared by TFDS; both have `read` and `path`.

    Raises:
      UserError: both or none given, or no such folder.
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
    """Labelled examples of a split.

    Args:
      files: from `source`.
      task: of TASKS.
      split: "train", "dev", "dev_matched", or a slice of one: "dev[:500]", "train[90%:]"; "dev" of MNLI is both genres, or
        matched alone where the other is not there.
      option: what the user calls it, such as "config.data.train".

    Raises:
      UserError: no such split, or an empty one.
    """
    match = SLICE.fullmatch(split)
    name = match["name"] if match else split
    if "[" in name or not name:
        raise UserError(
            f"{option} = {split!r} is no split: write 'dev', 'dev[:500]' or 'dev[90%:]'"
        )
    found = _parts(files, task, name, labels=True)
    if not found:
        raise UserError(
            f"{files.path(task, _first(task, name))} is not there: {option} = {split!r} may name another split,"
            " such as 'dev', or a part of one, such as 'dev[:90%]'"
        )
    if match:
        found = [_sliced(each, match["first"], match["last"]) for each in found]
    joined = join(found)
    if not len(joined):
        raise UserError(f"{option} = {split!r} of {task} has no examples")
    return joined


def read_test(files, task: str) -> Split:
    """Test examples, without labels; of MNLI those of both genres and the diagnostic set, what is there of them.

    Raises:
      UserError: nothing there.
    """
    found = _parts(files, task, "test", labels=False)
    if task == "mnli":
        more = files.read(task, DIAGNOSTIC, labels=False)
        found += [more] if more else []
    if not found:
        raise UserError(
            f"{files.path(task, _first(task, 'test'))} is not there: without it there is nothing to submit"
        )
    return join(found)


def _first(task: str, name: str) -> str:
    both = task == "mnli" and name in ("dev", "test")
    return f"{name}_{GENRES[0]}" if both else name


def _parts(files, task: str, name: str, labels: bool) -> list[Split]:
    names = [name]
    if task == "mnli" and name in ("dev", "test"):
        names = [f"{name}_{genre}" for genre in GENRES]
    found = [files.read(task, each, labels) for each in names]
    return [split for split in found if split is not None]


def _sliced(split: Split, first: str | None, last: str | None) -> Split:
    def place(bound, default):
        if bound is None:
            return default
        share = bound.endswith("%")
        return len(split) * int(bound[:-1]) // 100 if share else int(bound)

    indices = range(len(split))[place(first, 0) : place(last, len(split))]
    part = split.take(indices)
    return dataclasses.replace(part, parts={next(iter(split.parts)): len(part)})


def join(splits: Sequence[Split]) -> Split:
    """Splits after each other; of all or none the labels are known."""
    columns = zip(*(split.texts for split in splits), strict=True)
    texts = [list(itertools.chain.from_iterable(column)) for column in columns]
    labels = None
    if splits[0].labels is not None:
        labels = np.concatenate([s.labels for s in splits])
    parts = {name: n for s in splits for name, n in s.parts.items()}
    return Split(tuple(texts), labels, parts)


def submission(task: str, predictions: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Files for gluebenchmark.com: {"SST-2.tsv": text}.

    Args:
      task: of TASKS.
      predictions: {part of the test set: classes int [n], or numbers for a regression}: "test", or for MNLI "test_matched",
        "test_mismatched" and "diagnostic".

    Returns:
      One file a part, with the header "index", "prediction". Classes are written as the task's files have them, numbers with
      three digits, brought into 0 to 5.
    """
    kind, files = TASKS[task], {}
    for part, values in predictions.items():
        if not kind.names:
            cells = [f"{value:.3f}" for value in np.clip(values, 0, 5)]
        else:
            cells = [kind.names[n] if kind.words else str(int(n)) for n in values]
        lines = ["index\tprediction", *(f"{n}\t{cell}" for n, cell in enumerate(cells))]
        files[f"{SUBMITTED.get(part, kind.folder)}.tsv"] = "\n".join(lines) + "\n"
    return files
