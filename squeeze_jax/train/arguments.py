"""What a training step is given: its arguments in their full forms, and checks of states and batches."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from squeeze_jax import methods
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.train.forward import Network
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import State


class Term(NamedTuple):
    """One loss of the objective.

    Attributes:
      name: in records and in `params["methods"]`.
      weight: its factor in the sum.
      objective: the method.
    """

    name: str
    weight: float
    objective: methods.Objective


def settled(network, update, objective) -> tuple[Network, methods.Update, tuple]:
    """Returns the network, the update and the terms of the loss in their full forms; see `step.parts`.

    Raises:
      UserError: an optimizer or an objective that is none.
    """
    if not isinstance(network, Network):
        network = Network(network)
    if callable(objective):
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


def exchange_of(exchange: Named | Callable | None) -> Named | None:
    """Returns an exchange with its name."""
    if callable(exchange) and not isinstance(exchange, Named):
        return Named("exchange", methods.exchange(exchange))
    return exchange


def image(batch: Mapping[str, Any]) -> jax.Array:
    """Returns what image networks read of a batch."""
    if "image" not in batch:
        raise UserError(
            f"the batch has {', '.join(batch)} and no image: tell what the network reads by inputs, such as"
            " inputs=lambda batch: batch['x']"
        )
    return batch["image"]


def with_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a batch with a mask, all true where it has none.

    Raises:
      UserError: no dict, or arrays that are not equally long.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"the batch is a {type(batch).__name__}: give a dict of arrays, such as {{'image': …, 'label': …}}"
        )
    lengths = {name: x.shape[0] for name, x in batch.items() if getattr(x, "shape", ())}
    if not lengths:
        raise UserError("the batch has no arrays [b, ...]")
    rows = next(iter(lengths.values()))
    if "mask" not in batch:
        batch = {**batch, "mask": jnp.ones(rows, bool)}
    for name, length in lengths.items():
        if length != rows:
            raise UserError(
                f"the batch's arrays are not equally long: {name} has {length} examples, {next(iter(lengths))} has {rows}"
            )
    return dict(batch)


def check_state(state: State, update: methods.Update, ema: float) -> None:
    """Checks that a state is one of this step's.

    Raises:
      UserError: it has averaged weights and the step averages none, or the reverse; it is of another optimizer.
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
