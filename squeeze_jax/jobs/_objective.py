"""The objective: the losses that a config lists, added up, and the networks that some of them learn from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax import methods, registry
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Positive
from squeeze_jax.train import forward
from squeeze_jax.train.step import Term


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
      terms: the losses.
      wants: outputs of teachers that they read, by name.
    """

    terms: tuple[Term, ...]
    wants: tuple[str, ...] = ()


class Part(NamedTuple):
    """One loss: its name in records, its weight, and what its file makes."""

    name: str
    weight: float
    made: Any


def parts(
    sections,
    method: Callable[[Mapping, str, Sequence[str]], Any],
    taken: set[str] | None = None,
) -> tuple[Part, ...]:
    """The losses that `config.objective` names, one section or several.

    Args:
      sections: {"name": "package.file", "weight": 1.0, **arguments}, or a tuple of these.
      method: makes a section's method, without its weight.
      taken: names that other methods have.

    Raises:
      UserError: a section that is none, or no loss; a weight that is not positive.
    """
    listed = (sections,) if isinstance(sections, Mapping) else tuple(sections)
    if not listed:
        raise UserError("config.objective lists no loss: leave it out, or name one")
    taken, losses = set() if taken is None else taken, []
    for number, section in enumerate(listed):
        where = "config.objective" + (f"[{number}]" if len(listed) > 1 else "")
        section = dict(section) if isinstance(section, Mapping) else section
        weight = section.pop("weight", 1.0) if isinstance(section, dict) else 1.0
        if wrong := registry.fault(weight, Positive, f"{where}.weight"):
            raise UserError(wrong)
        made = method(section, where, ("weight",))
        if not hasattr(made, "bind"):
            made = methods.objective(made, f"{where}.name = {section['name']!r}")
        name = section["name"].removesuffix(".py").replace("/", ".").rpartition(".")[2]
        while name in taken:
            name += "_"
        taken.add(name)
        losses.append(Part(name, float(weight), made))
    return tuple(losses)


def needs_teacher(parts: Sequence[Part]) -> bool:
    """Whether a loss compares with teachers."""
    return any(hasattr(part.made, "bind") for part in parts)


def bind(parts: Sequence[Part], student, teachers: Sequence) -> Objective:
    """Binds the losses to networks whose outputs have these shapes.

    Args:
      parts: the losses.
      student: {"logits": shape, endpoint: shape}.
      teachers: the same of each teacher.

    Raises:
      UserError: a loss that compares what the networks do not have; a loss that needs teachers where there are none.
    """
    if needs_teacher(parts) and not teachers:
        name = next(p.name for p in parts if hasattr(p.made, "bind"))
        raise UserError(
            f"config.objective: {name} compares with a teacher: name one in config.distill.teachers, such as"
            ' ({"workdir": DIR},)'
        )
    if teachers and not needs_teacher(parts):
        raise UserError(
            "config.distill.teachers has no effect: no loss of config.objective compares with them"
        )
    terms, wants = [], []
    for part in parts:
        objective = part.made
        if hasattr(part.made, "bind"):
            objective = _compared(part.name, part.made.bind(student, tuple(teachers)))
        wants += objective.wants
        terms.append(Term(part.name, part.weight, objective))
    return Objective(tuple(terms), tuple(dict.fromkeys(wants)))


def _compared(name, bound) -> methods.Objective:
    """Wraps a bound distillation loss as an `Objective`."""

    def loss(logits, endpoints, batch, params, own):
        del params
        value, _ = bound.loss(logits, endpoints, batch, own.params)
        return value, {name: value}

    return methods.Objective(
        loss, init=lambda key, params: bound.init(key), wants=tuple(bound.wants)
    )


def outputs(net: nn.Module, inputs, *, train: bool = False) -> dict[str, Any]:
    """Shapes of what a network gives, its logits under "logits", for shapes of what it is called with."""

    def run(x):
        key = jax.random.key(0)
        rngs = dict.fromkeys(("params", "dropout", "sample"), key)
        logits, endpoints = net.init_with_output(rngs, x, train=train)[0]
        return {"logits": logits, **endpoints}

    return jax.eval_shape(run, inputs)


def teacher(
    networks: Sequence[forward.Network], wants: Sequence[str], inputs: Callable
):
    """Returns `(variables, batch) → a dict of wanted outputs a teacher`, without a way for gradients.

    Args:
      networks: the teachers, as they are run.
      wants: names of outputs; each teacher gives those that it has.
      inputs: batch → what networks are called with.
    """

    def teach(variables, batch):
        x, told = inputs(batch), []
        for network, own in zip(networks, variables, strict=True):
            (logits, endpoints), _ = forward.run(network, own, x)
            outputs = {"logits": logits, **endpoints}
            told.append({k: outputs[k] for k in wants if k in outputs})
        return jax.lax.stop_gradient(tuple(told))

    return teach
