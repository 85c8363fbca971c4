"""Measures the scores of the networks of a trained space.

Each network uses its part of the weights, and its own statistics of normalisation layers.

The pieces of the networks are compiled once for each of their choices, so thousands of networks need few compilations.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from squeeze_jax import tree
from squeeze_jax.in_order import in_order
from squeeze_jax.jobs import _space, fit
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nas import subnetwork
from squeeze_jax.nas.pieces import matrices_of, moved
from squeeze_jax.nas.recalibrate import recalibrate
from squeeze_jax.nas.space import Arch
from squeeze_jax.nn.chain import Chain, Piece
from squeeze_jax.nn.placement import placements
from squeeze_jax.nn.reshaped import reshaped
from squeeze_jax.train import forward, loop
from squeeze_jax.train.state import State


class Scorer:
    """Measures the score of networks on validation examples, such as their accuracy.

    Attributes:
      sign: 1 if larger scores are better, otherwise -1.
      step: of the checkpoint.
      fingerprint: a text that is the same for equal weights and examples.
    """

    def __init__(
        self,
        built: Built,
        trained: _space.Trained,
        state: State,
        calibration: int,
        examples: int,
        score: str = "",
    ):
        """Reads the examples into memory.

        Args:
          built: the experiment in the phase of the trained network.
          trained: the networks.
          state: the trained state.
          calibration: number of training examples for statistics, rounded up to whole batches.
          examples: largest number of validation examples, rounded up to whole batches.
          score: name of the score, such as "eval_loss"; "" for the one by which networks are compared.
        """
        metric = built.metric
        self._name = score or metric.headline
        self._scale = metric.scale if self._name == metric.headline else 1.0
        is_lower_better = self._name in (*metric.lower, "eval_loss")
        self.sign = -1.0 if is_lower_better else 1.0
        self._built, self._networks = built, trained.networks
        self.step = int(state.step)
        plain = state.plain()
        self._weights = {"params": plain["params"], "batch_stats": plain["batch_stats"]}
        self._transforms = trained.transforms(state.variables()["params"])
        self._named = bool(built.network.forwards or built.network.float32)
        forwards = FrozenDict(built.network.forwards)
        self._network = built.network._replace(model=None, forwards=forwards)
        self._held = placements(trained.networks.holder().pieces)
        self._inputs = in_order(jax.jit(built.data.inputs))
        self._measure = in_order(jax.jit(self._measure_batch))
        self._key = jax.random.key(built.experiment.seed)
        batch, augment = built.experiment.batch, jax.jit(built.data.augment)
        parts = -(-calibration // batch)
        keys = jax.random.split(self._key, parts)
        training = self._take(_training(built), parts)
        self._calibration = [
            self._inputs(augment(key, placed))
            for key, placed in zip(keys, training, strict=True)
        ]
        self._validation = self._take(validation(built), -(-examples // batch))
        self.fingerprint = _digest((self._weights, training, self._validation))

    @property
    def examples(self) -> tuple[int, int]:
        """Returns the numbers of examples for the statistics and for the score."""
        batch = self._built.experiment.batch
        measured = sum(int(b["mask"].sum()) for b in self._validation)
        return len(self._calibration) * batch, measured

    def __call__(self, arch: Arch) -> float:
        """Returns the score of an architecture's network, times `sign`, so that larger is better."""
        pieces = self._networks.network(arch).pieces
        stats = {}
        if self._weights["batch_stats"]:
            stats = recalibrate(
                lambda inputs: self._chain(pieces, inputs, {}, train=True)[1],
                self._calibration,
            )

        def step(stats, batch):
            logits, _ = self._chain(pieces, self._inputs(batch), stats, train=False)
            return self._measure(logits, batch)

        scores = loop.evaluate(
            step, stats, self._validation, lambda b: b, self._built.metric.score
        )
        return self.sign * scores[self._name] / self._scale

    @property
    def name(self) -> str:
        """Returns the name of the score for the user, such as "accuracy"."""
        return self._name.removeprefix("eval_").replace("_", " ")

    def _take(self, batches: Iterator[Any], count: int) -> list[Any]:
        """Returns at most `count` batches on the devices."""
        try:
            taken = itertools.islice(batches, count)
            return [fit.put_batch(batch, self._built) for batch in taken]
        finally:
            batches.close()

    def _chain(self, pieces, x, stats, train: bool):
        """Runs a network's pieces; returns (logits, the statistics of the batch)."""
        changed = {}
        for piece in pieces:
            scope = piece.scope
            name = scope if self._named else "piece"
            own = {k: moved(a, scope, name) for k, a in self._weights.items()}
            x, new = _run_piece(
                own,
                matrices_of(self._transforms, scope, name),
                moved(stats, scope, name),
                x,
                self._key,
                network=self._network,
                piece=Piece(name, piece.module),
                held=self._held.get(scope),
                train=train,
            )
            if new:
                changed = tree.with_value_at(changed, scope, tree.value_at(new, name))
        return x, changed

    def _measure_batch(self, logits, batch):
        sums, rows = self._built.metric.measure(logits, batch)
        return sums, rows | {k: batch[k] for k in ("mask", "index") if rows}


def _digest(arrays: Any) -> str:
    """Returns a text that is the same for equal arrays."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def validation(built: Built) -> Iterator[Any]:
    """Returns batches of the examples on which networks are compared: held-out training examples, or else training examples."""
    batch = built.experiment.batch
    if getattr(built.data, "num_validation", 0):
        return built.data.validate(batch, (0, 1))
    return _training(built)


def _training(built: Built) -> Iterator[Any]:
    """Returns the stream of training batches."""
    return built.data.train(built.experiment.batch, built.experiment.seed, 0, (0, 1))


@in_order
@functools.partial(jax.jit, static_argnames=("network", "piece", "held", "train"))
def _run_piece(
    large,
    transforms,
    stats,
    x,
    key,
    *,
    network: forward.Network,
    piece: Piece,
    held,
    train: bool,
):
    """Runs a piece by what `network` has beside a model; returns (output, statistics of the batch in training mode).

    Searches of one process share what it compiles.
    """
    chain = Chain((piece,))
    shapes = jax.eval_shape(chain.init, jax.random.key(0), x)
    both = {piece.name: held} if held else {}, placements((piece,))
    small = subnetwork.take(large, shapes, transforms, both)
    small = {"params": {}} | small | ({} if train else {"batch_stats": stats})
    # With the momentum 0 the new statistics are the batch's own.
    network = network._replace(model=reshaped(chain, {}, (), 0.0))
    (y, _), after = forward.run(network, small, x, train=train, key=key)
    return y, after["batch_stats"] if train else {}
