"""Extractive question answering on SQuAD 1.1 and 2.0, arXiv 1606.05250 and 1806.03822, and files of the same format.

An example is a window: a question and the part of its document that fits beside it. The answer to a question is the best one
over all its windows.
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
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.ranges import Count, Finite, PathStr, Whole

log = logging.getLogger(__name__)

PREDICTED = 8  # windows in one batch of the job predict
SHOWN = 3  # answers that the job predict prints for a question


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

    The label of a question is its first answer whose text stands in the document where the file claims. A training question
    whose answers all stand elsewhere is left out, and a warning counts them; in evaluation every question counts. The label
    of a window that does not show the answer is its first token.

    Args:
      eval: the file of questions to evaluate on, in the format of SQuAD 1.1 or 2.0: .json or .json.gz.
      tokenizer: a folder with the files of a tokenizer, or one of them: tokenizer.json, vocab.txt (WordPiece), or vocab.json
        beside merges.txt (byte-level BPE).
      train: the file of questions to train on, in the same format; None for evaluation alone.
      length: tokens of a window, special tokens included.
      stride: tokens of the document that a window shares with the one before.
      max_question: the largest number of tokens of a question; longer questions are cut off.
      buckets: shorter lengths that batches of shorter texts are padded to, ascending. Texts of similar length form a batch;
        it gets the shortest of these lengths that fits it, or `length`. The training step is compiled once for each.
      n_best: the number of start and end positions in each window, and of answers to each question, that are considered.
      max_answer: the largest number of tokens in an answer.
      null_threshold: for version 2, the answer is "no answer" if its score exceeds the best answer's by more than this.

    Raises:
      UserError: a file cannot be used, or a value is out of range; or, when the windows are first made, a question leaves no
        room for the document.
    """
    minimums = dict(stride=0, max_question=1, n_best=1, max_answer=1)
    options = dict(
        stride=stride, max_question=max_question, n_best=n_best, max_answer=max_answer
    )
    for key, value in options.items():
        if value < minimums[key]:
            raise UserError(
                f"config.data.{key} = {value} should be {minimums[key]} or more"
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
    if loaded.truncation_side == "left":
        raise UserError(
            f'{tokenizer}: truncation_side = "left" in tokenizer_config.json does not go with windows over documents, which start at'
            " their beginning: remove it"
        )
    cutter = Cutter(loaded, length, stride, max_question, tuple(buckets))
    return Squad(
        cutter=cutter,
        train_content=None if train is None else _with_labels(questions.read(train)),
        eval_content=questions.read(eval),
        n_best=n_best,
        max_answer=max_answer,
        null_threshold=null_threshold,
    )


def _with_labels(content: Questions) -> Questions:
    """Returns the questions that have a label or are marked as having no answer."""
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
    """Questions about documents, cut into windows, see `pipeline.Data`; `make` builds it.

    A batch has "tokens" and "segments" int32 [b, l], "attended" bool [b, l], "start" and "end" int32 [b], the positions of the
    answer's first and last token, "mask" bool [b], and "index" int64 [b], the index of the window.

    Attributes:
      cutter: makes the windows.
      train_content, eval_content: the questions; `train_content` is None for evaluation alone.
      n_best, max_answer, null_threshold: see `make`.
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
        """The number of tokens of a window."""
        return self.cutter.length

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self.cutter.tokenizer.size

    @property
    def describe(self) -> str:
        """A phrase about the dataset."""
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
        """Whether questions may have no answer."""
        return self.eval_content.version2

    # A split is tokenized when it is first read, because not every job reads every split.
    @functools.cached_property
    def train_split(self) -> Split | None:
        """The training questions as windows; None for evaluation alone."""
        return None if self.train_content is None else self._split(self.train_content)

    @functools.cached_property
    def eval_split(self) -> Split:
        """The evaluation questions as windows."""
        return self._split(self.eval_content)

    def _split(self, content: Questions) -> Split:
        return self.cutter.split(content, questions.answer_places(content))

    @property
    def num_train(self) -> int:
        """The number of training windows."""
        return len(self.train_split.windows) if self.train_split else 0

    @property
    def num_eval(self) -> int:
        """The number of evaluation windows."""
        return len(self.eval_split.windows)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> text.Stream:
        """Returns the endless stream of shuffled windows, see `text.SequenceReader.train`.

        Raises:
          UserError: there is no training file, or an error that `text.SequenceReader.train` raises.
        """
        if self.train_split is None:
            raise UserError(
                "config.data.train names no file: there is only evaluation without one"
            )
        return self.train_split.reader.train(batch, seed, start, process)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> text.Stream:
        """Returns every window of the evaluation questions once, see `text.SequenceReader.eval`."""
        return self.eval_split.reader.eval(batch, process)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes of batches of `rows` rows, one dict per width."""
        return self.eval_split.reader.specs(rows)

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Returns the batch as it is; this task has no augmentation."""
        return batch

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the network inputs of a batch, see `text.inputs`."""
        return text.inputs(batch)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an exported file's inputs, without the batch axis."""
        return text.exported_inputs(self.length)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the network inputs for a batch of one example."""
        return text.example_inputs(self.length)

    @property
    def threshold(self) -> float | None:
        """The threshold for "no answer", see `Answers.texts`; None if every question has an answer."""
        return self.null_threshold if self.version2 else None

    @property
    def golds(self) -> dict[str, list[str]]:
        """The correct answers to the evaluation questions, {id of a question: texts}."""
        return {q.id: [a.text for a in q.answers] for q in self.eval_content.questions}

    def answers(self, rows: Mapping[str, np.ndarray]) -> Answers:
        """Returns the best answers to every evaluation question.

        Args:
          rows: "start" and "end", logits [w, length] of all windows in any order, and "index" [w], the indices of the windows.

        Raises:
          ValueError: the rows do not hold each window once.
        """
        order = np.argsort(rows["index"])
        if not np.array_equal(rows["index"][order], np.arange(self.num_eval)):
            raise ValueError(
                f"{len(order)} windows, not each of {self.num_eval} windows once"
            )
        logits = {side: np.asarray(rows[side])[order] for side in SIDES}
        return self._best_answers(self.eval_split, logits)

    def predictions(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Returns {id of a question: text of its answer}, "" for "no answer", as SQuAD's official evaluation reads it.

        Args:
          rows: see `answers`.
        """
        return self.answers(rows).texts(self.threshold)

    def null_odds(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns {id of a question: the score of "no answer" minus the best answer's score}.

        Args:
          rows: see `answers`.
        """
        return self.answers(rows).odds

    def submission(self, rows: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Returns the files that SQuAD's official evaluation reads: "predictions.json", and for version 2 "null_odds.json".

        Args:
          rows: see `answers`.

        Returns:
          {name of the file: its content}.
        """
        best = self.answers(rows)
        contents = {"predictions.json": best.texts(self.threshold)}
        if self.version2:
            contents["null_odds.json"] = best.odds
        return {name: json.dumps(each) + "\n" for name, each in contents.items()}

    def _best_answers(self, split: Split, logits: Mapping[str, np.ndarray]) -> Answers:
        limits = dict(n_best=self.n_best, max_answer=self.max_answer)
        return answers.best_answers(split, logits, **limits)

    def predict(self, arguments: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the likeliest answers to questions about a document, with their places in it.

        Args:
          arguments: the document, as a text or the name of a text file, followed by one or more questions.
          run: see `pipeline.Data`.

        Raises:
          UserError: the document or a question is missing, the file cannot be read, or the document is empty; or, after all
            answers, a question is empty or too long.
        """
        if len(arguments) < 2:
            raise UserError(
                "the job predict needs a document, a text file or its text, and questions:"
                " run.py --job=predict --workdir=DIR FILE.txt 'Who …?'"
            )
        document = _read_document(arguments[0])
        texts = [question.strip() for question in arguments[1:]]
        reasons = self._bad_questions(texts)
        if len(texts) == 1:
            answering.check([*reasons.values()], 1, "question")
        usable = [
            Question(str(index), question, 0, ())
            for index, question in enumerate(texts)
            if index not in reasons
        ]
        if usable:
            content = Questions([document], usable, self.version2)
            split = self.cutter.split(content, [None] * len(usable))
            best = self._best_answers(split, _logits(split.reader, run))
        for index, question in enumerate(texts):
            yield question
            if index in reasons:
                yield f"  {reasons[index]}"
            else:
                yield from self._lines(best, str(index))
        answering.check([*reasons.values()], len(texts), "question")

    def _bad_questions(self, texts: Sequence[str]) -> dict[int, str]:
        """Returns {index: reason} for the questions that are empty or too long."""
        return {
            index: f"the question {question!r} has {len(ids)} tokens: it should have 1 to config.data.max_question ="
            f" {self.cutter.max_question}"
            for index, (question, ids) in enumerate(
                zip(texts, self._encode(texts), strict=True)
            )
            if not 0 < len(ids) <= self.cutter.max_question
        }

    def _encode(self, texts):
        return self.cutter.tokenizer.encode_many(texts)

    def _lines(self, answered: Answers, id: str) -> Iterator[str]:
        """Yields the lines that the job predict prints for a question."""
        best = list(answered.best[id])
        if self.version2:
            best.append(Best("", 0, 0, answered.no_answer[id]))
        best = [each for each in best if np.isfinite(each.score)]
        if not best:
            yield "  no answer could be read off: the network's scores are not finite"
            return
        scores = np.array([each.score for each in best])
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        # "No answer" comes first only if its score exceeds the best answer's by the threshold.
        margins = [0.0 if each.text else self.null_threshold for each in best]
        for i in np.argsort(margins - scores, kind="stable")[:SHOWN]:
            text_of_answer, begin, end, score = best[i]
            where = f"characters {begin} to {end}, " if text_of_answer else ""
            answer = " ".join(text_of_answer.split()) or "no answer"  # in one line
            yield f"  {probabilities[i]:6.1%}  {answer}  ({where}score {score:.2f})"


def _logits(reader: text.SequenceReader, run: Callable) -> dict[str, np.ndarray]:
    """Returns the logits of all windows, {"start", "end"}: [w, l]."""
    parts = []
    for batch in dataclasses.replace(reader, buckets=()).eval(PREDICTED):
        rows = {key: batch[key].astype(np.int32) for key in text.INPUT_KEYS}
        logits = run(rows)
        parts.append({side: np.asarray(logits[side])[batch["mask"]] for side in SIDES})
    return {side: np.concatenate([part[side] for part in parts]) for side in SIDES}


def _read_document(argument: str) -> str:
    """Returns the text of the file that `argument` names, or `argument` itself if it is a text."""
    document = argument
    try:
        path = Path(argument).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):  # a text, too long for a file name
        exists = False
    if exists:
        document = text_files.read_text(path)
    elif argument == "".join(argument.split()) and Path(argument).suffix:
        raise UserError(f"no such file: {shortened(argument, 200)}")
    if not document.strip():
        named = (
            f"{shortened(argument, 200)} is empty"
            if exists
            else "the document is empty"
        )
        raise UserError(f"{named}: there is no answer in it")
    return document
