"""Extractive question answering: SQuAD 1.1 and 2.0, arXiv 1606.05250 and 1806.03822, and files of the same format.

An example is a window: a question and the part of its document that fits beside it. Answers are read off all windows of a
question together.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from squeeze_jax.data import (
    answering,
    answers,
    questions,
    spans,
    text,
    text_files,
    tokens,
)
from squeeze_jax.data.answers import SIDES, Answers, Best
from squeeze_jax.data.questions import Question, Questions
from squeeze_jax.data.spans import Cutter, Split
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Count, Finite, PathStr, Whole

log = logging.getLogger(__name__)

PREDICTED = 8  # windows at a time
SHOWN = 3  # answers to a question of the command line


def make(
    eval: PathStr,
    tokenizer: PathStr,
    *,
    train: PathStr | None = None,
    length: Count = 384,
    stride: Whole = 128,
    max_question: Count = 64,
    buckets: tuple[Count, ...] = (),
    n_best: Count = 20,
    max_answer: Count = 30,
    null_threshold: Finite = 0.0,
) -> "Squad":
    """Reads the files; the parameters are the keys of `config.data`.

    Training questions without an answer where the file says it begins are left out, with a warning that counts them; in
    evaluation every question counts. The label is the first answer of a question that is where the file says, and the first
    token of the window where there is none.

    Args:
      eval, train: files in the format of SQuAD, .json or .json.gz, also of version 2; without `train` there is only
        evaluation.
      tokenizer: folder or file, see `tokens.load`.
      length: tokens of a window, special tokens included.
      stride: tokens of the document that a window has in common with the one before.
      max_question: longer questions are cut off at their end.
      buckets: shorter lengths that windows may be padded to, see `text`.
      n_best: begins and ends of each window, and answers of each question, that are looked at.
      max_answer: tokens of an answer at most.
      null_threshold: with version 2, how far the score of "no answer" has to be above the best answer's to be the answer.

    Raises:
      UserError: a file that cannot be used, or a value out of range; when windows are first asked for, ones that leave no
        room for the document.
    """
    least = dict(stride=0, max_question=1, n_best=1, max_answer=1)
    given = dict(
        stride=stride, max_question=max_question, n_best=n_best, max_answer=max_answer
    )
    for key, value in given.items():
        if value < least[key]:
            raise UserError(
                f"config.data.{key} = {value} should be {least[key]} or more"
            )
    if length <= stride:
        raise UserError(
            f"config.data.length = {length} should be more than config.data.stride = {stride}, and by what a question takes"
        )
    text.check_widths(length, buckets)
    loaded = tokens.load(tokenizer)
    spans.special_token_counts(loaded)
    if loaded.pad is None:
        raise UserError(
            f"{tokenizer} has no token for padding, such as [PAD]: name it in tokenizer_config.json"
        )
    cutter = Cutter(loaded, length, stride, max_question, tuple(buckets))
    return Squad(
        cutter=cutter,
        train_content=None if train is None else _usable(questions.read(train)),
        eval_content=questions.read(eval),
        n_best=n_best,
        max_answer=max_answer,
        null_threshold=null_threshold,
    )


def _usable(content: Questions) -> Questions:
    """Those that have a label, and those that are said to have no answer."""
    pairs = zip(content.questions, questions.answer_places(content), strict=True)
    kept = [q for q, place in pairs if place or not q.answers]
    total = len(content.questions)
    if len(kept) < total:
        log.warning(
            "%d of %d training questions left out: no answer is where the file says, at its answer_start",
            total - len(kept),
            total,
        )
    if not kept:
        raise UserError(
            "config.data.train has no question whose answer is at its answer_start, counted in characters from 0"
        )
    return content._replace(questions=kept)


@dataclasses.dataclass(frozen=True)
class Squad:
    """Questions about documents as windows, see `pipeline.Data`; `make` builds it.

    Batches: "tokens", "segments" int32 [b, l], "attended" bool [b, l], "start", "end" int32 [b], "mask", "index" [b]: the
    number of the window.
    """

    reads = "tokens"
    label_names = ()
    model: ClassVar = {"task": "span"}
    objective: ClassVar = {"name": "losses.span"}
    noun = "window"
    metrics = "squad"
    fixed = True

    cutter: Cutter
    train_content: Questions | None
    eval_content: Questions
    n_best: int
    max_answer: int
    null_threshold: float

    @property
    def length(self) -> int:
        return self.cutter.length

    @property
    def vocabulary(self) -> int:
        return self.cutter.tokenizer.size

    @property
    def describe(self) -> str:
        contents = {"train": self.train_content, "test": self.eval_content}
        parts = [
            f"{len(content.questions):,} {name}"
            for name, content in contents.items()
            if content
        ]
        version = "2.0" if self.version2 else "1.1"
        return (
            f"{' + '.join(parts)} questions of SQuAD {version}, in windows of"
            f" {self.length} tokens"
        )

    @property
    def version2(self) -> bool:
        """Whether there may be no answer."""
        return self.eval_content.version2

    # Tokenized when first asked for: not every job reads every split.
    @functools.cached_property
    def train_split(self) -> Split | None:
        return None if self.train_content is None else self._split(self.train_content)

    @functools.cached_property
    def eval_split(self) -> Split:
        return self._split(self.eval_content)

    def _split(self, content: Questions) -> Split:
        return self.cutter.split(content, questions.answer_places(content))

    @property
    def num_train(self) -> int:
        return len(self.train_split.windows) if self.train_split else 0

    @property
    def num_eval(self) -> int:
        return len(self.eval_split.windows)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> text.Stream:
        """The endless stream of shuffled windows, see `text.SequenceReader.train`.

        Raises:
          UserError: also where there is no training file.
        """
        if self.train_split is None:
            raise UserError(
                "config.data.train names no file: there is only evaluation without one"
            )
        return self.train_split.reader.train(batch, seed, start, process)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> text.Stream:
        """Every window of the evaluation questions once, see `text.SequenceReader.eval`."""
        return self.eval_split.reader.eval(batch, process)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One for each width of windows."""
        return self.eval_split.reader.specs(rows)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Nothing."""
        return batch

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """See `text.inputs`."""
        return text.inputs(batch)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        return text.exported_inputs(self.length)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return text.example_inputs(self.length)

    @property
    def threshold(self) -> float | None:
        """Of the odds of "no answer"; None where every question has an answer."""
        return self.null_threshold if self.version2 else None

    @property
    def golds(self) -> dict[str, list[str]]:
        """The texts of the answers to each evaluation question's id."""
        return {q.id: [a.text for a in q.answers] for q in self.eval_content.questions}

    def answers(self, rows: Mapping[str, np.ndarray]) -> Answers:
        """The best answers to every evaluation question.

        Args:
          rows: "start" and "end", logits [w, length] of all windows, and "index" [w], which windows these are.

        Raises:
          ValueError: windows are missing.
        """
        order = np.argsort(rows["index"])
        if not np.array_equal(rows["index"][order], np.arange(self.num_eval)):
            raise ValueError(
                f"{len(order)} windows, not each of {self.num_eval} windows once"
            )
        logits = {side: np.asarray(rows[side])[order] for side in SIDES}
        return self._read_off(self.eval_split, logits)

    def predictions(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """{id of a question: text}, what the official evaluation reads as JSON; "" for no answer; see `answers`."""
        return self.answers(rows).texts(self.threshold)

    def null_odds(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        """{id of a question: how far the score of "no answer" is above the best answer's}; see `answers`."""
        return self.answers(rows).odds

    def submission(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Files that the official evaluation reads, {"predictions.json": text}, for version 2 also "null_odds.json"."""
        found = self.answers(rows)
        written = {"predictions.json": found.texts(self.threshold)}
        if self.version2:
            written["null_odds.json"] = found.odds
        return {name: json.dumps(each) + "\n" for name, each in written.items()}

    def _read_off(self, split: Split, logits: Mapping[str, np.ndarray]) -> Answers:
        limits = dict(n_best=self.n_best, max_answer=self.max_answer)
        return answers.best_answers(split, logits, **limits)

    def predict(self, given: Sequence[str], run: Callable) -> Iterator[str]:
        """The likeliest answers to questions about a document, with where they stand in it.

        Args:
          given: the document, a text or the name of a file of it, and one or more questions.
          run: see `pipeline.Data`.

        Raises:
          UserError: fewer than two, a file that cannot be read, an empty document; after all answers, questions that are
            empty or too long.
        """
        if len(given) < 2:
            raise UserError(
                "the job predict needs a document, a text file or its text, and questions:"
                " run.py --job=predict --workdir=DIR FILE.txt 'Who …?'"
            )
        document, asked = _document(given[0]), [each.strip() for each in given[1:]]
        reasons = self._unfit(asked)
        if len(asked) == 1:
            answering.check([*reasons.values()], 1, "question")
        rows = [
            Question(str(number), each, 0, ())
            for number, each in enumerate(asked)
            if number not in reasons
        ]
        if rows:
            content = Questions([document], rows, self.version2)
            split = self.cutter.split(content, [None] * len(rows))
            found = self._read_off(split, _run(split.reader, run))
        for number, each in enumerate(asked):
            yield each
            if number in reasons:
                yield f"  {reasons[number]}"
            else:
                yield from self._lines(found, str(number))
        answering.check([*reasons.values()], len(asked), "question")

    def _unfit(self, asked: Sequence[str]) -> dict[int, str]:
        """Returns {index: why it has no answer} of the questions that are empty or too long."""
        return {
            number: f"the question {each!r} has {len(ids)} tokens: it should have 1 to config.data.max_question ="
            f" {self.cutter.max_question}"
            for number, (each, ids) in enumerate(
                zip(asked, self._encode(asked), strict=True)
            )
            if not 0 < len(ids) <= self.cutter.max_question
        }

    def _encode(self, texts):
        return self.cutter.tokenizer.encode_many(texts)

    def _lines(self, found: Answers, id: str) -> Iterator[str]:
        best = list(found.best[id])
        if self.version2:
            best.append(Best("", 0, 0, found.no_answer[id]))
        best = [each for each in best if np.isfinite(each.score)]
        if not best:
            yield "  no answer could be read off: the network's scores are not finite"
            return
        scores = np.array([each.score for each in best])
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        # "No answer" is put first where the threshold says so.
        needs = [0.0 if each.text else self.null_threshold for each in best]
        for i in np.argsort(needs - scores, kind="stable")[:SHOWN]:
            found, begin, end, score = best[i]
            where = f"characters {begin} to {end}, " if found else ""
            said = " ".join(found.split()) or "no answer"  # in one line
            yield f"  {chances[i]:6.1%}  {said}  ({where}score {score:.2f})"


def _run(reader: text.SequenceReader, run: Callable) -> dict[str, np.ndarray]:
    """Logits {"start", "end"}: [w, l] of all windows."""
    parts = []
    for batch in dataclasses.replace(reader, buckets=()).eval(PREDICTED):
        rows = {key: batch[key].astype(np.int32) for key in text.INPUT_KEYS}
        logits = run(rows)
        parts.append({side: np.asarray(logits[side])[batch["mask"]] for side in SIDES})
    return {side: np.concatenate([part[side] for part in parts]) for side in SIDES}


def _document(given: str) -> str:
    """The text of a file, or `given` itself."""
    try:
        path = Path(given).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):  # a text, too long for a name
        there = False
    if there:
        given = text_files.read_text(path)
    elif given == "".join(given.split()) and Path(given).suffix:
        raise UserError(f"no such file: {given}")
    if not given.strip():
        raise UserError("the document is empty: there is no answer in it")
    return given
