"""Contiguous text for recurrent networks: each batch continues the previous one, and the network carries its state over.

The text is cut into streams of equal length, one for each row of a batch, as in Zaremba et al., arXiv 1409.2329, and in
PyTorch's example word_language_model. Row i of batch k + 1 continues row i of batch k. Inputs are `length` tokens, targets
the tokens that follow each of them.

Training. A stream has `steps = (tokens // batch - 1) // length` windows; the end of the text that fills no window of every
stream is not read, fewer than batch * (length + 1) tokens. After the last window the streams begin again, with fresh=True
in all rows. Batch k is a pure function of k, so a run resumes at any batch. The order has nothing random: the seed is not
used.

Evaluation. The text is cut into consecutive windows, the last one padded, and each stream is a run of them. So every token
but the first is predicted exactly once. A stream other than the first begins in the middle of the text: it first reads the
`warm_up` windows before its own, with mask=False, so that its state is the result of that many windows instead of zeros.
With streams=1 the network reads the text from beginning to end, and the perplexity is exact, but the other rows of a batch are
computed in vain. The default is as many streams as a batch has rows. On the test text of Penn Treebank, a `small` network's
perplexity was 172.957 with 20 streams and a warm-up of 4 windows of 20 words, 172.984 without warm-up, and 172.951 with one
stream.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import files
from squeeze_jax.data import answering, pipeline, text_files
from squeeze_jax.data.text import Stream
from squeeze_jax.errors import UserError, shown
from squeeze_jax.ranges import Count, PathStr, Whole

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
LIKELIEST = 5  # next tokens that `predict` prints

Level = Literal["words", "characters"]
Paths = str | tuple[str, ...]


def make(
    train: PathStr | tuple[PathStr, ...],
    eval: PathStr | tuple[PathStr, ...],
    length: Count = 35,
    *,
    level: Level = "words",
    streams: Count | None = None,
    warm_up: Whole = 4,
) -> "Contiguous":
    """Reads text; the parameters are the keys of `config.data`.

    Args:
      train: text files to train on, UTF-8, gzipped if the name ends in ".gz". Their tokens are the vocabulary.
      eval: text files to evaluate on. Words that the vocabulary lacks become "<unk>" if it has that.
      length: tokens of a window; gradients flow through one window. At least 1.
      level: "words" are separated by white space, and each line ends in "<eos>"; "characters" are the text as it is.
      streams: the number of rows of an evaluation batch that are used, at least 1; None uses all.
      warm_up: the number of windows that an evaluation stream reads before its own first window, at least 0.

    Raises:
      UserError: a file cannot be read, there is too little text, a value is out of range, or the vocabulary lacks a token.
    """
    for key, value, least in ("length", length, 1), ("warm_up", warm_up, 0):
        if value < least:
            raise UserError(f"config.data.{key} = {value} should be at least {least}")
    if streams is not None and streams < 1:
        raise UserError(f"config.data.streams = {streams} should be at least 1")
    training = _read_tokens(train, level)
    vocabulary = Vocabulary.of(training, level)
    data = Contiguous(
        vocabulary,
        vocabulary.encode(training, "config.data.train"),
        vocabulary.encode(_read_tokens(eval, level), "config.data.eval"),
        length,
        streams,
        warm_up,
    )
    if len(data.train_tokens) < length + 1:
        raise UserError(
            f"config.data.train has {len(data.train_tokens)} tokens: a window takes length + 1 = {length + 1}"
        )
    if len(data.eval_tokens) < 2:
        raise UserError("config.data.eval has no token after its first: nothing to do")
    return data


def _read_tokens(paths: Paths, level: Level) -> list[str]:
    """Reads the tokens of text files, one file after the other."""
    paths = [paths] if isinstance(paths, str) else paths
    tokens = []
    for path in paths:
        path = Path(path).expanduser()
        if level == "characters":
            tokens += text_files.read_text(path)
        else:
            lines = (
                (*line.split(), END_OF_LINE) for line in text_files.read_lines(path)
            )
            tokens += itertools.chain.from_iterable(lines)
    return tokens


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a text; a token's id is its index.

    Attributes:
      tokens: the most frequent first, equally frequent ones in alphabetical order.
      level: see `make`.
    """

    tokens: tuple[str, ...]
    level: Level

    @staticmethod
    def of(text: Sequence[str], level: Level) -> "Vocabulary":
        """Returns the vocabulary of a text."""
        counts = collections.Counter(text)
        ordered = sorted(counts, key=lambda token: (-counts[token], token))
        return Vocabulary(tuple(ordered), level)

    def encode(self, text: Sequence[str], where: str) -> np.ndarray:
        """Returns the ids of tokens, int32 [n].

        Args:
          text: the tokens.
          where: the name of the text, for errors.

        Raises:
          UserError: the vocabulary lacks a token, and also "<unk>".
        """
        id_of = {token: id for id, token in enumerate(self.tokens)}
        unknown_id = id_of.get(UNKNOWN, -1)
        ids = np.array([id_of.get(token, unknown_id) for token in text], np.int32)
        unknown = [text[position] for position in np.flatnonzero(ids < 0)]
        if unknown:
            fix = "add such text to config.data.train"
            if self.level == "words":
                fix += f", or write {UNKNOWN} for rare words there"
            raise UserError(
                f"{where} has {len(unknown):,} {self.level} that config.data.train lacks, such as {unknown[0]!r}: {fix}"
            )
        return ids

    def digest(self) -> str:
        """Returns a text that is the same for vocabularies in which equal ids are equal tokens."""
        return files.digest([self.level, *self.tokens])

    def split(self, text: str) -> list[str]:
        """Returns the tokens of one line. A line of words begins with "<eos>", as if it followed another line."""
        if self.level == "characters":
            return list(text)
        prefix = [END_OF_LINE] if END_OF_LINE in self.tokens else []
        return prefix + text.split()


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Contiguous text, see `pipeline.Data`; `make` builds it.

    A batch has "tokens" and "targets" int32 [b, l], "attended" bool [b, l] (False: no target, at the text's end), "fresh"
    bool [b] (the row's state begins with zeros), "mask" bool [b] (False: padding, or a window that is read only for its
    state) and "index" int64 [b], the window. In training windows are numbered stream by stream.

    Attributes:
      words: the vocabulary.
      train_tokens, eval_tokens: token ids, int32 [n].
      length, streams, warm_up: see `make`.
    """

    reads = "tokens"
    noun = "window"
    metrics = "perplexity"
    label_names = ()
    contiguous = True  # networks carry their state from batch to batch
    # The outputs for a window depend on the state before it, so they cannot be cached by window.
    fixed = False

    words: Vocabulary
    train_tokens: np.ndarray
    eval_tokens: np.ndarray
    length: int
    streams: int | None
    warm_up: int

    @property
    def describe(self) -> str:
        """A phrase about the dataset."""
        unknown = ""
        if UNKNOWN in self.words.tokens:
            share = np.mean(self.eval_tokens == self.words.tokens.index(UNKNOWN))
            unknown = f", {share:.1%} of the test {self.words.level} are {UNKNOWN}"
        return (
            f"{len(self.train_tokens):,} train + {len(self.eval_tokens):,} test {self.words.level}, contiguous, in windows"
            f" of {self.length}; a vocabulary of {self.vocabulary:,}{unknown}"
        )

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the vocabulary."""
        return len(self.words.tokens)

    @property
    def model(self) -> dict[str, Any]:
        """Options of the model that follow from the data, see `pipeline.Data`."""
        return {"task": "causal_lm", "vocabulary": self.vocabulary}

    @property
    def objective(self) -> dict[str, str]:
        """The default loss, see `pipeline.Data`."""
        return {"name": "losses.next_token"}

    @property
    def num_train(self) -> int:
        """The number of windows in the training text."""
        return (len(self.train_tokens) - 1) // self.length

    @property
    def num_eval(self) -> int:
        """The number of windows in the evaluation text."""
        return -(-(len(self.eval_tokens) - 1) // self.length)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an exported file's inputs, without the batch axis."""
        return {"tokens": jax.ShapeDtypeStruct((self.length,), np.int32)}

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Stream:
        """Returns the endless stream of training batches.

        Args:
          batch, seed, start, process: see `pipeline.training`.

        Raises:
          UserError: the text is too short for so many streams, or an error that `pipeline.training` raises.
        """
        index, count = process
        rows = pipeline.share(batch, count)
        pipeline.check_start(batch, seed, start)
        tokens = len(self.train_tokens) // batch
        steps = (tokens - 1) // self.length
        if steps < 1:
            raise UserError(
                f"config.batch = {batch} streams of config.data.length + 1 = {self.length + 1} tokens are more than the"
                f" {len(self.train_tokens):,} of config.data.train: lower one of them"
            )
        row = np.arange(index * rows, (index + 1) * rows)

        def make(step):
            step %= steps
            batch = self._windows(self.train_tokens, row * tokens + step * self.length)
            return batch | {
                "fresh": np.full(rows, step == 0),
                "mask": np.ones(rows, bool),
                "index": row * steps + step,
            }

        return Stream(make, start // batch, None)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Stream:
        """Returns each evaluation window once, see the top of this file.

        Args:
          batch, process: see `pipeline.evaluation`.
        """
        index, count = process
        rows = pipeline.share(batch, count)
        streams = min(batch, self.streams or batch, self.num_eval)
        windows_per_stream = -(-self.num_eval // streams)
        warm_up = min(self.warm_up, (streams - 1) * windows_per_stream)
        row = np.arange(index * rows, (index + 1) * rows)

        def make(step):
            window = row * windows_per_stream + step - warm_up
            is_read = (row < streams) & (window >= 0) & (window < self.num_eval)
            scored = is_read & (step >= warm_up)
            batch = self._windows(
                self.eval_tokens, np.where(is_read, window, 0) * self.length
            )
            return batch | {
                "fresh": (window == 0) | (step == 0),
                "mask": scored,
                "index": np.where(scored, window, -1),
            }

        return Stream(make, 0, warm_up + windows_per_stream)

    def _windows(self, text: np.ndarray, begins: np.ndarray) -> pipeline.Batch:
        """Returns "tokens", "targets" and "attended" of the windows that begin at these positions."""
        positions = begins[:, None] + np.arange(self.length)
        return {
            "tokens": np.take(text, positions, mode="clip"),
            "targets": np.take(text, positions + 1, mode="clip"),
            "attended": positions + 1 < len(text),
        }

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the one shape that all batches have."""
        spec, shape = jax.ShapeDtypeStruct, (rows, self.length)
        return [
            {
                "tokens": spec(shape, np.int32),
                "targets": spec(shape, np.int32),
                "attended": spec(shape, np.bool_),
                "fresh": spec((rows,), np.bool_),
                "mask": spec((rows,), np.bool_),
            }
        ]

    def augment(self, key: jax.Array | None, batch: dict) -> dict:
        """Returns the batch as it is; this task has no augmentation."""
        del key
        return batch

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the network's inputs: "tokens" and, except for an exported file, "fresh"."""
        return {key: batch[key] for key in ("tokens", "fresh") if key in batch}

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the network inputs for a batch of one example."""
        return jax.eval_shape(self.inputs, self.specs(1)[0])

    def predict(self, arguments: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the perplexity of each text and the likeliest next tokens; reads only the end of a long text.

        Args:
          arguments: the texts.
          run: see `pipeline.Data`.

        Raises:
          UserError: there is no text; or, after all predictions, a text is empty or has tokens that the vocabulary lacks.
        """
        if not arguments:
            raise UserError("the job predict needs texts: run.py --job=predict TEXT")
        reasons = []
        for prompt in arguments:
            ids, reason = answering.attempt(self._ids, prompt)
            if not reason:
                yield from self._lines(prompt, ids, run)
            elif len(arguments) > 1:
                yield reason
            reasons += [reason] if reason else []
        answering.check(reasons, len(arguments), "text")

    def _ids(self, prompt: str) -> np.ndarray:
        """Returns the last tokens of a text, int [l], or raises a UserError."""
        if not prompt.strip():
            raise UserError(f"{prompt!r} is an empty text: there is nothing to tell")
        ids = self.words.encode(self.words.split(prompt), shown(prompt, 200))
        return ids[-self.length :]

    def _lines(self, prompt: str, ids: np.ndarray, run: Callable) -> Iterator[str]:
        tokens = np.zeros((1, self.length), np.int32)
        tokens[0, : len(ids)] = ids
        logits = jnp.asarray(run({"tokens": tokens})[0, : len(ids)], jnp.float32)
        probabilities = np.asarray(jax.nn.softmax(logits))
        yield prompt
        if len(ids) > 1:
            losses = -np.log(probabilities[np.arange(len(ids) - 1), ids[1:]])
            yield f"  perplexity {np.exp(losses.mean()):.1f} of {len(losses)} {self.words.level}"
        best = np.argsort(-probabilities[-1], kind="stable")[:LIKELIEST]
        names = (f"{self.words.tokens[i]!r} {probabilities[-1, i]:.1%}" for i in best)
        yield "  next " + ", ".join(names)
