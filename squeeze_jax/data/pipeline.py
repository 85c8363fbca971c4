"""What data are, and the input pipeline: which example comes when, and batches, by Grain.

The training stream is endless, and what stands at its position p is a pure function of (seed, p): Grain's index shuffle says
which example of which epoch it is, and a counter-based generator (Philox) gives the random numbers of its augmentation. So a
run resumes at any batch, any number of processes share a global batch, and threads or worker processes change nothing but
the speed.
"""

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np

from squeeze_jax import registry
from squeeze_jax.errors import UserError

TASKS = "squeeze_jax.data.tasks"
Batch = dict[str, np.ndarray]


def make(name: str = "images", **options) -> "Data":
    """Opens data; the parameters are the keys of `config.data`.

    Args:
      name: a file of `data/tasks`: what kind of examples.
      **options: of its `make`.

    Raises:
      UserError: an unknown or missing key, a value out of range, or what the source itself finds wrong.
    """
    module = registry.load(TASKS, name, "kind of data")
    registry.check(module.make, options, "config.data")
    opened = module.make(**options)
    for attribute in _ATTRIBUTES:
        if not hasattr(opened, attribute):
            raise UserError(
                f"config.data.name = {name!r} makes a {type(opened).__name__} without {attribute}: return what"
                " squeeze_jax.data.Data describes"
            )
    return opened


class Data(Protocol):
    """Examples of one kind, to train and to evaluate on; a file of `data/tasks` makes it.

    A batch is a dict of numpy arrays [b, ...]: what a network reads, its label, "mask" bool [b] (False: padding or a
    skipped example; weight 0), "index" int64 [b] (which example of the split; -1 for padding).

    Attributes:
      reads: what its networks read, as the INPUTS of a model's file: "images" or "tokens".
      noun: of one example, as in "MACs per image".
      describe: what there is, in a phrase.
      num_train, num_eval: examples.
      label_names: of the classes; empty where there are none.
      model: options of `models.make` that the data decide, where a config leaves them open.
      objective: the loss that fits, as a section of a config: {"name": "losses.cross_entropy"}.
      fixed: whether a training example is the same each time it comes.
      metrics: the evaluation that fits, a file of `train/metrics`.
      notes: lines of the plan about files left out and changes of the stored examples; may be missing.
      ranges: {name of an exported input: (least, greatest value)}, such as {"image": (0, 255)}; may be missing.
      exported: {name: shape without the batch axis} of what an exported file takes, names as in a batch.
    """

    reads: str
    noun: str
    describe: str
    num_train: int
    num_eval: int
    label_names: tuple[str, ...]
    model: Mapping[str, Any]
    objective: Mapping[str, Any]
    fixed: bool
    metrics: str
    exported: Mapping[str, jax.ShapeDtypeStruct]

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """The endless stream of training batches, see `training`."""

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every evaluation example once, see `evaluation`."""

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The arrays of a batch of so many rows that go to the devices: one dict a shape they come in, the largest last."""

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Random changes of a training batch, under jit."""

    def inputs(self, batch: Mapping[str, jax.Array]) -> Any:
        """What a network is called with, under jit; of the batch it takes no more than `exported` names."""

    def example(self) -> Any:
        """Shapes of what `inputs` makes of one example."""

    def predict(self, given: Sequence[str], run: Callable) -> Iterator[str]:
        """Lines that tell what a network says of what the user gave.

        Args:
          given: words of the command line, such as names of files.
          run: {name of `exported`: [b, ...]} → logits, numpy.

        Raises:
          UserError: nothing given, or what cannot be read.
        """


# What every job but predict uses of data; a file of the user's own may leave `predict` out.
_METHODS = ("train", "eval", "specs", "augment", "inputs", "example")
_ATTRIBUTES = (*Data.__annotations__, *_METHODS)


class Reader(Protocol):
    """A split of examples by index; its methods are pure and may run in any thread or process.

    Attributes:
      draws: random numbers that the transforms of one example need.
    """

    draws: int

    def __len__(self) -> int: ...

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Training examples int [b] under the transforms that uniform numbers [b, draws] decide; with "mask"."""

    def still(self, indices: np.ndarray) -> Batch:
        """Evaluation examples int [b], at least one; with "mask"."""

    def empty(self, rows: int) -> Batch:
        """So many rows of padding, mask False."""


def training(
    reader: Reader,
    batch: int,
    seed: int,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
    *,
    workers: int = 0,
    threads: int = 2,
) -> "Batches":
    """Returns the endless stream of shuffled, augmented training batches.

    Batches go on over the ends of epochs, so that each is full; an epoch is `len(reader)` examples, each once.

    Args:
      reader: of the split.
      batch: the global batch, over all processes.
      seed: 0 to 2**32 - 1; decides the order and the augmentation.
      start: how many examples of the global stream have been consumed; a multiple of `batch`.
      process: (index, count); yields rows [index * batch / count, (index + 1) * batch / count) of each global batch.
      workers, threads: processes, and threads in each, that prepare batches; 0 workers for this process alone.

    Returns:
      An iterator; its `close()` stops threads and worker processes at once instead of at garbage collection.

    Raises:
      UserError: a batch that the processes cannot share, a `start` between batches, a seed out of range.
    """
    index, count = process
    rows = share(batch, count)
    check_start(batch, seed, start)
    order = grain.MapDataset.range(len(reader)).seed(seed).shuffle().repeat()
    # It is endless; asked for a remainder, Grain counts beyond its largest integer.
    chunks = order.batch(rows, drop_remainder=True, batch_fn=np.array)
    chunks = chunks.map_with_index(_Train(reader, seed, rows))
    return iterate(chunks[start // rows + index :: count], workers, threads)


def evaluation(
    reader: Reader,
    batch: int,
    process: tuple[int, int] = (0, 1),
    *,
    workers: int = 0,
    threads: int = 2,
) -> "Batches":
    """Returns the split once, in order; the last batches are filled up with masked rows.

    Args:
      reader, batch, process, workers, threads: as for `training`; each process gets the same number of batches.

    Raises:
      UserError: a batch that the processes cannot share; while iterating, an example that cannot be read.
    """
    index, count = process
    rows = share(batch, count)
    chunks = grain.MapDataset.range(-(-len(reader) // batch) * count)
    return iterate(chunks.map(_Eval(reader, rows))[index::count], workers, threads)


def iterate(chunks: grain.MapDataset, workers: int, threads: int) -> "Batches":
    """Batches in the order of a data set of them, prepared ahead."""
    options = grain.ReadOptions(threads, 2 * threads)
    batches = chunks.to_iter_dataset(options)
    if workers:
        _spare_flags()
        options = grain.MultiprocessingOptions(workers, 2)
        batches = batches.mp_prefetch(options, worker_init_fn=_outlive_nobody)
    return Batches(batches, copy=workers > 0)


class Batches:
    """Iterator over batches, and what runs behind it.

    `close()` stops the threads and worker processes; otherwise they stop with the last reference or at the program's exit.
    """

    def __init__(self, batches: grain.IterDataset, copy: bool):
        self._copy = copy
        self._running = [iter(batches)]
        # Grain's own clean-up fails noisily once the interpreter takes modules apart.
        self.close = weakref.finalize(self, _close, self._running)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise StopIteration
        batch = next(self._running[0])
        # Out of shared memory, which else leaks with a batch that is alive at exit.
        if self._copy:
            batch = {key: np.array(value) for key, value in batch.items()}
        return batch


def _close(running: list) -> None:
    while running:
        running.pop().close()


def share(batch: int, count: int) -> int:
    """Rows of a global batch that each of `count` processes gets, or a UserError."""
    if batch <= 0 or batch % count:
        raise UserError(f"batch = {batch} is not divisible by {count} processes")
    return batch // count


def check_start(batch: int, seed: int, start: int) -> None:
    """Raises a UserError for a start between batches, or a seed out of range."""
    if start % batch:
        raise UserError(
            f"cannot resume after {start} examples with batch {batch}: {start} is not a multiple of it"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed} should be 0 to 2**32 - 1")


class _Train(NamedTuple):
    """The chunk of `rows` consecutive examples that starts at position `chunk * rows` of the stream."""

    reader: Reader
    seed: int
    rows: int

    def __call__(self, chunk: int, indices: np.ndarray) -> Batch:
        width = self.reader.draws
        numbers = draws(self.seed, chunk * self.rows, self.rows, width)
        return self.reader.random(indices, numbers) | {"index": indices}


class _Eval(NamedTuple):
    """The same for the evaluation split, in its own order, padded at its end."""

    reader: Reader
    rows: int

    def __call__(self, chunk: int) -> Batch:
        index = np.arange(chunk * self.rows, (chunk + 1) * self.rows)
        index[index >= len(self.reader)] = -1
        there = np.flatnonzero(index >= 0)
        batch = self.reader.empty(self.rows)
        if len(there):
            for key, values in self.reader.still(index[there]).items():
                batch[key][there] = values
        return batch | {"index": index}


def draws(seed: int, start: int, count: int, width: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `count` positions from `start`: float64 [count, width], width a multiple of 4.

    Philox turns a counter into four words under a key. Each position owns a range of the counter, so its numbers do not
    depend on which positions are asked for together.
    """
    words = np.random.Philox(key=seed, counter=start * (width // 4))
    bits = words.random_raw(count * width).reshape(count, width)
    return (bits >> np.uint64(11)) * 2.0**-53


def _spare_flags() -> None:
    """Lets Grain start workers in a program that parses no absl flags, such as a notebook.

    Grain 0.2.18 reads a flag of its own there and fails (google/grain issue 1355); one marked as present is readable.
    """
    flags, name = (
        sys.modules["absl.flags"].FLAGS,
        "grain_enable_multiprocess_worker_profiling",
    )
    if name in flags and not flags.is_parsed():
        flags[name].present = 1


def _outlive_nobody(worker: int, count: int) -> None:
    """Sets up a worker process: signals are for the main process to handle, and if that dies, so do we."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
