"""Token sequences in memory, and padded batches of them.

All texts are tokenized before training starts. The training stream is endless. Without buckets, the example at position p
depends only on the seed, p and the number of examples; buckets reorder examples within windows of batches. The order of each
epoch comes from the counter-based generator Philox, whose key holds the seed and the epoch.

Each batch is padded to the smallest of a few widths that fits its longest sequence. If there are several widths ("buckets"),
the examples of each window of `WINDOW` batches are sorted by length, divided into batches anew, and the batches are put in
random order. Short sequences thus train in narrow batches, all processes get the same shape in each step, and every example
still comes once per epoch.
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

WINDOW = 50  # batches whose examples are sorted by length together
CHUNK = 4096  # texts tokenized at a time
PATIENCE = 3.0  # seconds before the first line about progress
# The arrays of a batch that a network reads.
INPUT_KEYS = ("tokens", "segments", "attended")


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences of different lengths, stored one after the other in one array; `pack` and `tokenize` build it.

    Attributes:
      tokens: int32 [total], the token ids of all sequences; total is the sum of their lengths.
      segments: int8 [total], the segment of each token, such as 0 for the first text of a pair and 1 for the second.
      begins: int64 [n + 1], the position in `tokens` where each of the n sequences begins, followed by the total.
      fields: further arrays with one row per sequence, any dtype and shape [n, ...], such as {"label": [n]} or
        {"start": [n], "end": [n]}.
    """

    tokens: np.ndarray
    segments: np.ndarray
    begins: np.ndarray
    fields: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.begins) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sequence, int64 [n]."""
        return np.diff(self.begins)

    def take(self, indices: np.ndarray) -> "Sequences":
        """Returns the sequences at `indices`, int [k], in that order; an index may repeat."""
        lengths = self.lengths[indices]
        begins = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.begins[indices] - begins[:-1], lengths)
        positions = np.arange(begins[-1]) + shift
        fields = {key: values[indices] for key, values in self.fields.items()}
        return Sequences(
            self.tokens[positions], self.segments[positions], begins, fields
        )


def pack(
    sequences: Iterable[tuple[np.ndarray, np.ndarray]], **fields: np.ndarray
) -> Sequences:
    """Stores sequences one after the other in one array.

    Args:
      sequences: pairs (token ids [l], segments [l]), such as `Tokenizer.single` and `Tokenizer.pair` return.
      **fields: further arrays [n, ...] with one row per sequence, such as label=[n].
    """
    ids, segments = [], []
    for sequence_ids, sequence_segments in sequences:
        ids.append(sequence_ids)
        segments.append(sequence_segments)
    lengths = [len(sequence_ids) for sequence_ids in ids]
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
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
    """Tokenizes texts, or pairs of texts, and adds special tokens; cuts sequences to `length` tokens.

    Prints progress on stderr if it takes long, and logs a warning that counts the texts that were cut.

    Args:
      tokenizer: splits the texts and knows the special tokens around them.
      firsts: n texts, or the first text of each of n pairs.
      seconds: the second text of each pair; None for single texts.
      length: the largest number of tokens of a sequence, special tokens included.
      **fields: further arrays [n, ...] with one row per text or pair, such as label=[n].

    Raises:
      UserError: `length` leaves no room for text next to the special tokens; `firsts` and `seconds` differ in length; or a
        text is not valid Unicode, such as half of a surrogate pair.
    """
    room = tokenizer.room(length, seconds is not None)
    if seconds is not None and len(seconds) != len(firsts):
        raise UserError(
            f"there are {len(firsts):,} first texts and {len(seconds):,} second ones: each pair needs one of both"
        )
    sequences, report, cut = [], Progress("texts", len(firsts)), 0
    for begin in range(0, len(firsts), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        ids = tokenizer.encode_many(firsts[chunk])
        if seconds is None:
            sequences += [tokenizer.single(a, length) for a in ids]
            cut += sum(len(a) > room for a in ids)
        else:
            second_ids = tokenizer.encode_many(seconds[chunk])
            pairs = list(zip(ids, second_ids, strict=True))
            sequences += [tokenizer.pair(a, b, length) for a, b in pairs]
            cut += sum(len(a) + len(b) > room for a, b in pairs)
        report(len(sequences))
    if cut:
        log.warning(
            "%s of %s texts have more than config.data.length = %d tokens and are cut off",
            f"{cut:,}",
            f"{len(firsts):,}",
            length,
        )
    return pack(sequences, **fields)


class Progress:
    """Prints on stderr how much has been tokenized, such as "tokenized 8,192 of 67,349 texts".

    An instance is called with the number tokenized so far. It prints nothing in the first `PATIENCE` seconds. After that it
    prints a new line every 10 seconds. On a terminal with a known total it rewrites one line every 0.2 seconds instead. If it
    has printed anything, it also prints a line at the end, when the total is reached.

    Args:
      noun: what is counted, in the plural, such as "texts".
      total: the number of them; None if it is not known.
    """

    def __init__(self, noun: str, total: int | None = None):
        self.noun, self.total = noun, total
        self.next = time.monotonic() + PATIENCE
        self.live = total is not None and sys.stderr.isatty()
        self.has_printed = False

    def __call__(self, done: int) -> None:
        """Prints a line if one is due; `done` is the number tokenized so far."""
        last = self.total is not None and done >= self.total
        if time.monotonic() >= self.next or (last and self.has_printed):
            end = "" if self.live and not last else "\n"
            of_total = "" if self.total is None else f" of {self.total:,}"
            line = f"tokenized {done:,}{of_total} {self.noun}"
            print(("\r" if self.live else "") + line, end=end, file=sys.stderr)
            sys.stderr.flush()
            self.has_printed = True
            self.next = time.monotonic() + (0.2 if self.live else 10)


@dataclasses.dataclass(frozen=True)
class SequenceReader:
    """A split of token sequences that are read in padded batches.

    A batch has "tokens" and "segments" int32 [b, l], "attended" bool [b, l] (False: padding), "mask" bool [b] (False: a row of
    padding only), "index" int64 [b] (the sequence in the split; -1 in a row of padding), and the sequences' fields [b, ...],
    which are zero in a row of padding. `len(reader)` is the number of sequences.

    Attributes:
      sequences: the split. A sequence that is longer than `length` raises a ValueError.
      length: the largest width l of a batch.
      buckets: smaller widths that batches may have, ascending; with () all batches are padded to `length`.
      pad: the id of the padding token.
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
        """All widths that batches may have, ascending: the buckets, then `length`."""
        return (*self.buckets, self.length)

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes and dtypes of batches of `rows` rows, one dict per width; see `batch_specs`."""
        return batch_specs(rows, self.widths, self.sequences.fields)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> "Stream":
        """Returns the endless stream of shuffled training batches.

        Args:
          batch: the size of the global batch, over all processes.
          seed: 0 to 2**32 - 1; decides the order.
          start: the number of examples of the global stream that have been consumed; a multiple of `batch`.
          process: (index, count); yields rows [index * batch / count, (index + 1) * batch / count) of each global batch.

        Raises:
          UserError: there are no examples, the processes cannot share the batch evenly, `start` lies within a batch, or the
            seed is out of range.
        """
        index, count = process
        rows = pipeline.share(batch, count)
        pipeline.check_start(batch, seed, start)
        order = _BatchOrder(self, batch, seed)

        def make(step):
            indices = order(step)
            width = self._width(indices)
            return self._batch(indices[index * rows : (index + 1) * rows], width)

        return Stream(make, start // batch, None)

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> "Stream":
        """Returns a stream of batches that together contain every sequence exactly once.

        The sequences come in the order of the split; if there are buckets, from the shortest to the longest, so that short
        ones come in narrow batches. The last batch is filled up with rows of padding, in which "mask" is False.

        Args:
          batch: the size of the global batch, over all processes.
          process: (index, count); yields rows [index * batch / count, (index + 1) * batch / count) of each global batch.

        Raises:
          UserError: the processes cannot share the batch evenly.
        """
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
        """Returns the smallest width that fits the sequences at `indices`."""
        longest = self.sequences.lengths[indices].max()
        return next(width for width in self.widths if width >= longest)

    def _batch(self, indices: np.ndarray, width: int) -> Batch:
        """Returns the sequences at `indices`, padded to `width`; index -1 makes a row of padding."""
        sequences, mask = self.sequences, indices >= 0
        if len(sequences) == 0:
            lengths = begins = np.zeros(len(indices), np.int64)
        else:
            lengths = np.where(mask, sequences.lengths[indices], 0)
            begins = sequences.begins[indices]  # index -1 gets the end; its length is 0
        column = np.arange(width)
        attended = column < lengths[:, None]
        positions = (begins[:, None] + column)[attended]
        tokens = np.full(attended.shape, self.pad, np.int32)
        segments = np.zeros(attended.shape, np.int32)
        tokens[attended] = sequences.tokens[positions]
        segments[attended] = sequences.segments[positions]
        batch = {
            "tokens": tokens,
            "segments": segments,
            "attended": attended,
            "mask": mask,
            "index": indices.astype(np.int64),
        }
        for key, values in sequences.fields.items():
            batch[key] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
            batch[key][mask] = values[indices[mask]]
        return batch


def batch_specs(
    rows: int, widths: Sequence[int], fields: Mapping[str, np.ndarray]
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes and dtypes of the batch arrays that go to the devices, one dict per width.

    These are all arrays of a `SequenceReader` batch except "index", which stays on the host.

    Args:
      rows: batch size b.
      widths: sequence lengths l that batches may have.
      fields: arrays [n, ...] such as {"label": [n]}; only their dtype and the shape of a row matter.
    """
    spec = jax.ShapeDtypeStruct
    row_specs = {k: spec((rows, *v.shape[1:]), v.dtype) for k, v in fields.items()}
    row_specs["mask"] = spec((rows,), np.bool_)
    dtypes = {"tokens": np.int32, "segments": np.int32, "attended": np.bool_}
    return [
        {key: spec((rows, width), dtype) for key, dtype in dtypes.items()} | row_specs
        for width in widths
    ]


def exported_inputs(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of an exported file's inputs: "tokens", "segments" and "attended", each int32 [length].

    The shapes have no batch axis, as `exported` of `pipeline.Data` demands. "attended" is an integer here: 0 for padding.
    """
    return dict.fromkeys(INPUT_KEYS, jax.ShapeDtypeStruct((length,), np.int32))


def inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the network inputs in a batch: "tokens" and "segments" int32 [b, l], and "attended" bool [b, l].

    Args:
      batch: holds these three arrays and possibly others. "attended" may hold integers; nonzero becomes True.
    """
    return {
        "tokens": batch["tokens"],
        "segments": batch["segments"],
        "attended": batch["attended"] != 0,
    }


def example_inputs(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the network inputs for a batch of one sequence, [1, length] each; see `inputs`."""
    batch = dict.fromkeys(INPUT_KEYS, jax.ShapeDtypeStruct((1, length), np.int32))
    return jax.eval_shape(inputs, batch)


class _BatchOrder:
    """Decides which examples each global training batch holds."""

    def __init__(self, reader: SequenceReader, batch: int, seed: int):
        if not len(reader):
            raise UserError("there are no examples to train on")
        self.lengths = reader.sequences.lengths if reader.buckets else None
        self.total, self.batch, self.seed = len(reader), batch, seed
        self._epochs: dict[int, np.ndarray] = {}
        self._window = (-1, None)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the indices of the examples in batch number `step`, int64 [batch]."""
        begin, end = step * self.batch, (step + 1) * self.batch
        epoch = begin // self.total
        # A batch that crosses the end of an epoch is never rearranged; otherwise examples would change epochs.
        if self.lengths is None or end > (epoch + 1) * self.total:
            return self._examples(begin, end)
        first = -(-epoch * self.total // self.batch)
        window = first + (step - first) // WINDOW * WINDOW
        if self._window[0] != window:
            last = (epoch + 1) * self.total // self.batch
            batches = self._sorted_batches(window, min(window + WINDOW, last))
            self._window = window, batches
        return self._window[1][step - window]

    def _sorted_batches(self, first: int, last: int) -> np.ndarray:
        """Returns the examples of batches [first, last), int64 [last - first, batch]: sorted by length, batches in random order."""
        indices = self._examples(first * self.batch, last * self.batch)
        indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        order = _permutation(last - first, self.seed, first, 1)
        return indices.reshape(last - first, self.batch)[order]

    def _examples(self, begin: int, end: int) -> np.ndarray:
        """Returns the examples at positions [begin, end) of the shuffled stream."""
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.total)
            count = min(end - begin, self.total - offset)
            parts.append(self._epoch_order(epoch)[offset : offset + count])
            begin += count
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _permutation(self.total, self.seed, epoch, 0)
        return self._epochs[epoch]


def _permutation(count: int, seed: int, number: int, purpose: int) -> np.ndarray:
    """Returns a permutation of range(count) that depends on the arguments alone, in every version of numpy.

    Args:
      count: its length.
      seed: of the run.
      number: of the epoch (purpose 0) or of the first batch of a window (purpose 1).
      purpose: 0 or 1; keeps the two kinds of permutations independent.
    """
    words = np.random.Philox(key=[seed, 2 * number + purpose]).random_raw(count)
    return np.argsort(words, kind="stable")


class Stream:
    """An iterator that makes each batch when it is asked for, because that is faster than handing batches between threads.

    Args:
      make: returns the batch of a step.
      step: the first step.
      stop: the step after the last one; None for an endless stream.
    """

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
        """Ends the stream: no further batch comes."""
        self._make = None


def check_widths(length: int, buckets: Sequence[int]) -> None:
    """Raises a UserError unless the widths `buckets` are strictly ascending, positive and below `length`.

    Args:
      length: the config key `config.data.length`.
      buckets: the config key `config.data.buckets`.
    """
    buckets = tuple(buckets)
    if sorted(set(buckets)) != list(buckets) or not all(
        0 < width < length for width in buckets
    ):
        raise UserError(
            f"config.data.buckets = {buckets} should be ascending widths between 0 and config.data.length = {length}"
        )
