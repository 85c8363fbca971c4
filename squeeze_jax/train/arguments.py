"""Checks the arguments of a training step and converts short forms, such as an optax transform, to full forms."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from squeeze_jax import methods
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.train.forward import Network, as_network
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import State


class Term(NamedTuple):
    """One weighted loss of the objective.

    Attributes:
      name: key of the loss in records, and of its parameters in `params["methods"]`.
      weight: factor of the loss in the sum of all losses.
      objective: the method that computes the loss.
    """

    name: str
    weight: float
    objective: methods.Objective


def full_forms(network, update, objective) -> tuple[Network, methods.Update, tuple]:
    """Returns the network, the update and the terms of the objective in their full forms.

    Args:
      network: a `Network`, or a Linen module alone.
      update: a `methods.Update`, or an optax transform.
      objective: a sequence of `Term`s, or one loss, which becomes the term "objective" with weight 1.

    Raises:
      UserError: the network is no module, the update is no gradient transform, or the objective is no loss.
    """
    network = as_network(network)
    if callable(getattr(objective, "make", None)):
        raise UserError(
            f"the objective is the module {objective.__name__}: give the loss that its make() returns"
        )
    if callable(objective) or isinstance(objective, methods.Objective):
        objective = (Term("objective", 1.0, methods.objective(objective)),)
    if isinstance(update, optax.GradientTransformation):
        update = methods.Update(update)
    if not isinstance(update, methods.Update):
        raise UserError(
            f"the update is {shortened(repr(update), 60)}: give an optax transform, such as optax.adam(1e-3), or"
            " optim.make(name='adamw', …)"
        )
    if isinstance(objective, str) or not all(isinstance(t, Term) for t in objective):
        raise UserError(
            f"the objective is {shortened(repr(objective), 60)}: give a loss (logits, endpoints, batch) → (scalar, metrics),"
            " such as losses.cross_entropy.make(), or a list of Terms"
        )
    return network, update, tuple(objective)


def named_exchange(exchange: Named | Callable | None) -> Named | None:
    """Returns an exchange with its name; a plain function gets the name "exchange"."""
    if callable(exchange) and not isinstance(exchange, Named):
        return Named("exchange", methods.exchange(exchange))
    return exchange


def image(batch: Mapping[str, Any]) -> jax.Array:
    """Returns the images of a batch, which are the inputs of image networks.

    Raises:
      UserError: the batch has no entry "image".
    """
    if "image" not in batch:
        raise UserError(
            f"the batch has {', '.join(batch)} and no image: tell what the network reads by inputs, such as"
            " inputs=lambda batch: batch['x']"
        )
    return batch["image"]


def with_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the batch with a "mask", bool [b]; adds one that is true for all examples if the batch has none.

    Raises:
      UserError: the batch is no dict of arrays [b, ...], or its arrays have different numbers of examples.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"the batch is a {type(batch).__name__}: give a dict of arrays, such as {{'image': …, 'label': …}}"
        )
    lengths = {name: x.shape[0] for name, x in batch.items() if getattr(x, "shape", ())}
    if not lengths:
        raise UserError("the batch has no arrays [b, ...]")
    count = next(iter(lengths.values()))
    if "mask" not in batch:
        batch = {**batch, "mask": jnp.ones(count, bool)}
    for name, length in lengths.items():
        if length != count:
            raise UserError(
                f"the batch's arrays are not equally long: {name} has {length} examples, {next(iter(lengths))} has {count}"
            )
    return dict(batch)


def check_state(state: State, update: methods.Update, ema: float) -> None:
    """Raises a UserError unless a state fits the training step.

    Args:
      state: the training state.
      update: the gradient transforms of the step, whose optimizer state must have the shapes of `state.opt`.
      ema: decay of the averaged weights; a state has averaged weights if and only if it is not 0.
    """
    if bool(ema) != (state.ema is not None):
        has, wants = (
            ("has", "averages none") if not ema else ("has no", "averages them")
        )
        raise UserError(
            f"the state {has} averaged weights and the step {wants}: give ema to step.make alone and create the state by"
            " step.init"
        )
    expected = jax.eval_shape(update.tx.init, state.params)
    if jax.tree.structure(expected) != jax.tree.structure(state.opt) or any(
        a.shape != b.shape
        for a, b in zip(*map(jax.tree.leaves, (expected, state.opt)), strict=True)
    ):
        raise UserError(
            "the optimizer's state in the state is of another optimizer or of other weights: create the state by step.init"
        )
