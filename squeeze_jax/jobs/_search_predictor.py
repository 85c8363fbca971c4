"""Fits the predictor of scores that `config.search.predictor` names, and checks it on networks that were held out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax.cost import latency_table
from squeeze_jax.errors import UserError
from squeeze_jax.jobs._search_problem import Problem
from squeeze_jax.nas import encode, predict_graph, predict_mlp, predict_two_stage
from squeeze_jax.nas.space import Arch

FEW = 10  # networks whose rank correlation says little
CHUNK = 4096  # networks that are encoded together, to limit memory


class Method(NamedTuple):
    """A kind of predictor.

    Attributes:
      encode: (space, columns of its pieces) → a function from an architecture to the inputs, an array or a tuple of arrays.
      fit: (key, *inputs with a leading axis, scores, ...) → a predictor.
      predict: (predictor, *inputs with a leading axis) → scores [n].
    """

    encode: Callable[..., Callable[[Arch], Any]]
    fit: Callable[..., Any]
    predict: Callable[..., jax.Array]


METHODS = {
    "mlp": Method(encode.one_hot, predict_mlp.fit, predict_mlp.predict),
    "graph": Method(encode.chain_of_pieces, predict_graph.fit, predict_graph.predict),
    "two_stage": Method(
        encode.chain_of_pieces, predict_two_stage.fit, predict_two_stage.predict
    ),
}


def fit(
    problem: Problem,
    archs: Arch,
    scores: np.ndarray,
    key: jax.Array,
    name: str,
    rejected: float,
) -> tuple[Callable[[Arch], jax.Array], float]:
    """Returns (architectures with a leading axis → predicted scores [n], rank correlation on networks that were held out).

    A fifth of the scored networks is held out for the correlation; then all are used.

    Args:
      problem: the search.
      archs: the scored networks, with a leading axis.
      scores: their scores [n].
      key: random key.
      name: a name of `METHODS`.
      rejected: the share of the scored networks that the first stage of "two_stage" learns to reject.

    Raises:
      UserError: too many networks have the same score for two stages.
    """
    method = METHODS[name]
    inputs_of = jax.jit(jax.vmap(method.encode(problem.space, problem.pieces.columns)))
    inputs = jax.tree.leaves(inputs_of(archs))

    def fitted(chosen):
        own = scores[chosen]
        options = {}
        if name == "two_stage":
            options["threshold"] = threshold(own, rejected)
        return method.fit(key, *(x[chosen] for x in inputs), own, **options)

    order = np.random.default_rng(0).permutation(len(scores))
    held, kept = np.split(order, [len(scores) // 5])
    guessed = method.predict(fitted(kept), *(x[held] for x in inputs))
    rank = latency_table.rank_correlation(np.asarray(guessed), scores[held])
    whole = fitted(np.arange(len(scores)))
    few = ", too few to judge by" if len(held) < FEW else ""
    print(
        f"predictor  fitted to {len(scores)} networks; rank correlation {rank:.2f} on {len(held)} that were held out{few}",
        flush=True,
    )

    def predict(archs):
        parts = [
            method.predict(
                whole, *jax.tree.leaves(inputs_of(_rows(archs, start, start + CHUNK)))
            )
            for start in range(0, len(archs[0]), CHUNK)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return predict, rank


def threshold(scores: np.ndarray, rejected: float) -> float:
    """Returns the score below or at which the given share of networks lies; at least two lie above it, and one does not.

    Raises:
      UserError: too many networks have the same score.
    """
    values = np.unique(scores)
    allowed = [v for v in values if np.count_nonzero(scores > v) >= 2]
    if not allowed:
        raise UserError(
            "config.search.predictor = 'two_stage' needs networks with different scores: choose 'mlp', or another"
            " config.search.score, such as 'eval_loss'"
        )
    return float(min(max(allowed), max(min(allowed), np.quantile(scores, rejected))))


def _rows(archs: Arch, start: int, stop: int) -> Arch:
    return jax.tree.map(lambda a: a[start:stop], archs)
