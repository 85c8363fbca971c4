"""Makes the methods that a config names, for the five plug points of a training step, and fits them to the network.

A method is a value of `squeeze_jax/methods.py` that changes how a network is trained or run, such as pruning or quantization.
"""

import inspect
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax import methods, models, registry
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.jobs import _objective
from squeeze_jax.train import forward, optim
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import Owner
from squeeze_jax.train.step import Term

# {first part of a method's name: the package with its file}.
PACKAGES = {
    name: f"squeeze_jax.{name}"
    for name in ("comm", "distill", "nas", "prune", "quantize")
} | {"losses": "squeeze_jax.train.losses"}

OPTIMIZER = "optim"  # stands for the optimizer of `config.optim` in `config.update`


class Plugs(NamedTuple):
    """The methods of all plug points of an experiment.

    Attributes:
      update: the chain of gradient transforms, which contains the optimizer.
      forwards: {name: method of `config.forward`}.
      losses: the losses of `config.objective`, not yet bound to the shapes of the networks' outputs; None for the data's
        default loss.
      gradients: the method that computes gradients; None for one forward and backward pass.
      exchange: the method that exchanges gradients between devices; None leaves it to the compiler.
    """

    update: methods.Update
    forwards: Mapping[str, methods.Forward]
    losses: tuple[_objective.Loss, ...] | None
    gradients: Named | None
    exchange: Named | None

    @property
    def names(self) -> set[str]:
        """Returns the names of all methods except the losses; their parameters and state are stored under these names."""
        others = [named.name for named in (self.gradients, self.exchange) if named]
        return {*self.forwards, *others}


def make_method(section: Mapping, where: str, reserved: Sequence[str] = ()) -> Any:
    """Makes the method that a config section names.

    Args:
      section: {"name": "package.file", **arguments of the file's function `make`}; the name may also be the path of a Python
        file, such as "./my_method.py".
      where: the section's name in the config, for error messages.
      reserved: further keys that the section may have, which are no arguments; the caller has removed them.

    Returns:
      What `make` returns.

    Raises:
      UserError: there is no such file, its `make` does not take the arguments, or `make` has a parameter with the name of a
        reserved key.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise UserError(
            f"{where} should be a dict with a name such as 'comm.mean', not {section!r}"
        )
    name = section["name"]
    module = load_file(name, where)
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
    if not registry.is_path(name):
        return module.make(**arguments)
    with registry.blamed(module.__file__):
        return module.make(**arguments)


def load_file(name: str, where: str) -> types.ModuleType:
    """Returns the file of a method by its name in a config; see `make_method` for the arguments and errors."""
    if registry.is_path(name):
        return registry.load("squeeze_jax.comm", name, "method")
    package, _, file = name.partition(".")
    if package not in PACKAGES or not file:
        raise UserError(
            f"{where}.name = {name!r} should be package.file or the path of a Python file{nearest(package, PACKAGES)}"
        )
    return registry.load(PACKAGES[package], file, f"method of {package}")


def unique_name(section: Mapping, taken: set[str]) -> str:
    """Returns a method's name in metrics, parameters and state: the name of its file, with underscores added if it is taken.

    Args:
      section: the method's section of the config.
      taken: names of other methods; the new name is added.
    """
    name = section["name"]
    name = (
        pathlib.Path(name).stem if registry.is_path(name) else name.rpartition(".")[2]
    )
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def make_plugs(experiment) -> Plugs:
    """Makes all methods of an experiment.

    Raises:
      UserError: a method is unknown or belongs to another plug point, its arguments are wrong, or two methods exclude each
        other.
    """
    e, taken = experiment, set()
    update = optim.chain(_make_transforms(e))
    forwards = make_forward_methods(e.forward, taken)
    losses = None
    if e.objective is not None:
        losses = _objective.make_losses(e.objective, make_method, taken)
    named = {}
    for plug_point in "gradients", "exchange":
        section = getattr(e, plug_point)
        if section is not None:
            where = f"config.{plug_point}"
            method = getattr(methods, plug_point)(
                make_method(section, where), _label(section, where)
            )
            named[plug_point] = Named(unique_name(section, taken), method)
    plugs = Plugs(
        update, forwards, losses, named.get("gradients"), named.get("exchange")
    )
    _check_compatible(e, plugs)
    return plugs


def _make_transforms(e) -> list[methods.Update]:
    """Makes the gradient transforms of `config.update` in order, with the optimizer in the place of "optim"."""
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
            method = make_method(section, where)
            transforms.append(methods.update(method, _label(section, where)))
    return transforms


def make_forward_methods(
    sections: Sequence, taken: set[str]
) -> dict[str, methods.Forward]:
    """Makes the methods of `config.forward`; returns {unique name: method} in their order.

    Args:
      sections: the sections of the config.
      taken: names of other methods; the new names are added.
    """
    forwards = {}
    for number, section in enumerate(sections):
        where = f"config.forward[{number}]"
        method = methods.forward(make_method(section, where), _label(section, where))
        forwards[unique_name(section, taken)] = method
    return forwards


def _label(section, where):
    return f"{where}: {section['name']!r}"


def _check_compatible(e, plugs: Plugs) -> None:
    """Raises a UserError if the gradients are compiled in pieces, but another setting needs a step compiled as a whole."""
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


def plain(example: Any) -> methods.Plain:
    """Returns how methods make networks.

    Args:
      example: shapes of the networks' inputs.
    """
    return methods.Plain(
        lambda options: models.make(**options), example, models.elastic
    )


def bind_gradients(plugs: Plugs, options: Mapping[str, Any], example: Any) -> Plugs:
    """Returns the methods with the gradient method bound to the network, if it depends on the network.

    Args:
      plugs: the methods.
      options: options of `models.make`.
      example: shapes of the network's inputs.
    """
    if plugs.gradients is None or plugs.gradients.method.bind is None:
        return plugs
    name, method = plugs.gradients
    return plugs._replace(gradients=Named(name, method.bind(options, plain(example))))


def check_call_options(gradients: Named | None, model: nn.Module, name: str) -> None:
    """Raises a UserError if the gradient method calls the network with a keyword argument that the network does not take.

    Args:
      gradients: the method, or None.
      model: the network.
      name: the network's name, for the error message.
    """
    call = inspect.signature(type(getattr(model, "net", model)).__call__)
    for option in gradients.method.options if gradients else ():
        if option not in call.parameters:
            raise UserError(
                f"config.gradients: {gradients.name} runs the network at several values of {option}, which {name!r} does not"
                " take: choose a network whose call has it"
            )


def accepted_taps(
    model: nn.Module, example: Any, forwards: Mapping[str, methods.Forward]
) -> dict[str, tuple]:
    """Returns {method: the taps that it accepts}; a tap is an array in the network that a method can replace.

    Args:
      model: the network.
      example: shapes of its inputs.
      forwards: {name: method of `config.forward`}.

    Raises:
      UserError: a method that replaces arrays accepts none.
    """
    if not any(f.intercept or f.init or f.state for f in forwards.values()):
        return dict.fromkeys(forwards, ())
    accepted = forward.accepted_taps(model, example, tuple(forwards.values()))
    for (name, method), taps in zip(forwards.items(), accepted, strict=True):
        if method.intercept is not None and not taps:
            raise UserError(
                f"config.forward: {name} finds no layer to intercept; its rules match no input, kernel or output"
            )
    return dict(zip(forwards, accepted, strict=True))


def owners(
    plugs: Plugs, taps: Mapping[str, tuple], terms: Sequence[Term], devices: int
) -> dict[str, Owner]:
    """Returns {method: its `Owner`} for the methods that own parameters or state.

    Args:
      plugs: the methods.
      taps: {method of `config.forward`: its taps}, see `accepted_taps`.
      terms: the losses.
      devices: the number of devices that a batch is divided over; an exchange has state on each.
    """
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
        name, method = plugs.gradients
        by_name[name] = Owner(method.init, method.state)
    if plugs.exchange is not None:
        name, method = plugs.exchange
        by_name[name] = Owner(None, method.state, devices)
    return {name: owner for name, owner in by_name.items() if owner.init or owner.state}


def check_state(extra: Mapping[str, Any] | None) -> None:
    """Raises a UserError if a method's state is not made of nested dicts of arrays, which checkpoints can hold.

    Args:
      extra: {method: its state}.
    """
    for path, _ in jax.tree_util.tree_flatten_with_path(extra or {})[0]:
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            raise UserError(
                f"the state of the method {path[0].key} should be made of dicts and arrays alone, not"
                f" {jax.tree_util.keystr(path[1:])}"
            )
