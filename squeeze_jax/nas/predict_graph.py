"""The neural predictor: a graph convolutional network that predicts the accuracy of an architecture from its graph.

Wen, Liu, Li, Chen, Bender, Kindermans 2020, arXiv 1912.00848. Each of three layers averages a convolution along the edges and
one against them, V' = (ReLU(A V W) + ReLU(B V U)) / 2, where A and B are the adjacency matrix and its transpose with self
loops, each row divided by its sum. The mean over the nodes goes through a fully connected layer. The result does not depend on
the order of the nodes. The authors published no code. What differs from the paper: scores are standardized and the output is
linear, where the paper bounds it by a sigmoid function; and the defaults are fixed (500 steps of 32 graphs at the learning rate
1e-3), where the paper trains for 300 epochs of batches of 10 at 1e-4, and chooses the hyperparameters by cross-validation.
`predict_two_stage` has the paper's two stages.

`fit` and `predict` are pure functions of arrays: `jax.jit` and `jax.vmap` apply to them.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from squeeze_jax.errors import UserError
from squeeze_jax.nas import ensemble
from squeeze_jax.ranges import Count, Layers, NonNegative, Positive, Rate
from squeeze_jax.registry import checked

CHUNK = 1024  # graphs that are predicted together, to limit memory


class Network(NamedTuple):
    """The weights of all members.

    Attributes:
      along, against: kernels of the layers along and against the edges, [members, inputs, width] each.
      hidden, hidden_bias: of the fully connected layer, [members, width, hidden] and [members, hidden].
      output, output_bias: [members, hidden] and [members].
    """

    along: tuple[jax.Array, ...]
    against: tuple[jax.Array, ...]
    hidden: jax.Array
    hidden_bias: jax.Array
    output: jax.Array
    output_bias: jax.Array


class Predictor(NamedTuple):
    """A trained predictor.

    Attributes:
      network: the weights.
      mean, scale: mean and standard deviation of the scores of training.
    """

    network: Network
    mean: jax.Array
    scale: jax.Array


class _Sizes(NamedTuple):
    """The options that need a compilation of their own."""

    members: int
    width: int
    depth: int
    hidden: int
    steps: int
    batch: int
    loss: str


@checked
def fit(
    key: Any,
    adjacency: Any,
    nodes: Any,
    scores: Any,
    *,
    weights: Any = None,
    loss: Literal["squared", "logistic"] = "squared",
    members: Count = 1,
    width: Count = 144,
    depth: Layers = 3,
    hidden: Count = 128,
    dropout: Rate = 0.1,
    steps: Count = 500,
    batch: Count = 32,
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 1e-3,
) -> Predictor:
    """Returns a predictor.

    Args:
      key: random key; the same key gives the same predictor.
      adjacency: [n, v, v]; [i, j] is 1 where an edge leads from node i to node j, without self loops.
      nodes: [n, v, k], such as one-hot operations; a row of zeros is no node, for graphs with fewer than v nodes.
      scores: [n], in any unit.
      weights: [n] of the examples in the loss; None for 1. Those of weight 0 have no influence.
      loss: "squared", or "logistic" for scores of 0 and 1, of which `predict` returns the logits.
      members: number of networks whose predictions are averaged.
      width: units of the graph convolutions.
      depth: number of graph convolutions.
      hidden: units of the fully connected layer.
      dropout: dropout rate after each layer.
      steps: training steps.
      batch: graphs in each step.
      lr: learning rate of Adam, which falls to zero with a cosine.
      weight_decay: L2 regularisation, which is added to the gradients.

    Raises:
      UserError: the shapes do not fit, there are fewer than two examples, or a score is not finite.
    """
    adjacency, nodes = _graphs(adjacency, nodes, "predict_graph.fit")
    count = len(nodes)
    scores = ensemble.check_scores(scores, count, "predict_graph.fit")
    if weights is None:
        weights = jnp.ones(count)
    elif np.shape(weights) != (count,):
        raise UserError(
            f"predict_graph.fit: weights have the shape {list(np.shape(weights))}, but there are {count} architectures"
        )
    sizes = _Sizes(members, width, depth, hidden, steps, batch, loss)
    return _fit(
        key, adjacency, nodes, scores, weights, dropout, lr, weight_decay, sizes
    )


def predict(predictor: Predictor, adjacency: Any, nodes: Any) -> jax.Array:
    """Returns the mean of the members' predictions, [n].

    Args:
      predictor: what `fit` returned.
      adjacency, nodes: as for `fit`; the number of nodes may differ.

    Raises:
      UserError: the shapes do not fit.
    """
    return jnp.mean(predict_members(predictor, adjacency, nodes), 0)


def predict_members(predictor: Predictor, adjacency: Any, nodes: Any) -> jax.Array:
    """Returns the prediction of each member, [members, n]; their standard deviation is large where they are unsure.

    Args:
      predictor: what `fit` returned.
      adjacency, nodes: as for `fit`; the number of nodes may differ.

    Raises:
      UserError: the shapes do not fit.
    """
    adjacency, nodes = _graphs(adjacency, nodes, "predict_graph.predict")
    wanted = predictor.network.along[0].shape[-2]
    if nodes.shape[2] != wanted:
        raise UserError(
            f"predict_graph.predict: nodes have the shape {list(nodes.shape)}, but the predictor was trained on [n, v, {wanted}]"
        )
    return _predict_members(predictor, adjacency, nodes)


def convolve(
    adjacency: jax.Array, nodes: jax.Array, along: jax.Array, against: jax.Array
) -> jax.Array:
    """Returns (ReLU(A V W) + ReLU(B V U)) / 2 of one graph, [v, width].

    A is the adjacency matrix with self loops, each row divided by its sum; B is the same of the transposed matrix.

    Args:
      adjacency: [v, v], without self loops.
      nodes: V, [v, inputs].
      along, against: W and U, [inputs, width].
    """
    loops = jnp.eye(len(nodes))

    def one_way(edges, kernel):
        edges = edges + loops
        edges = edges / jnp.sum(edges, -1, keepdims=True)
        return jax.nn.relu(edges @ (nodes @ kernel))

    return (one_way(adjacency, along) + one_way(adjacency.T, against)) / 2


def _graphs(adjacency: Any, nodes: Any, place: str) -> tuple[jax.Array, jax.Array]:
    shape, wanted = np.shape(adjacency), np.shape(nodes)
    if len(wanted) != 3:
        raise UserError(
            f"{place}: nodes have the shape {list(wanted)}: it should be [architectures, nodes, features]"
        )
    if shape != (*wanted[:2], wanted[1]):
        raise UserError(
            f"{place}: adjacency has the shape {list(shape)}, but nodes have {list(wanted)}: it should be"
            f" {[*wanted[:2], wanted[1]]}"
        )
    return jnp.asarray(adjacency, jnp.float32), jnp.asarray(nodes, jnp.float32)


@functools.partial(jax.jit, static_argnames="sizes")
def _fit(key, adjacency, nodes, scores, weights, dropout, lr, weight_decay, sizes):
    if sizes.loss == "squared":
        targets, mean, scale = ensemble.standardize(scores, weights)
    else:
        targets, mean, scale = scores, jnp.zeros(()), jnp.ones(())

    def loss(params, examples, key):
        adjacency, nodes, targets, weights = examples
        keys = jax.random.split(key, len(nodes))
        outputs = jax.vmap(_apply, (None, 0, 0, 0, None))(
            params, adjacency, nodes, keys, dropout
        )
        losses = (
            (outputs - targets) ** 2
            if sizes.loss == "squared"
            else optax.sigmoid_binary_cross_entropy(outputs, targets)
        )
        return jnp.mean(weights * losses)

    schedule = optax.cosine_decay_schedule(lr, sizes.steps)
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(schedule)
    )
    network = ensemble.train(
        key,
        functools.partial(_init, features=nodes.shape[2], sizes=sizes),
        loss,
        (adjacency, nodes, targets, weights / jnp.mean(weights)),
        optimizer,
        members=sizes.members,
        steps=sizes.steps,
        batch=sizes.batch,
    )
    return Predictor(network, mean, scale)


def _init(key, features: int, sizes: _Sizes) -> Network:
    draw = jax.nn.initializers.glorot_uniform()
    *keys, hidden_key, output_key = jax.random.split(key, 2 * sizes.depth + 2)
    shapes = [(features, sizes.width)]
    shapes += [(sizes.width, sizes.width)] * (sizes.depth - 1)
    pairs = list(zip(keys, 2 * shapes, strict=True))
    kernels = [draw(k, shape) for k, shape in pairs]
    return Network(
        tuple(kernels[: sizes.depth]),
        tuple(kernels[sizes.depth :]),
        draw(hidden_key, (sizes.width, sizes.hidden)),
        jnp.zeros(sizes.hidden),
        draw(output_key, (sizes.hidden, 1))[:, 0],
        jnp.zeros(()),
    )


def _apply(network: Network, adjacency, nodes, key=None, dropout=0.0):
    """Returns the output of one graph, []; without a key there is no dropout."""
    count = len(network.along) + 1
    keys = [None] * count if key is None else jax.random.split(key, count)
    present = jnp.any(nodes != 0, -1).astype(jnp.float32)
    adjacency = adjacency * present[:, None] * present
    x = nodes
    for along, against, k in zip(network.along, network.against, keys, strict=False):
        x = _drop(k, convolve(adjacency, x, along, against), dropout)
    x = present @ x / jnp.maximum(jnp.sum(present), 1)
    x = jax.nn.relu(x @ network.hidden + network.hidden_bias)
    return _drop(keys[-1], x, dropout) @ network.output + network.output_bias


def _drop(key, x, rate):
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


@jax.jit
def _predict_members(predictor, adjacency, nodes):
    def members(graph):
        outputs = jax.vmap(_apply, (0, None, None))(predictor.network, *graph)
        return predictor.mean + predictor.scale * outputs

    return jax.lax.map(members, (adjacency, nodes), batch_size=CHUNK).T
