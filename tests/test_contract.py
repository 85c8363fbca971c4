"""A method that breaks the contract of its plug point is named, with what it should return, while the step is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.train import step
from squeeze_jax.train.losses import cross_entropy
from squeeze_jax.train.split import Named


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="dense")(x), {}


BATCH = {"image": np.ones((4, 2), np.float32), "label": np.array([0, 1, 2, 0])}


def trace(update=None, objective=None, **plugs):
    made = step.make(
        Net(), update or optax.sgd(0.1), objective or cross_entropy.make(), **plugs
    )
    state = jax.eval_shape(lambda: made.init(jax.random.key(0), BATCH))
    return jax.eval_shape(made, state, BATCH, jax.random.key(1))


def updating(change):
    """An update that changes the updates of plain gradient descent."""

    def transform(updates, state, params=None, **others):
        return change(updates), state

    return optax.chain(
        optax.sgd(0.1),
        optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(), transform
        ),
    )


def gradients(compute, **fields):
    return Named("mine", methods.Gradients(compute, **fields))


def plain(passes, params, stats, batch, own):
    (_, (stats, metrics)), grads = jax.value_and_grad(passes.loss, has_aux=True)(
        params, stats, batch, own.key
    )
    return grads, stats, metrics


def with_metrics(names, **fields):
    def loss(logits, endpoints, batch, params, own):
        return jnp.mean(logits), dict.fromkeys(names, jnp.float32(1))

    return methods.Objective(loss, **fields)


def changed(change):
    return gradients(lambda *arguments: change(*plain(*arguments)))


@pytest.mark.parametrize(
    ("plugs", "message"),
    [
        (dict(objective=with_metrics(["loss"])), "returns a metric 'loss', which the training step records already"),
        (dict(objective=with_metrics(["grad_norm"])), "returns a metric 'grad_norm'"),
        (dict(objective=with_metrics([], state=lambda params: {"n": jnp.zeros(2)})), "declares state and does not return it"),
        (dict(update=methods.Update(optax.sgd(0.1), metrics=lambda p, s: {"loss": 0.0})), "config.update returns a metric 'loss'"),
        (dict(update=methods.Update(optax.sgd(0.1), metrics=lambda p, s: {"m": jnp.ones(2)})), "metrics that are no dict of scalars"),
        (dict(update=updating(lambda u: jax.tree.map(lambda x: x[None], u))), r"config.update leads to parameters in which dense/bias is float32 \[1, 3\], not float32 \[3\]"),
        (dict(update=methods.Update(optax.sgd(0.1), project=lambda p, s: {})), "config.update leads to parameters without dense/bias"),
        (dict(gradients=changed(lambda g, s, m: (g, s))), "the method mine returns a tuple of 2"),
        (dict(gradients=changed(lambda g, s, m: (g, s, {}))), "returns metrics without 'loss'"),
        (dict(gradients=changed(lambda g, s, m: ({}, s, m))), "the method mine returns gradients without dense/bias"),
        (dict(gradients=changed(lambda g, s, m: (jax.tree.map(lambda x: x.astype(jnp.bfloat16), g), s, m))), "dense/bias is bfloat16"),
        (dict(gradients=changed(lambda g, s, m: (g, s, m, {"n": 1}))), "returns state that it does not declare"),
        (dict(gradients=gradients(plain, state=lambda params: {"n": jnp.zeros(2)})), "the method mine declares state"),
        (dict(gradients=gradients(lambda *a: (*plain(*a), {"n": jnp.zeros(3)}), state=lambda params: {"n": jnp.zeros(2)})), r"the method mine returns state in which n is float32 \[3\]"),
    ],
)  # fmt: skip
def test_a_broken_contract_is_named(plugs, message):
    with pytest.raises(UserError, match=message):
        trace(**plugs)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            [jnp.ones(2)],
            "mine has own parameters of type list: init should return a dict",
        ),
        ({"a": (jnp.ones(2),)}, "mine/a has own parameters of type tuple"),
        ({1: jnp.ones(2)}, "mine has the own parameter 1: .* names as keys"),
    ],
)
def test_own_parameters_that_are_no_dict_are_named(own, words):
    with pytest.raises(UserError, match=words):
        trace(gradients=gradients(plain, init=lambda key, params: own))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dense": {"bias": np.ones(3)}}, "given has 'dense': it may have params and"),
        ({"params": {"dense": {"bias": np.ones(4)}}}, r"dense/bias: expected \(3,\), found \(4,\)"),
        ({"params": {"head": {"bias": np.ones(3)}}}, r"head/bias: found \(3,\), not expected"),
    ],
)  # fmt: skip
def test_given_values_that_no_network_has_are_named(given, words):
    made = step.make(Net(), optax.sgd(0.1), cross_entropy.make())
    with pytest.raises(UserError, match=words):
        made.init(jax.random.key(0), BATCH, given=given)


def test_methods_that_keep_it_pass():
    plugs = dict(
        update=methods.Update(optax.sgd(0.1), metrics=lambda p, s: {"mine": 1.0}),
        objective=with_metrics(["other"]),
        gradients=gradients(lambda *a: (*plain(*a), {"n": jnp.ones(2)}), state=lambda params: {"n": jnp.zeros(2)}),
    )  # fmt: skip
    _, metrics = trace(**plugs)
    assert {"mine", "other", "loss", "grad_norm"} <= metrics.keys()
