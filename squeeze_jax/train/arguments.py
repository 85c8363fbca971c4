"""Checks the arguments of a training step and converts short forms, such as an optax transform, to full forms."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from squeeze_jax import methods, registry
from squeeze_jax.distill._loss import BoundLoss, UnboundLoss, as_objective
from squeeze_jax.errors import UserError, shortened, shown
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
      objective: a sequence of `Term`s, or one loss, which becomes the term "objective" with weight 1. A bound loss of
        `distill` reads the teachers' outputs from batch["teacher"].

    Raises:
      UserError: the network is no module, the update is no gradient transform, or the objective is no loss.
    """
    network = as_network(network)
    if isinstance(objective, UnboundLoss):
        raise UserError(
            "the objective is a distillation loss without the shapes of both networks' outputs: give what its bind(student,"
            " teacher) returns"
        )
    if isinstance(objective, BoundLoss):
        objective = as_objective("distill", objective)
    if callable(getattr(objective, "make", None)):
        raise UserError(
            f"the objective is the module {objective.__name__}: give the loss that its make() returns"
        )
    if callable(objective) or isinstance(objective, methods.Objective):
        try:
            objective = methods.objective(objective)
        except UserError as error:
            problem = str(error).partition(";")[0]
            raise UserError(
                f"the {problem}: a loss takes (logits, endpoints, batch), or also params; a make() returns one when it is called"
            ) from None
        objective = (Term("objective", 1.0, objective),)
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


def named_exchange(
    exchange: Named | methods.Exchange | Callable | None,
) -> Named | None:
    """Returns an exchange with its name; one without, or a plain function, gets the name "exchange"."""
    if isinstance(exchange, methods.Exchange) or callable(exchange):
        return Named("exchange", methods.exchange(exchange))
    return exchange


def named_gradients(
    gradients: Named | methods.Gradients | None,
) -> Named | None:
    """Returns a method of the plug point gradients with its name; one without gets the name "gradients"."""
    if isinstance(gradients, methods.Gradients):
        return Named("gradients", gradients)
    return gradients


def check_plugs(parts: Callable, plugs: Mapping[str, Any]) -> None:
    """Raises a UserError for an unknown plug of a training step, or one of another type or out of its range.

    Args:
      parts: the function whose signature is the schema.
      plugs: its keyword arguments.
    """
    values = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in plugs.items()
    }
    supplied = ("network", "update", "objective")
    registry.check(parts, values, "step.make", given=supplied)


def check_key(key: Any) -> None:
    """Raises a UserError unless a value is a key of `jax.random`."""
    dtype = getattr(key, "dtype", None)
    is_raw = dtype == jnp.uint32 and key.ndim == 1
    if dtype is None or not (is_raw or jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise UserError(
            f"key = {shown(key)} is no random key: give one, such as jax.random.key(0)"
        )


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
    if not isinstance(state, State):
        raise UserError(
            f"the state is a {type(state).__name__}: create it by step.init; pretrained values go in by given="
        )
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
