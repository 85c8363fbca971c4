"""Makes the methods that a config names and binds them to the network, for the five plug points of a step."""

import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax import methods, registry
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import _objective
from squeeze_jax.train import forward, optim
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import Owner
from squeeze_jax.train.step import Term

# Where methods are found by the first part of their names.
PACKAGES = {
    name: f"squeeze_jax.{name}"
    for name in ("comm", "distill", "nas", "prune", "quantize")
} | {"losses": "squeeze_jax.train.losses"}

OPTIMIZER = "optim"  # stands for the optimizer's chain in `config.update`


class Plugs(NamedTuple):
    """The methods of the plug points.

    Attributes:
      update: the gradient transforms, the optimizer among them.
      forwards: changes of the forward pass by name.
      losses: terms of the objective that are not bound to the networks' outputs yet.
      gradients, exchange: or None.
    """

    update: methods.Update
    forwards: Mapping[str, methods.Forward]
    losses: tuple[_objective.Part, ...] | None
    gradients: Named | None
    exchange: Named | None

    @property
    def names(self) -> set[str]:
        """The names of the methods, under which their parameters and state stand."""
        others = [named.name for named in (self.gradients, self.exchange) if named]
        return {*self.forwards, *others}


def method(section: Mapping, where: str, reserved: Sequence[str] = ()) -> Any:
    """Makes the method that a section names: `{"name": "package.file", **arguments of its make}`.

    The name may also be the path of a Python file, such as "./my_method.py".

    Args:
      section: see above.
      where: how errors call it.
      reserved: keys of the section that are not for `make`.

    Raises:
      UserError: no such file, arguments that its `make` does not take, or a `make` with a reserved parameter.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise UserError(
            f"{where} should be a dict with a name such as 'comm.mean', not {section!r}"
        )
    name = section["name"]
    if registry.is_path(name):
        module = registry.load("squeeze_jax.comm", name, "method")
    else:
        package, _, file = name.partition(".")
        if package not in PACKAGES or not file:
            raise UserError(
                f"{where}.name = {name!r} should be package.file or the path of a Python file{nearest(package, PACKAGES)}"
            )
        module = registry.load(PACKAGES[package], file, f"method of {package}")
    if not hasattr(module, "make"):
        raise UserError(
            f"{where}.name = {name!r} is no method: that file has no function make"
        )
    for key in ("name", *reserved):
        if key in inspect.signature(module.make).parameters:
            raise UserError(
                f"{where}: {section['name']!r} has a parameter {key!r}, but {where}.{key} is a key of its own: rename the"
                " parameter"
            )
    arguments = {k: v for k, v in section.items() if k != "name"}
    registry.check(module.make, arguments, where)
    return module.make(**arguments)


def short_name(section: Mapping, taken: set[str]) -> str:
    """Returns a method's name in records, parameters and state: its file's name, with underscores until it is unique."""
    name = section["name"]
    name = (
        pathlib.Path(name).stem if registry.is_path(name) else name.rpartition(".")[2]
    )
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def make(experiment) -> Plugs:
    """Makes all methods of an experiment.

    Raises:
      UserError: an unknown method, bad arguments, a method of another plug point, or methods that exclude each other.
    """
    e, taken = experiment, set()
    update = optim.chain(_transforms(e))
    forwards = forward_methods(e.forward, taken)
    losses = None
    if e.objective is not None:
        losses = _objective.parts(e.objective, method, taken)
    one = {}
    for plug in "gradients", "exchange":
        section = getattr(e, plug)
        if section is not None:
            where = f"config.{plug}"
            value = getattr(methods, plug)(
                method(section, where), _named(section, where)
            )
            one[plug] = Named(short_name(section, taken), value)
    plugs = Plugs(update, forwards, losses, one.get("gradients"), one.get("exchange"))
    _compatible(e, plugs)
    return plugs


def _transforms(e) -> list[methods.Update]:
    names = [s for s in e.update if not isinstance(s, Mapping)]
    if names != [OPTIMIZER]:
        raise UserError(
            f"config.update = {e.update!r} should list methods and, once, {OPTIMIZER!r}, which stands for config.optim:"
            ' such as ("optim", {"name": "prune.magnitude", ...})'
        )
    transforms = []
    for number, section in enumerate(e.update):
        if section == OPTIMIZER:
            transforms.append(methods.Update(optim.make(steps=e.steps, **e.optim)))
        else:
            where = f"config.update[{number}]"
            value = method(section, where)
            transforms.append(methods.update(value, _named(section, where)))
    return transforms


def forward_methods(sections: Sequence, taken: set[str]) -> dict[str, methods.Forward]:
    """Makes the methods of `config.forward` by name."""
    forwards = {}
    for number, section in enumerate(sections):
        where = f"config.forward[{number}]"
        value = methods.forward(method(section, where), _named(section, where))
        forwards[short_name(section, taken)] = value
    return forwards


def _named(section, where):
    return f"{where}: {section['name']!r}"


def _compatible(e, plugs: Plugs) -> None:
    """Raises a UserError for gradients compiled in pieces where the step has to be one."""
    if plugs.gradients is None or plugs.gradients.method.fused:
        return
    name = e.gradients["name"]
    if plugs.exchange is not None:
        raise UserError(
            f"config.exchange: {name!r} compiles its gradients in pieces, an exchange needs one step: leave it out"
        )
    if e.accumulate > 1:
        raise UserError(
            f"config.accumulate = {e.accumulate}: {name!r} compiles its gradients in pieces and takes whole batches: set"
            " it to 1"
        )


def check_options(gradients: Named | None, model: nn.Module, name: str) -> None:
    """Raises a UserError for gradients that call the network with an argument that it does not take."""
    call = inspect.signature(type(getattr(model, "net", model)).__call__)
    for option in gradients.method.options if gradients else ():
        if option not in call.parameters:
            raise UserError(
                f"config.gradients: {gradients.name} runs the network at several values of {option}, which {name!r} does not"
                " take: choose a network whose call has it"
            )


def bound_taps(
    model: nn.Module, example: Any, forwards: Mapping[str, methods.Forward]
) -> dict[str, tuple]:
    """Returns the taps that each method accepts.

    Raises:
      UserError: a method that intercepts and finds nothing to intercept.
    """
    if not any(f.intercept or f.init or f.state for f in forwards.values()):
        return dict.fromkeys(forwards, ())
    accepted = forward.accepted_taps(model, example, tuple(forwards.values()))
    for (name, value), those in zip(forwards.items(), accepted, strict=True):
        if value.intercept is not None and not those:
            raise UserError(
                f"config.forward: {name} finds no layer to intercept; its rules match no input, kernel or output"
            )
    return dict(zip(forwards, accepted, strict=True))


def owners(
    plugs: Plugs, taps: Mapping[str, tuple], terms: Sequence[Term], devices: int
) -> dict[str, Owner]:
    """Returns what each method owns beside the network, by name."""
    by_name = {
        name: Owner(
            f.init and (lambda key, params, f=f, t=taps[name]: f.init(key, params, t)),
            f.state and (lambda params, f=f, t=taps[name]: f.state(params, t)),
        )
        for name, f in plugs.forwards.items()
    }
    for term in terms:
        by_name[term.name] = Owner(term.objective.init, term.objective.state)
    if plugs.gradients is not None:
        name, value = plugs.gradients
        by_name[name] = Owner(value.init, value.state)
    if plugs.exchange is not None:
        name, value = plugs.exchange
        by_name[name] = Owner(None, value.state, devices)
    return {name: owner for name, owner in by_name.items() if owner.init or owner.state}


def check_state(extra: Mapping[str, Any] | None) -> None:
    """Raises a UserError for a method whose state is not made of dicts and arrays, which checkpoints hold."""
    for path, _ in jax.tree_util.tree_flatten_with_path(extra or {})[0]:
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            raise UserError(
                f"the state of the method {path[0].key} should be made of dicts and arrays alone, not"
                f" {jax.tree_util.keystr(path[1:])}"
            )
