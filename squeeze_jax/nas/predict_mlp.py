"""The accuracy predictor of once-for-all: a multilayer perceptron on the one-hot choices of an architecture.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791: three hidden layers of 400 units with ReLU, and an output without bias, to
which the mean of the training accuracies is added. The authors train with Adam, learning rate 1e-3 and weight decay 1e-4, on
accuracies in [0, 1]. Here the scores are standardized, so their unit does not matter, and several networks can be trained from
different initial weights: the spread of their predictions shows where they are unsure.

`fit` and `predict` are pure functions of arrays: `jax.jit` and `jax.vmap` apply to them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from squeeze_jax.errors import UserError
from squeeze_jax.nas import ensemble
from squeeze_jax.ranges import Count, Layers, NonNegative, Positive
from squeeze_jax.registry import checked

CHUNK = 4096  # architectures that are predicted together, to limit memory


class Dense(NamedTuple):
    """A layer of all members.

    Attributes:
      kernel: [members, inputs, outputs].
      bias: [members, outputs].
    """

    kernel: jax.Array
    bias: jax.Array


class Predictor(NamedTuple):
    """A trained predictor.

    Attributes:
      hidden: the hidden layers.
      output: kernel of the output, [members, width].
      mean, scale: mean and standard deviation of the scores of training.
    """

    hidden: tuple[Dense, ...]
    output: jax.Array
    mean: jax.Array
    scale: jax.Array


@checked
def fit(
    key: Any,
    features: Any,
    scores: Any,
    *,
    members: Count = 1,
    width: Count = 400,
    depth: Layers = 3,
    steps: Count = 500,
    batch: Count = 64,
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 1e-4,
) -> Predictor:
    """Returns a predictor that is trained to the least squared error.

    Args:
      key: random key; the same key gives the same predictor.
      features: [n, d], such as one-hot choices; `encode.one_hot` sets those without effect to zero.
      scores: [n], in any unit.
      members: number of networks whose predictions are averaged.
      width: units of each hidden layer.
      depth: number of hidden layers.
      steps: training steps.
      batch: examples in each step.
      lr: learning rate of Adam.
      weight_decay: L2 regularisation, which is added to the gradients.

    Raises:
      UserError: the shapes do not fit, there are fewer than two examples, or a score is not finite.
    """
    features = _matrix(features, "predict_mlp.fit")
    scores = ensemble.check_scores(scores, len(features), "predict_mlp.fit")
    return _fit(
        key, features, scores, lr, weight_decay, members, width, depth, steps, batch
    )


def predict(predictor: Predictor, features: Any) -> jax.Array:
    """Returns the mean of the members' predictions, [n].

    Args:
      predictor: what `fit` returned.
      features: [n, d].

    Raises:
      UserError: the shapes do not fit.
    """
    return jnp.mean(predict_members(predictor, features), 0)


def predict_members(predictor: Predictor, features: Any) -> jax.Array:
    """Returns the prediction of each member, [members, n]; their standard deviation is large where they are unsure.

    Args:
      predictor: what `fit` returned.
      features: [n, d].

    Raises:
      UserError: the shapes do not fit.
    """
    features = _matrix(features, "predict_mlp.predict")
    wanted = predictor.hidden[0].kernel.shape[-2]
    if features.shape[1] != wanted:
        raise UserError(
            f"predict_mlp.predict: features have the shape {list(features.shape)}, but the predictor was trained on [n, {wanted}]"
        )
    return _predict_members(predictor, features)


def _matrix(features: Any, place: str) -> jax.Array:
    if np.ndim(features) != 2:
        raise UserError(
            f"{place}: features have the shape {list(np.shape(features))}: it should be [architectures, features]"
        )
    return jnp.asarray(features, jnp.float32)


@functools.partial(jax.jit, static_argnums=range(5, 10))
def _fit(key, features, scores, lr, weight_decay, members, width, depth, steps, batch):
    targets, mean, scale = ensemble.standardize(scores, jnp.ones_like(scores))

    def init(key):
        *keys, output_key = jax.random.split(key, depth + 1)
        sizes = [features.shape[1]] + [width] * depth
        pairs = zip(keys, sizes, sizes[1:], strict=False)
        hidden = tuple(
            Dense(_uniform(k, inputs, (inputs, outputs)), jnp.zeros(outputs))
            for k, inputs, outputs in pairs
        )
        return hidden, _uniform(output_key, width, (width,))

    def loss(params, examples, key):
        inputs, targets = examples
        return jnp.mean((_apply(*params, inputs) - targets) ** 2)

    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(lr))
    hidden, output = ensemble.train(
        key,
        init,
        loss,
        (features, targets),
        optimizer,
        members=members,
        steps=steps,
        batch=batch,
    )
    return Predictor(hidden, output, mean, scale)


@jax.jit
def _predict_members(predictor, features):
    hidden, output, mean, scale = predictor

    def members(row):
        return mean + scale * jax.vmap(_apply, (0, 0, None))(hidden, output, row)

    return jax.lax.map(members, features, batch_size=CHUNK).T


def _apply(hidden, output, x):
    for layer in hidden:
        x = jax.nn.relu(x @ layer.kernel + layer.bias)
    return x @ output


def _uniform(key, inputs, shape):
    """Returns initial weights, uniform within 1 / sqrt(inputs) of zero."""
    bound = inputs**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
