"""The objective: the losses that a config lists, added up, and the networks that some of them learn from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.train import step as steps


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
      loss: (logits, endpoints, batch) → (scalar, metrics); takes parameters of its own as well where it has any.
      init: key → these; {} for none.
      wants: outputs of teachers that it reads, by name.
    """

    loss: Callable
    init: Callable[[jax.Array], dict[str, Any]] = lambda key: {}
    wants: tuple[str, ...] = ()


class Part(NamedTuple):
    """One loss: its name in records, its share, and what its file makes."""

    name: str
    weight: float
    made: Any


def parts(sections, method: Callable[[Mapping, str], Any]) -> tuple[Part, ...]:
    """The losses that `config.objective` names, one section or several.

    Args:
      sections: {"name": "package.file", "weight": 1.0, **arguments}, or a tuple of these.
      method: makes a section's method, without its weight.

    Raises:
      UserError: a section that is none, or no loss; a weight that is not positive.
    """
    listed = (sections,) if isinstance(sections, Mapping) else tuple(sections)
    if not listed:
        raise UserError("config.objective lists no loss: leave it out, or name one")
    found, names = [], set()
    for number, section in enumerate(listed):
        where = "config.objective" + (f"[{number}]" if len(listed) > 1 else "")
        section = dict(section) if isinstance(section, Mapping) else section
        weight = section.pop("weight", 1.0) if isinstance(section, dict) else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{where}.weight = {weight!r} should be a number")
        if weight <= 0:
            raise UserError(f"{where}.weight = {weight} should be positive")
        made = method(section, where)
        if not callable(made) and not hasattr(made, "bind"):
            raise UserError(
                f"{where}.name = {section['name']!r} makes no loss; it belongs to another key"
            )
        name = section["name"].rpartition(".")[2]
        while name in names:
            name += "_"
        names.add(name)
        found.append(Part(name, float(weight), made))
    return tuple(found)


def needs_teacher(parts: Sequence[Part]) -> bool:
    """Whether a loss compares with teachers."""
    return any(hasattr(part.made, "bind") for part in parts)


def bind(parts: Sequence[Part], student, teachers: Sequence) -> Objective:
    """The sum of losses, of networks whose outputs have these shapes.

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
    bound = [
        part.made.bind(student, tuple(teachers)) if hasattr(part.made, "bind") else None
        for part in parts
    ]
    if len(parts) == 1 and bound[0] is None and parts[0].weight == 1:
        return Objective(parts[0].made)

    def init(key):
        keys = jax.random.split(key, len(parts))
        made = {
            part.name: each.init(k)
            for part, each, k in zip(parts, bound, keys, strict=True)
            if each is not None
        }
        return {name: params for name, params in made.items() if params}

    def loss(logits, endpoints, batch, params=None):
        total, records = 0.0, {}
        for part, each in zip(parts, bound, strict=True):
            if each is None:
                value, record = part.made(logits, endpoints, batch)
                record = {part.name: value} | record
            else:
                own = (params or {}).get(part.name, {})
                value, record = each.loss(logits, endpoints, batch, own)
                record = {part.name: value}
            total = total + part.weight * value
            records |= record
        return total, records

    wants = [name for each in bound if each is not None for name in each.wants]
    return Objective(loss, init, tuple(dict.fromkeys(wants)))


def outputs(net: nn.Module, inputs, *, train: bool = False) -> dict[str, Any]:
    """Shapes of what a network gives, its logits under "logits", for shapes of what it is called with."""

    def run(x):
        key = jax.random.key(0)
        rngs = dict.fromkeys(("params", "dropout", "sample"), key)
        logits, endpoints = net.init_with_output(rngs, x, train=train)[0]
        return {"logits": logits, **endpoints}

    return jax.eval_shape(run, inputs)


def teacher(nets: Sequence[nn.Module], wants: Sequence[str], inputs: Callable, dtype):
    """Returns `(variables, batch) → a dict of wanted outputs a teacher`, without a way for gradients.

    Args:
      nets: the teachers.
      wants: names of outputs; each teacher gives those that it has.
      inputs: batch → what networks are called with.
      dtype: of the computation.
    """

    def teach(variables, batch):
        x, found = inputs(batch), []
        for net, own in zip(nets, variables, strict=True):
            cast = own | {"params": steps.cast(own["params"], dtype)}
            logits, endpoints = net.apply(cast, steps.floats(x, dtype), train=False)
            given = {"logits": logits, **endpoints}
            found.append({k: given[k] for k in wants if k in given})
        return jax.lax.stop_gradient(tuple(found))

    return teach


def size(variables) -> int:
    """Parameters of the teachers."""
    return sum(tree.size(each["params"]) for each in variables)
