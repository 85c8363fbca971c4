"""Texts of your own, in tables: a .csv, .tsv or .jsonl file with a column of texts, or two, and a column of labels."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from squeeze_jax.data import tables, text_set, tokens
from squeeze_jax.data.source import class_name
from squeeze_jax.data.text import check_widths
from squeeze_jax.data.text_set import Split, TextSet, format_class, format_number
from squeeze_jax.errors import UserError, nearest, shortened
from squeeze_jax.ranges import FLOAT32, Count, Distinct, Name, PathStr, Share, Whole

SHOWN = 3  # the number of rows that a line of the plan names
# A network's first outputs are near 0, and an output layer moves by about the learning rate in each step.
LARGE_LABEL = 10.0
LOSSES = {
    "class": "cross_entropy",
    "number": "squared_error",
    "labels": "binary_cross_entropy",
}
METRICS = {"class": "classification", "number": "regression", "labels": "labels"}
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


class Rows(NamedTuple):
    """The rows of a table that have texts and labels.

    Attributes:
      path: the table.
      texts: one column of n texts, or two.
      values: n labels as the table holds them; for several columns a tuple each.
      lines: the line of the table where each row begins.
      notes: lines of the plan about rows left out.
    """

    path: Path
    texts: tuple[list[str], ...]
    values: list[Any]
    lines: list[int]
    notes: tuple[str, ...]

    def take(self, indices: Sequence[int]) -> "Rows":
        """Returns the rows at `indices`."""
        return self._replace(
            texts=tuple([column[i] for i in indices] for column in self.texts),
            values=[self.values[i] for i in indices],
            lines=[self.lines[i] for i in indices],
        )

    def places(self):
        """Yields (label, "FILE:LINE") for each row."""
        for value, line in zip(self.values, self.lines, strict=True):
            yield value, f"{self.path}:{line}"


def make(
    train: PathStr | None,
    tokenizer: PathStr,
    *,
    eval: PathStr | None = None,
    holdout: Share = 0.1,
    text: str | tuple[str, ...] = "text",
    label: str | tuple[str, ...] = "label",
    target: Literal["class", "number", "labels"] = "class",
    classes: Annotated[tuple[Name, ...], Distinct()] = (),
    separator: str | None = None,
    label_separator: str = ",",
    length: Count = 128,
    buckets: tuple[Count, ...] = (),
    limit_train: Whole = 0,
) -> TextSet:
    """Reads the tables; the parameters are the keys of `config.data`.

    Rows without a text or a label are left out, and a line of the plan counts them. Numbers (target="number") are trained on,
    scored, predicted and exported in the unit of the table. Nothing scales them, because exported files have no place for a
    scale; a line of the plan warns of training labels beyond `LARGE_LABEL`.

    Args:
      train: the table to train on: .csv, .tsv or .jsonl, also compressed (.csv.gz). None for evaluation alone. None for both
        tables stands for 64 random texts, which suffice for predictions and exports of a trained network.
      tokenizer: a folder with the files of a tokenizer, or one of them: tokenizer.json, vocab.txt (WordPiece), or vocab.json
        beside merges.txt (byte-level BPE).
      eval: the table to evaluate on; None holds out the share `holdout` of `train`.
      holdout: the share of `train` to evaluate on if there is no `eval`, 0 to 1. A hash of the text decides whether a row is
        held out, so rows added later move no other row, and equal texts are in the same split.
      text: the column of the texts, or two columns for pairs of texts.
      label: the column of the labels. For target="labels" a string names a column of label names, and a tuple names columns
        of 0 and 1, one for each class.
      target: "class": each text has one of several classes; "number": each text has a number (regression), which is not scaled;
        "labels": each text has any number of classes, also none.
      classes: the names of the classes in their order; () takes all classes of `train`, sorted, also those that
        only held-out rows have.
      separator: the character between cells; None for the comma of .csv and the tab of .tsv.
      label_separator: for target="labels" with one column, the character between labels; a .jsonl file may have lists.
      length: the largest number of tokens of a sequence, special tokens included; longer texts are cut off, and a log line
        counts them.
      buckets: shorter lengths that batches of shorter texts are padded to, ascending. Texts of similar length form a batch;
        it gets the shortest of these lengths that fits it, or `length`. The training step is compiled once for each.
      limit_train: the number of training examples, chosen at random but always the same; 0 takes all.

    Raises:
      UserError: a table, a column, a label or a tokenizer is missing or wrong; the error names the line.
    """
    columns = (text,) if isinstance(text, str) else tuple(text)
    labels = (label,) if isinstance(label, str) else tuple(label)
    flags = target == "labels" and not isinstance(label, str)  # columns of 0 and 1
    _check_columns(columns, labels, target)
    _check_options(target, classes, separator, label_separator)
    loaded = tokens.load(tokenizer)
    loaded.room(length, len(columns) == 2)
    check_widths(length, buckets)
    if train is None and eval is None and target != "number" and not classes:
        raise UserError(
            "config.data needs a table to train on or to evaluate on: set train or eval"
        )
    unlabelled = target == "labels" and not flags  # an empty cell means no label
    reading = partial(
        _read_rows,
        columns=columns,
        labels=labels,
        separator=separator,
        flags=flags,
        unlabelled=unlabelled,
    )
    train_rows = None if train is None else reading(train)
    eval_rows = reading(eval) if eval is not None else None
    named_rows = eval_rows if train_rows is None else train_rows  # before the hold-out
    if train is None and eval is None:
        named_rows = eval_rows = _random_rows(loaded, len(columns), target, classes)
        flags = False
    elif eval_rows is None:
        train_rows, eval_rows = _hold_out(train_rows, holdout)
    rows = eval_rows if train_rows is None else train_rows
    if target == "number":
        names, read = (), _numbers
    elif target == "labels":
        separate = partial(
            _row_labels, columns=labels if flags else (), separator=label_separator
        )
        names = classes or (labels if flags else _label_names(named_rows, separate))
        read = partial(_label_matrix, names=names, separate=separate)
    else:
        names = classes or _class_names(named_rows, columns)
        read = partial(_class_numbers, names=names)
    kind = "row" if train_rows is None else "training row"
    unused = _unused(names, rows.path, read(rows), kind)
    large = _warn_of_large_numbers(train_rows) if target == "number" else ()
    parts = {str(eval_rows.path): len(eval_rows.values)}
    evaluated = Split(eval_rows.texts, read(eval_rows), parts)
    training, notes = None, list(eval_rows.notes)
    if train_rows is not None:
        parts = {str(train_rows.path): len(train_rows.values)}
        training = Split(train_rows.texts, read(train_rows), parts)
        notes = [*train_rows.notes, *(n for n in notes if n not in train_rows.notes)]
        text_set.warn_of_overlap(training, evaluated)
        if 0 < limit_train < len(training):
            training = training.take(text_set.random_subset(len(training), limit_train))
    return TextSet(
        tokenizer=loaded,
        length=length,
        buckets=tuple(buckets),
        train_split=training,
        eval_split=evaluated,
        label_names=tuple(names),
        source=str(rows.path),
        objective={"name": f"losses.{LOSSES[target]}"},
        metrics=METRICS[target],
        answer=_answer(target, tuple(names)),
        columns=columns,
        separator=separator,
        notes=(*notes, *unused, *large),
    )


def _check_columns(texts: Sequence[str], labels: Sequence[str], target: str) -> None:
    if len(texts) not in (1, 2):
        raise UserError(
            f"config.data.text = {tuple(texts)} should be one column, or two for pairs of texts"
        )
    if not labels or (len(labels) > 1 and target != "labels"):
        raise UserError(
            f"config.data.label = {tuple(labels)} should be one column; several are for config.data.target = 'labels'"
        )
    columns = [*texts, *labels]
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise UserError(
            f"config.data.text and config.data.label name the column {twice[0]!r} twice"
        )


def _check_options(target: str, classes, separator, label_separator) -> None:
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise UserError(
            f"config.data.separator = {separator!r} should be one character, such as ';', or None"
        )
    if not label_separator:
        raise UserError(
            "config.data.label_separator is empty: name the character between labels"
        )
    if classes and target == "number":
        raise UserError(
            "config.data.classes names classes, but config.data.target = 'number' has none: leave one of them out"
        )
    if len(classes) == 1 and target == "class":
        raise UserError(
            f"config.data.classes = {tuple(classes)} is one class: a classifier needs two or more"
        )


def _random_rows(tokenizer, columns: int, target: str, classes: Sequence[str]) -> Rows:
    """Returns rows of random texts, in place of tables that are absent."""
    rng = np.random.default_rng(0)
    texts = [
        [
            tokenizer.decode(rng.integers(0, tokenizer.size, 16)) or "a"
            for _ in range(64)
        ]
        for _ in range(columns)
    ]
    label = {"number": 0, "labels": [], "class": classes[0] if classes else ""}[target]
    return Rows(Path("no table"), tuple(texts), [label] * 64, [0] * 64, ())


def _unused(
    names: Sequence[str], path: Path, values: np.ndarray, kind: str
) -> tuple[str, ...]:
    """Returns a line of the plan about classes that no row has; () if there are none.

    Args:
      names: the classes.
      path: the table.
      values: int [n], the class of each row; or float [n, classes], 1 for the labels of each row.
      kind: the rows, "row" or "training row".
    """
    present = np.flatnonzero(values.any(0)) if values.ndim == 2 else np.unique(values)
    absent = [name for number, name in enumerate(names) if number not in present]
    if not absent or path == Path("no table"):
        return ()
    listed = shortened(", ".join(absent), 200)
    return (f"{path}: no {kind} has the class {listed}",)


def _warn_of_large_numbers(rows: Rows | None) -> tuple[str, ...]:
    """Returns a line of the plan if training labels are so large that a network takes long to reach them; otherwise ()."""
    numbers = np.zeros(1) if rows is None else _numbers(rows)
    if np.abs(numbers).max() <= LARGE_LABEL:
        return ()
    return (
        f"{rows.path}: labels from {numbers.min():g} to {numbers.max():g} are trained on as they are, and a network begins with"
        " answers near 0: scale them to about -1 to 1",
    )


def _read_rows(
    path: str, columns, labels, separator, flags: bool, unlabelled: bool
) -> Rows:
    """Returns the rows of a table that have texts and labels."""
    table = tables.read(Path(path).expanduser(), separator)
    for key, names in (("text", columns), ("label", labels)):
        for name in names:
            table.check_column(name, f"config.data.{key}")
    texts, values, lines, skipped = [], [], [], []
    for row, line in zip(table.rows, table.lines, strict=True):
        parts = [_cell_text(row.get(name), name, table, line) for name in columns]
        cells = [row.get(name) for name in labels]
        lacking = [cell is None or (cell == "" and not unlabelled) for cell in cells]
        if not all(parts) or all(lacking):
            skipped.append(line)
            continue
        if any(lacking):
            name = labels[lacking.index(True)]
            raise UserError(f"{table.path}:{line} has no {name!r}: write 0 or 1")
        texts.append(parts)
        values.append(tuple(cells) if flags else cells[0])
        lines.append(line)
    if not texts:
        raise UserError(f"{table.path} has no row with a text and a label")
    notes = []
    if skipped:
        examples = ", ".join(f"line {line}" for line in skipped[:SHOWN])
        dots = ", ..." if len(skipped) > SHOWN else ""
        notes.append(
            f"{table.path}: {len(skipped):,} rows without a text or a label left out ({examples}{dots})"
        )
    if table.quoted:
        notes.append(
            f"{table.path}: {table.quoted:,} cells stand in quotation marks, which are a part of a .tsv cell"
        )
    columns = tuple(list(column) for column in zip(*texts, strict=True))
    return Rows(table.path, columns, values, lines, tuple(notes))


def _cell_text(cell: Any, column: str, table: tables.Table, line: int) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise UserError(
            f"{table.path}:{line} has {shortened(repr(cell), 60)} in the column {column!r}, not a text"
        )
    text_set.check_text(cell, f"{table.path}:{line}")
    return cell.strip()


def _hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Returns the rows to train on and those to evaluate on."""
    held, kept = [], []
    for index, parts in enumerate(zip(*rows.texts, strict=True)):
        digest = hashlib.sha256("\t".join(parts).encode(errors="replace")).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < share * 2**64
        (held if is_held_out else kept).append(index)
    if not held or not kept:
        raise UserError(
            f"config.data.holdout = {share} leaves {len(kept)} rows to train on and {len(held)} to evaluate on: change it, or"
            " give a table in config.data.eval"
        )
    return rows.take(kept), rows.take(held)


def _class_name(value: Any, where: str) -> str:
    """Returns a label as the name of a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, str | int):
        return str(value).strip()
    raise UserError(
        f"{where} has the label {shortened(repr(value), 60)}, not a name or a number"
    )


def _sort_names(names: set[str]) -> tuple[str, ...]:
    """Returns the names of classes in order: by value if all are integers, otherwise alphabetically."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _class_names(rows: Rows, columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes of a table, sorted.

    Raises:
      UserError: there is only one class, each row has its own class, or the labels are numbers with fractions.
    """
    names = {_class_name(value, where) for value, where in rows.places()}
    if len(names) == 1:
        raise UserError(
            f"{rows.path} has the one class {shortened(repr(*names), 60)}: a classifier needs two or more"
        )
    fractions = [name for name in sorted(names) if _is_fraction(name)]
    if fractions and all(map(_is_number, names)):
        raise UserError(
            f"{rows.path} has labels such as {fractions[0]}: set config.data.target = 'number' for a regression, or name the"
            " classes by words"
        )
    if len(names) == len(rows.values) and len(names) > 2:
        raise UserError(
            f"{rows.path} has {len(names):,} classes in as many rows: config.data.label should name the column of the classes"
        )
    return _sort_names(names)


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _is_fraction(name: str) -> bool:
    return _is_number(name) and not float(name).is_integer()


def _class_numbers(rows: Rows, names: Sequence[str]) -> np.ndarray:
    """Returns the number of each row's class, int32 [n]."""
    number_of = {name: n for n, name in enumerate(names)}
    numbers = []
    for value, where in rows.places():
        name = _class_name(value, where)
        if name not in number_of:
            raise UserError(_unknown_label(name, where, names))
        numbers.append(number_of[name])
    return np.array(numbers, np.int32)


def _unknown_label(name: str, where: str, names: Sequence[str]) -> str:
    choices = shortened(nearest(name, names), 240)
    return (
        f"{where} has the label {shortened(repr(name), 60)}, which is no class{choices}"
    )


def _numbers(rows: Rows) -> np.ndarray:
    """Returns the label of each row, float32 [n]."""
    numbers = []
    for value, where in rows.places():
        digits = str(value).strip()
        if isinstance(value, bool) or not _is_number(digits):
            raise UserError(
                f"{where} has the label {shortened(repr(value), 60)}, which is not a number"
            )
        if abs(float(digits)) > FLOAT32:
            raise UserError(f"{where} has the label {digits}, beyond 32-bit floats")
        numbers.append(float(digits))
    return np.array(numbers, np.float32)


def _row_labels(
    value: Any, where: str, columns: Sequence[str], separator: str
) -> list[str]:
    """Returns the names of the labels of one row."""
    if columns:
        return [
            column
            for column, cell in zip(columns, value, strict=True)
            if _is_yes(cell, column, where)
        ]
    if isinstance(value, list):
        return [_class_name(each, where) for each in value]
    parts = (part.strip() for part in _class_name(value, where).split(separator))
    return [part for part in parts if part]


def _is_yes(cell: Any, column: str, where: str) -> bool:
    word = str(cell).strip().lower()
    if word not in YES + NO:
        raise UserError(
            f"{where} has {shortened(repr(cell), 60)} in the column {column!r}: write 0 or 1"
        )
    return word in YES


def _label_names(rows: Rows, separate) -> tuple[str, ...]:
    names = {name for value, where in rows.places() for name in separate(value, where)}
    if not names:
        raise UserError(f"{rows.path} has no labels")
    if names <= {*YES, *NO}:
        raise UserError(
            f"{rows.path} has the labels {', '.join(sorted(names))}: for a column of 0 and 1 write its name in a tuple, such as"
            " config.data.label = ('toxic',)"
        )
    return _sort_names(names)


def _label_matrix(rows: Rows, names: Sequence[str], separate) -> np.ndarray:
    """Returns 1 for the labels of each row and 0 for other classes, float32 [n, classes]."""
    number_of = {name: n for n, name in enumerate(names)}
    matrix = np.zeros((len(rows.values), len(names)), np.float32)
    for row, (value, where) in enumerate(rows.places()):
        for name in separate(value, where):
            if name not in number_of:
                raise UserError(_unknown_label(name, where, names))
            matrix[row, number_of[name]] = 1
    return matrix


def _answer(target: str, names: tuple[str, ...]):
    """Returns the function that prints a network's outputs for one text."""
    return {
        "class": partial(format_class, names),
        "number": format_number,
        "labels": partial(_format_labels, names),
    }[target]


def _format_labels(names: Sequence[str], logits: np.ndarray) -> str:
    """Returns the classes with a probability of one half or more, such as "toxic 93.1%, insult 61.0%"."""
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    order = np.argsort(-probabilities, kind="stable")
    likely = [
        f"{class_name(names, n)} {probabilities[n]:.1%}"
        for n in order
        if logits[n] >= 0
    ]
    return ", ".join(likely) or "no label"
