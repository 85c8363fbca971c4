"""Sequences of tokens in memory, and batches of them: each padded to the shortest of a few widths that fits.

Everything is tokenized ahead. The training stream is endless and what stands at its position p is a pure function of (seed,
p): an epoch's order comes of a counter-based generator (Philox) under (seed, epoch). Where there are several widths ("buckets"),
the batches of a window of the stream share its examples out anew, sorted by length, and come in random order: short sequences
are trained in short batches, all processes see one shape in a step, and still each example comes once an epoch.
"""

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from squeeze_jax.data import pipeline
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.tokens import Tokenizer
from squeeze_jax.errors import UserError

log = logging.getLogger(__name__)

WINDOW = 50  # batches
CHUNK = 4096  # texts tokenized at a time
PATIENCE = 3.0  # seconds without a word
READ = ("tokens", "segments", "attended")  # what of a batch a network reads


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences of different lengths, after each other in one array; `pack` and `tokenize` build it.

    Attributes:
      tokens: int32 [sum of lengths].
      segments: int8, the same.
      begins: int64 [n + 1], where each sequence begins, and the end.
      fields: what else an example has: {"label": [n]}, {"start": [n], "end": [n]}; any dtype and shape [n, ...].
    """

    tokens: np.ndarray
    segments: np.ndarray
    begins: np.ndarray
    fields: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.begins) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]"""
        return np.diff(self.begins)

    def take(self, indices: np.ndarray) -> "Sequences":
        """The sequences of some indices, in their order."""
        lengths = self.lengths[indices]
        begins = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.begins[indices] - begins[:-1], lengths)
        where = np.arange(begins[-1]) + shift
        fields = {key: values[indices] for key, values in self.fields.items()}
        return Sequences(self.tokens[where], self.segments[where], begins, fields)


def pack(
    sequences: Iterable[tuple[np.ndarray, np.ndarray]], **fields: np.ndarray
) -> Sequences:
    """Sequences of (ids, segments), such as `Tokenizer.pair` makes, and fields [n, ...]."""
    ids, segments = [], []
    for a, b in sequences:
        ids.append(a)
        segments.append(b)
    begins = np.concatenate([[0], np.cumsum([len(a) for a in ids])]).astype(np.int64)
    join = np.concatenate if ids else np.array
    return Sequences(
        join(ids).astype(np.int32), join(segments).astype(np.int8), begins, fields
    )


def tokenize(
    tokenizer: Tokenizer,
    firsts: Sequence[str],
    seconds: Sequence[str] | None,
    length: int,
    **fields: np.ndarray,
) -> Sequences:
    """Returns sequences of texts, or of pairs of texts, with special tokens, cut to `length` tokens.

    Tells on stderr how far it is, and how many texts are cut.
    """
    room = tokenizer.room(length, seconds is not None)
    done, tell, cut = [], Told("texts", len(firsts)), 0
    for begin in range(0, len(firsts), CHUNK):
        some = slice(begin, begin + CHUNK)
        ids = tokenizer.encode_many(firsts[some])
        if seconds is None:
            done += [tokenizer.single(a, length) for a in ids]
            cut += sum(len(a) > room for a in ids)
        else:
            others = tokenizer.encode_many(seconds[some])
            pairs = list(zip(ids, others, strict=True))
            done += [tokenizer.pair(a, b, length) for a, b in pairs]
            cut += sum(len(a) + len(b) > room for a, b in pairs)
        tell(len(done))
    if cut:
        log.warning(
            "%s of %s texts have more than config.data.length = %d tokens and are cut off",
            f"{cut:,}",
            f"{len(firsts):,}",
            length,
        )
    return pack(done, **fields)


class Told:
    """Says on stderr how much has been tokenized, once that has taken a while.

    Args:
      what: is counted: "texts".
      total: of them; None where it is not known.
    """

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total = what, total
        self.next = time.monotonic() + PATIENCE
        self.live = total is not None and sys.stderr.isatty()
        self.any = False

    def __call__(self, done: int) -> None:
        last = self.total is not None and done >= self.total
        if time.monotonic() >= self.next or (last and self.any):
            end = "" if self.live and not last else "\n"
            of = "" if self.total is None else f" of {self.total:,}"
            line = f"tokenized {done:,}{of} {self.what}"
            print(("\r" if self.live else "") + line, end=end, file=sys.stderr)
            sys.stderr.flush()
            self.any = True
            self.next = time.monotonic() + (0.2 if self.live else 10)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A split of sequences in batches: "tokens" and "segments" int32 [b, l], "attended" bool [b, l] (False: padding), "mask"
    bool [b], "index" int64 [b], and the sequences' fields [b, ...].

    Attributes:
      sequences: none is longer than `length`.
      length: the largest width.
      buckets: smaller widths, ascending; () pads everything to `length`.
      pad: the padding's token.
    """

    sequences: Sequences
    length: int
    buckets: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self):
        longest = max(self.sequences.lengths, default=0)
        if longest > self.length:
            raise ValueError(f"a sequence of {longest} tokens, not {self.length}")

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self.buckets, self.length)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Shapes of a batch of so many rows, one dict a width; without "index", which stays on the host."""
        return specs(rows, self.widths, self.sequences.fields)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> "Stream":
        """The endless stream of shuffled batches; arguments and errors as those of `pipeline.training`."""
        index, count = process
        rows = pipeline.share(batch, count)
        pipeline.check_start(batch, seed, start)
        order = _Order(self, batch, seed)

        def make(step):
            indices = order(step)
            width = self._width(indices)
            return self._batch(indices[index * rows : (index + 1) * rows], width)

        return Stream(make, start // batch, None)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> "Stream":
        """Every sequence once, in order or, where there are buckets, sorted by length; the last batch is filled up with
        masked rows. Arguments and errors as those of `pipeline.evaluation`."""
        index, count = process
        rows = pipeline.share(batch, count)
        steps = -(-len(self) // batch)
        order = np.full(steps * batch, -1)
        order[: len(self)] = np.arange(len(self))
        if self.buckets:
            order[: len(self)] = np.argsort(self.sequences.lengths, kind="stable")

        def make(step):
            indices = order[step * batch : (step + 1) * batch]
            width = self._width(indices[indices >= 0])
            return self._batch(indices[index * rows : (index + 1) * rows], width)

        return Stream(make, 0, steps)

    def _width(self, indices: np.ndarray) -> int:
        longest = self.sequences.lengths[indices].max()
        return next(width for width in self.widths if width >= longest)

    def _batch(self, indices: np.ndarray, width: int) -> Batch:
        """Rows of some indices, -1 for padding."""
        found, mask = self.sequences, indices >= 0
        if len(found) == 0:
            lengths = begins = np.zeros(len(indices), np.int64)
        else:
            lengths = np.where(mask, found.lengths[indices], 0)
            begins = found.begins[indices]  # of -1: the end, of which nothing is taken
        column = np.arange(width)
        attended = column < lengths[:, None]
        where = (begins[:, None] + column)[attended]
        tokens = np.full(attended.shape, self.pad, np.int32)
        segments = np.zeros(attended.shape, np.int32)
        tokens[attended] = found.tokens[where]
        segments[attended] = found.segments[where]
        batch = {
            "tokens": tokens,
            "segments": segments,
            "attended": attended,
            "mask": mask,
            "index": indices.astype(np.int64),
        }
        for key, values in found.fields.items():
            batch[key] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
            batch[key][mask] = values[indices[mask]]
        return batch


def specs(
    rows: int, widths: Sequence[int], fields: Mapping[str, np.ndarray]
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """See `Reader.specs`; of fields only dtype and shape [n, ...] count."""
    spec = jax.ShapeDtypeStruct
    same = {k: spec((rows, *v.shape[1:]), v.dtype) for k, v in fields.items()}
    same["mask"] = spec((rows,), np.bool_)
    kinds = {"tokens": np.int32, "segments": np.int32, "attended": np.bool_}
    return [
        {key: spec((rows, width), kind) for key, kind in kinds.items()} | same
        for width in widths
    ]


def exported(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What an exported file takes, see `pipeline.Data`."""
    return dict.fromkeys(READ, jax.ShapeDtypeStruct((length,), np.int32))


def inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What encoders are called with, {"tokens", "segments": int32 [b, l], "attended": bool [b, l]}."""
    return {
        "tokens": batch["tokens"],
        "segments": batch["segments"],
        "attended": batch["attended"] != 0,
    }


def example(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `inputs` makes of one sequence."""
    one = dict.fromkeys(READ, jax.ShapeDtypeStruct((1, length), np.int32))
    return jax.eval_shape(inputs, one)


class _Order:
    """Which examples are in which global batch."""

    def __init__(self, reader: Reader, batch: int, seed: int):
        if not len(reader):
            raise UserError("there are no examples to train on")
        self.lengths = reader.sequences.lengths if reader.buckets else None
        self.total, self.batch, self.seed = len(reader), batch, seed
        self._epochs: dict[int, np.ndarray] = {}
        self._window = (-1, None)

    def __call__(self, step: int) -> np.ndarray:
        """int64 [batch]"""
        begin, end = step * self.batch, (step + 1) * self.batch
        epoch = begin // self.total
        # A batch over an epoch's end stays what it is, or epochs would mix.
        if self.lengths is None or end > (epoch + 1) * self.total:
            return self._stream(begin, end)
        first = -(-epoch * self.total // self.batch)
        window = first + (step - first) // WINDOW * WINDOW
        if self._window[0] != window:
            last = (epoch + 1) * self.total // self.batch
            self._window = window, self._arranged(window, min(window + WINDOW, last))
        return self._window[1][step - window]

    def _arranged(self, first: int, last: int) -> np.ndarray:
        """The examples of a window of batches, sorted into batches, these in random order: [last - first, batch]."""
        indices = self._stream(first * self.batch, last * self.batch)
        indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        order = _shuffled(last - first, self.seed, first, 1)
        return indices.reshape(last - first, self.batch)[order]

    def _stream(self, begin: int, end: int) -> np.ndarray:
        """The examples at the stream's positions from begin to end."""
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.total)
            count = min(end - begin, self.total - offset)
            parts.append(self._epoch(epoch)[offset : offset + count])
            begin += count
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _shuffled(self.total, self.seed, epoch, 0)
        return self._epochs[epoch]


def _shuffled(count: int, seed: int, which: int, purpose: int) -> np.ndarray:
    """A permutation of `count` numbers, a function of the arguments in every version of numpy."""
    words = np.random.Philox(key=[seed, 2 * which + purpose]).random_raw(count)
    return np.argsort(words, kind="stable")


class Stream:
    """Iterator over batches, made when they are asked for: that takes less time than handing them between threads."""

    def __init__(self, make: Callable[[int], Batch], step: int, stop: int | None):
        self._make, self._step, self._stop = make, step, stop

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._make is None or self._step == self._stop:
            raise StopIteration
        batch = self._make(self._step)
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends it."""
        self._make = None


def check_widths(length: int, buckets: Sequence[int]) -> None:
    """Raises a UserError where `config.data.buckets` are no ascending widths below `config.data.length`."""
    buckets = tuple(buckets)
    if sorted(set(buckets)) != list(buckets) or not all(
        0 < width < length for width in buckets
    ):
        raise UserError(
            f"config.data.buckets = {buckets} should be ascending widths between 0 and config.data.length = {length}"
        )
