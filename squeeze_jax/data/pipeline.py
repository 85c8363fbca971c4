"""The input pipeline: which example comes when, and batches of decoded images, by Grain.

The training stream is endless, and what stands at its position p is a pure function of (seed, p): Grain's index shuffle says
which example of which epoch it is, and a counter-based generator (Philox) gives the random numbers of its augmentation. So a
run resumes at any batch, any number of processes share a global batch, and threads or worker processes change nothing but
the speed.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np

from squeeze_jax import registry
from squeeze_jax.data import mix, vision
from squeeze_jax.data.reader import Reader
from squeeze_jax.data.source import Source
from squeeze_jax.errors import UserError

SOURCES = "squeeze_jax.data.sources"
Batch = dict[str, np.ndarray]


def make(
    source: dict,
    size: int,
    *,
    channels: Literal[1, 3] | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    crop: Literal["none", "pad", "random_resized"] = "none",
    pad: int = 4,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = False,
    randaugment: int = 0,
    magnitude: float = 9.0,
    eval_resize: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    workers: int = 0,
    threads: int = 2,
    cache_mb: int = 512,
    corrupt: Literal["raise", "skip"] = "raise",
) -> "Data":
    """Opens a data set; the parameters are the keys of `config.data`.

    Args:
      source: `{"name": a file of data/sources, ...its keys}`, such as {"name": "tfds", "dataset": "cifar10", "data_dir": "..."}.
      size: images become size x size pixels.
      channels: 1 or 3; None keeps what the source has.
      mean, std: of the pixels in units of 0..1, one number or one a channel; `normalise` gives (x / 255 - mean) / std.
      crop: of training images. "none": as for evaluation; "pad": the evaluation image, padded by `pad` black pixels on each
        side and cropped back at random; "random_resized": a crop of a random `scale` share of the original's area and an aspect
        ratio of 3/4 to 4/3, resized.
      pad, scale: see crop.
      flip: mirror half of the training images left to right.
      randaugment: number of RandAugment operations for each training image, 0 to 20.
      magnitude: their strength, 0 to 30.
      eval_resize: evaluation images are resized to this short side, then cropped in the centre; 0: resized directly.
      mixup, cutmix: α of their Beta distributions, applied by `augment`; 0 is off.
      workers: worker processes that prepare batches; 0 leaves it to threads. Needed only where decoding is slower than the
        training step, as the threads of one process share Python's lock for a part of the work.
      threads: threads that prepare batches, in each process.
      cache_mb: a data set that takes less than this decoded is kept decoded in memory after its first epoch (not for
        "random_resized", not in worker processes); 0 never.
      corrupt: a training image that cannot be decoded is an error, or is skipped: a black image, mask False, and a warning. In
        evaluation it is always an error.

    Raises:
      UserError: an unknown or missing key, a value out of range, or what the source itself finds wrong.
    """
    opened = _open(source)
    view = vision.View(
        size=size,
        channels=channels or opened.channels,
        crop=crop,
        pad=pad,
        scale=tuple(scale),
        flip=flip,
        randaugment=randaugment,
        magnitude=magnitude,
        eval_resize=eval_resize,
    )
    for key, values in ("mean", mean), ("std", std):
        if len(values) not in (1, view.channels):
            raise UserError(
                f"config.data.{key} has {len(values)} numbers: it should have 1, or one for each of {view.channels} channels"
            )
    if min(std) <= 0:
        raise UserError(f"config.data.std = {std} should be positive")
    for key, value in dict(
        mixup=mixup, cutmix=cutmix, workers=workers, threads=threads, cache_mb=cache_mb
    ).items():
        if value < 0:
            raise UserError(f"config.data.{key} = {value} should not be negative")
    megabytes = (len(opened.train) + len(opened.eval)) * math.prod(view.shape) / 2**20
    reader = functools.partial(
        Reader,
        num_classes=len(opened.label_names),
        view=view,
        cached=workers == 0 and megabytes <= cache_mb,
    )
    return Data(
        label_names=opened.label_names,
        view=view,
        train_reader=reader(opened.train, skip=corrupt == "skip"),
        eval_reader=reader(opened.eval, skip=False),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        mixup=mixup,
        cutmix=cutmix,
        workers=workers,
        threads=threads,
    )


def _open(source: Mapping) -> Source:
    if not isinstance(source, Mapping) or "name" not in source:
        raise UserError(
            f"config.data.source = {source!r} lacks a name; choose from {', '.join(registry.names(SOURCES))}"
        )
    keys = dict(source)
    module = registry.load(SOURCES, keys.pop("name"), "data source")
    registry.check(module.make, keys, "config.data.source")
    return module.make(**keys)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set under one view of its images; `make` builds it.

    Batches are dicts of numpy arrays: "image" uint8 [b, h, w, c], "label" int32 [b], "mask" bool [b] (False: padding or a
    skipped image; weight 0), "index" int64 [b] (which example of the split; -1 for padding).
    """

    label_names: tuple[str, ...]
    view: vision.View
    train_reader: Reader
    eval_reader: Reader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixup: float
    cutmix: float
    workers: int
    threads: int

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        return self.view.shape

    @property
    def num_train(self) -> int:
        return len(self.train_reader)

    @property
    def num_eval(self) -> int:
        return len(self.eval_reader)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> "Batches":
        """Returns the endless stream of shuffled, augmented training batches.

        Batches go on over the ends of epochs, so that each is full; an epoch is `num_train` examples, each once.

        Args:
          batch: the global batch, over all processes.
          seed: 0 to 2**32 - 1; decides the order and the augmentation.
          start: how many examples of the global stream have been consumed; a multiple of `batch`.
          process: (index, count); yields rows [index * batch / count, (index + 1) * batch / count) of each global batch.

        Returns:
          An iterator; its `close()` stops threads and worker processes at once instead of at garbage collection.

        Raises:
          UserError: a batch that the processes cannot share, a `start` between batches, a seed out of range.
        """
        index, count = process
        rows = _rows(batch, count)
        if start % batch:
            raise UserError(
                f"cannot resume after {start} examples with batch {batch}: {start} is not a multiple of it"
            )
        if not 0 <= seed < 2**32:
            raise UserError(f"seed = {seed} should be 0 to 2**32 - 1")
        order = grain.MapDataset.range(self.num_train).seed(seed).shuffle().repeat()
        chunks = order.batch(rows, batch_fn=np.array)
        chunks = chunks.map_with_index(_Train(self.train_reader, seed, rows))
        return self._iterate(chunks[start // rows + index :: count])

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> "Batches":
        """Returns the evaluation split once, in order; the last batches are filled up with masked rows.

        Args:
          batch, process: as for `train`; each process gets the same number of batches.

        Raises:
          UserError: a batch that the processes cannot share; while iterating, an image that cannot be decoded.
        """
        index, count = process
        rows = _rows(batch, count)
        chunks = grain.MapDataset.range(-(-self.num_eval // batch) * count)
        chunks = chunks.map(_Eval(self.eval_reader, rows))
        return self._iterate(chunks[index::count])

    def normalise(self, images):
        """(x / 255 - mean) / std of [b, h, w, c] pixels 0..255 of any dtype; a jnp function, float32."""
        mean, std = (jnp.array(v, jnp.float32) for v in (self.mean, self.std))
        return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std

    def augment(self, key, batch):
        """mixup and CutMix under jit, see `mix.augment`; labels become float32 [b, num_classes]. Identity when both are off."""
        return mix.augment(
            key,
            batch,
            num_classes=self.num_classes,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )

    def decode(self, image: bytes | str | os.PathLike, name: str = "") -> np.ndarray:
        """Returns uint8 [h, w, c] of an encoded image, or of a file by its path, as evaluation sees it.

        Raises:
          UserError: no such file, or no image; calls it by its path, or bytes by `name`.
        """
        if not isinstance(image, bytes):
            name, path = str(image), Path(image)
            try:
                image = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror}") from None
        try:
            return vision.still(image, self.view)
        except vision.Undecodable as error:
            raise UserError(f"cannot decode image {name}: {error}") from None

    def _iterate(self, chunks: grain.MapDataset) -> "Batches":
        options = grain.ReadOptions(self.threads, 2 * self.threads)
        batches = chunks.to_iter_dataset(options)
        if self.workers:
            _spare_flags()
            options = grain.MultiprocessingOptions(self.workers, 2)
            batches = batches.mp_prefetch(options, worker_init_fn=_outlive_nobody)
        return Batches(batches, copy=self.workers > 0)


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


def _rows(batch: int, count: int) -> int:
    if batch <= 0 or batch % count:
        raise UserError(f"batch = {batch} is not divisible by {count} processes")
    return batch // count


class _Train(NamedTuple):
    """The chunk of `rows` consecutive examples that starts at position `chunk * rows` of the stream."""

    reader: Reader
    seed: int
    rows: int

    def __call__(self, chunk: int, indices: np.ndarray) -> Batch:
        numbers = draws(self.seed, chunk * self.rows, self.rows)
        images, labels, good = self.reader.random(indices, numbers)
        return {"image": images, "label": labels, "mask": good, "index": indices}


class _Eval(NamedTuple):
    """The same for the evaluation split, in its own order, padded at its end."""

    reader: Reader
    rows: int

    def __call__(self, chunk: int) -> Batch:
        index = np.arange(chunk * self.rows, (chunk + 1) * self.rows)
        index[index >= len(self.reader)] = -1
        there = np.flatnonzero(index >= 0)
        batch = {
            "image": np.zeros((self.rows, *self.reader.view.shape), np.uint8),
            "label": np.zeros(self.rows, np.int32),
            "mask": index >= 0,
            "index": index,
        }
        if len(there):
            images, labels, _ = self.reader.still(index[there])
            batch["image"][there], batch["label"][there] = images, labels
        return batch


def draws(seed: int, start: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `count` positions from `start`: float64 [count, vision.DRAWS].

    Philox turns a counter into four words under a key. Each position owns a range of the counter, so its numbers do not
    depend on which positions are asked for together.
    """
    words = np.random.Philox(key=seed, counter=start * (vision.DRAWS // 4))
    bits = words.random_raw(count * vision.DRAWS).reshape(count, vision.DRAWS)
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
