"""The interface `Data` of all datasets, and the input pipeline, which orders examples and prepares batches with Grain.

The training stream is endless, and the example at its position p is a pure function of (seed, p). Grain's index shuffle
decides which example of which epoch it is, and the counter-based generator Philox gives the random numbers of its
augmentation. So a run can resume at any batch, any number of processes can share a global batch, and the numbers of threads
and worker processes change only the speed.
"""

import multiprocessing
import os
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np

from squeeze_jax import registry
from squeeze_jax.data import source
from squeeze_jax.errors import UserError

TASKS = "squeeze_jax.data.tasks"
Batch = dict[str, np.ndarray]


def make(name: str = "images", **options) -> "Data":
    """Opens a dataset; the parameters are the keys of `config.data`.

    Args:
      name: the kind of examples: a file of `data/tasks`, without ".py", or the path of a Python file.
      **options: the parameters of that file's `make`.

    Raises:
      UserError: a key is unknown or missing, a value is out of range, or the file itself raises an error.
    """
    opened = check(name, **options).make(**options)
    for attribute in _ATTRIBUTES:
        if not hasattr(opened, attribute):
            raise UserError(
                f"config.data.name = {name!r} makes a {type(opened).__name__} without {attribute}: return what"
                " squeeze_jax.data.Data describes"
            )
    return opened


def check(name: str = "images", **options) -> types.ModuleType:
    """Checks the keys of `config.data` without opening the data, and returns the file of `data/tasks` that `name` names.

    Args:
      name, **options: see `make`.

    Raises:
      UserError: a key is unknown or missing, or a value has another type or is out of range.
    """
    module = registry.load(TASKS, name, "kind of data")
    registry.check(module.make, options, "config.data")
    if isinstance(options.get("source"), Mapping):
        source.check(options["source"])
    return module


class Data(Protocol):
    """A dataset with a training and an evaluation split; a file of `data/tasks` makes it.

    A batch is a dict of numpy arrays [b, ...]: the network inputs, the labels, "mask" bool [b] (False: padding or a skipped
    example, which has weight 0), and "index" int64 [b] (the example in the split; -1 for padding).

    Attributes:
      reads: the kind of network inputs, "images" or "tokens"; a model's file has the same word in INPUTS.
      noun: the word for one example, as in "MACs per image".
      describe: a phrase about the dataset, such as "1,437 train + 360 test images at 8x8x1, 10 classes".
      num_train, num_eval: the numbers of examples.
      label_names: the names of the classes; empty if there are none.
      model: options of `models.make` that follow from the data; a config may override them.
      objective: the default loss, as a section of a config: {"name": "losses.cross_entropy"}.
      fixed: whether a training example is the same each time it comes.
      metrics: the evaluation, a file of `train/metrics`.
      notes: lines of the plan about files left out and changes of the stored examples; may be missing.
      unreadable: the line of an error about examples that are known to be damaged, which ends a training run before it begins;
        "" for none; may be missing.
      validate: as `eval`, of the training examples that were held out; may be missing, and so may `num_validation`, their
        number.
      ranges: {name of an exported input: (least, greatest value)}, such as {"image": (0, 255)}; may be missing.
      exported: {name: shape without the batch axis} of the inputs of an exported file, with the names in a batch.
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
        """Returns the endless stream of training batches, see `training`."""

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Returns every evaluation example once, see `evaluation`."""

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes and dtypes of the batch arrays that go to the devices, for a batch of `rows` rows.

        There is one dict for each shape that batches may have, the largest last.
        """

    def augment(self, key: jax.Array, batch: dict) -> dict:
        """Returns a training batch with random changes; runs under jit."""

    def inputs(self, batch: Mapping[str, jax.Array]) -> Any:
        """Returns the network inputs of a batch; runs under jit. A batch with only the arrays in `exported` must be enough."""

    def example(self) -> Any:
        """Returns the shapes and dtypes of `inputs` for a batch of one example."""

    def predict(self, arguments: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the lines that the job predict prints: a network's predictions for the user's inputs.

        Args:
          arguments: words of the command line, such as file names or texts.
          run: calls the network: {name in `exported`: numpy array [b, ...]} → logits as numpy arrays.

        Raises:
          UserError: there are no arguments, or an input cannot be read.
        """


# Batches that worker processes have prepared and nobody reads are in shared memory when the program ends. Python's tracker frees
# them, and warns about it.
_LEAKED = "ignore:resource_tracker"
# Every job except predict uses these methods; a file of the user's own may leave `predict` out.
_METHODS = ("train", "eval", "specs", "augment", "inputs", "example")
_ATTRIBUTES = (*Data.__annotations__, *_METHODS)


class Reader(Protocol):
    """A split whose examples are read by index; its methods are pure and may run in any thread or process.

    `ImageReader` and `documents.Examples` are such readers. `text.SequenceReader` makes its batches itself.

    Attributes:
      draws: the number of random numbers that the transforms of one example use, a multiple of 4.
    """

    draws: int

    def __len__(self) -> int: ...

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Returns a batch of training examples with "mask".

        Args:
          indices: of the examples, int [b].
          draws: uniform numbers in [0, 1), [b, self.draws], that decide the random transforms.
        """

    def still(self, indices: np.ndarray) -> Batch:
        """Returns a batch of evaluation examples with "mask"; `indices` are int [b], at least one."""

    def empty(self, rows: int) -> Batch:
        """Returns a batch of `rows` rows of padding, with "mask" False."""


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

    Batches cross the ends of epochs, so each batch is full. An epoch holds each of the `len(reader)` examples once.

    Args:
      reader: reads the split.
      batch: the size of the global batch, over all processes.
      seed: 0 to 2**32 - 1; decides the order and the augmentation.
      start: the number of examples of the global stream that have been consumed; a multiple of `batch`.
      process: (index, count); yields rows [index * batch / count, (index + 1) * batch / count) of each global batch.
      workers, threads: the number of processes that prepare batches, and of threads in each; with 0 workers the threads of
        this process prepare them.

    Returns:
      An iterator; its `close()` stops threads and worker processes at once instead of at garbage collection.

    Raises:
      UserError: the processes cannot share the batch evenly, `start` lies within a batch, or the seed is out of range.
    """
    index, count = process
    rows = share(batch, count)
    check_start(batch, seed, start)
    order = grain.MapDataset.range(len(reader)).seed(seed).shuffle().repeat()
    # The stream is endless, so it has no remainder. Without `drop_remainder`, Grain would count beyond its largest integer.
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
    """Returns the split once, in order; rows of padding fill up the last batches.

    Args:
      reader, batch, process, workers, threads: as for `training`; each process gets the same number of batches.

    Raises:
      UserError: the processes cannot share the batch evenly; or, while iterating, an example cannot be read.
    """
    index, count = process
    rows = share(batch, count)
    chunks = grain.MapDataset.range(-(-len(reader) // batch) * count)
    return iterate(chunks.map(_Eval(reader, rows))[index::count], workers, threads)


def iterate(chunks: grain.MapDataset, workers: int, threads: int) -> "Batches":
    """Returns an iterator over a Grain dataset of batches, in its order; threads or worker processes prepare them ahead.

    Args:
      chunks: the batches.
      workers, threads: see `training`.
    """
    options = grain.ReadOptions(threads, 2 * threads)
    batches = chunks.to_iter_dataset(options)
    if workers:
        _mark_flags_present()
        if _LEAKED not in sys.warnoptions:
            sys.warnoptions.append(_LEAKED)
        options = grain.MultiprocessingOptions(workers, 2)
        batches = batches.mp_prefetch(options, worker_init_fn=_set_up_worker)
    return Batches(batches, copy=workers > 0)


class Batches:
    """An iterator over batches, with the threads and worker processes that prepare them.

    `close()` stops these; otherwise they stop when the last reference is gone, or when the program exits.

    Args:
      batches: the dataset of batches.
      copy: whether to copy batches out of the shared memory of worker processes.
    """

    def __init__(self, batches: grain.IterDataset, copy: bool):
        self._copy = copy
        self._running = [iter(batches)]
        # Grain's own clean-up prints errors if it runs while the interpreter shuts down.
        self.close = weakref.finalize(self, _close, self._running)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise StopIteration
        batch = next(self._running[0])
        # The copy is not in shared memory, which would leak if a batch were alive at the program's exit.
        if self._copy:
            batch = {key: np.array(value) for key, value in batch.items()}
        return batch


def _close(running: list) -> None:
    while running:
        running.pop().close()


def share(batch: int, count: int) -> int:
    """Returns how many rows of a global batch each of `count` processes gets.

    Raises:
      UserError: the batch is not positive, or `count` does not divide it.
    """
    if batch <= 0 or batch % count:
        raise UserError(f"batch = {batch} is not divisible by {count} processes")
    return batch // count


def check_start(batch: int, seed: int, start: int) -> None:
    """Raises a UserError if `start` lies within a batch, or if the seed is out of range."""
    if start % batch:
        raise UserError(
            f"cannot resume after {start} examples with batch {batch}: {start} is not a multiple of it"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed} should be 0 to 2**32 - 1")


class _Train(NamedTuple):
    """Reads the `rows` consecutive training examples that start at position `chunk * rows` of the stream."""

    reader: Reader
    seed: int
    rows: int

    def __call__(self, chunk: int, indices: np.ndarray) -> Batch:
        width = self.reader.draws
        numbers = draws(self.seed, chunk * self.rows, self.rows, width)
        return self.reader.random(indices, numbers) | {"index": indices}


class _Eval(NamedTuple):
    """Reads `rows` consecutive evaluation examples from index `chunk * rows` on, with padding after the last example."""

    reader: Reader
    rows: int

    def __call__(self, chunk: int) -> Batch:
        index = np.arange(chunk * self.rows, (chunk + 1) * self.rows)
        index[index >= len(self.reader)] = -1
        occupied = np.flatnonzero(index >= 0)
        batch = self.reader.empty(self.rows)
        if len(occupied):
            for key, values in self.reader.still(index[occupied]).items():
                batch[key][occupied] = values
        return batch | {"index": index}


def draws(seed: int, start: int, count: int, width: int) -> np.ndarray:
    """Returns uniform random numbers in [0, 1) for positions of the stream, float64 [count, width].

    Philox turns a counter into four random words under a key. Each position has its own range of the counter, so its numbers
    do not depend on which positions are computed together.

    Args:
      seed: the key.
      start: the first position.
      count: the number of positions.
      width: the number of random numbers per position, a multiple of 4.
    """
    words = np.random.Philox(key=seed, counter=start * (width // 4))
    bits = words.random_raw(count * width).reshape(count, width)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mark_flags_present() -> None:
    """Lets Grain start worker processes in a program that parses no absl flags, such as a notebook.

    Grain 0.2.18 reads a flag of its own and fails if flags are not parsed (google/grain issue 1355). A flag that is marked as
    present can be read.
    """
    flags, name = (
        sys.modules["absl.flags"].FLAGS,
        "grain_enable_multiprocess_worker_profiling",
    )
    if name in flags and not flags.is_parsed():
        flags[name].present = 1


def _set_up_worker(worker: int, count: int) -> None:
    """Sets up a worker process: it ignores signals, which the main process handles, and exits if the main process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
