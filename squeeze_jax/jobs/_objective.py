"""Builds the training objective: the weighted sum of the losses that a config lists, and the teachers' outputs they read.

A distillation loss compares the student's outputs with those of teachers. Its method file returns an unbound loss, an
object with a function `bind(student_shapes, teacher_shapes)`, since its parameters depend on the shapes of both networks.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from squeeze_jax import methods, registry
from squeeze_jax.distill._loss import as_objective
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Positive
from squeeze_jax.train import forward
from squeeze_jax.train.step import Term


class TrainingLoss(NamedTuple):
    """The weighted sum of losses that training minimises.

    Each term holds a `methods.Objective`, the value of the plug point `objective`. `bind_losses` wraps distillation losses as
    such objectives.

    Attributes:
      terms: the losses with their names and weights, bound to the networks.
      wants: names of the teachers' outputs that the losses read, each once.
      reads: {loss: what it reads, in words}, see `Loss`.
    """

    terms: tuple[Term, ...]
    wants: tuple[str, ...] = ()
    reads: Mapping[str, str] = {}


class Loss(NamedTuple):
    """One loss of `config.objective`, before it is bound to the shapes of networks.

    Attributes:
      name: its name in metrics, unique in the run.
      weight: its factor in the sum.
      method: a `methods.Objective`, or a distillation loss that is not bound yet: an object with a function `bind`.
      reads: the logits and the arrays of a batch that it reads, in words, see READS in its method file; "" if unknown.
    """

    name: str
    weight: float
    method: Any
    reads: str = ""


def make_losses(
    sections,
    make_method: Callable[[Mapping, str, Sequence[str]], Any],
    taken: set[str] | None = None,
) -> tuple[Loss, ...]:
    """Makes the losses that `config.objective` lists.

    Args:
      sections: {"name": "package.file", "weight": 1.0, **arguments}, or a tuple of these.
      make_method: (section, its name in the config, keys that are not arguments) → the method; see `_plugs.make_method`.
      taken: names of the run's other methods. A loss of the same name gets another name. The names of the losses are added
        to this set.

    Raises:
      UserError: the list is empty, a section names no loss or has wrong arguments, or a weight is not positive.
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
        method = make_method(section, where, ("weight",))
        reads = getattr(inspect.getmodule(method), "READS", "")
        if not hasattr(method, "bind"):
            method = methods.objective(method, f"{where}.name = {section['name']!r}")
        name = section["name"].removesuffix(".py").replace("/", ".").rpartition(".")[2]
        while name in taken:
            name += "_"
        taken.add(name)
        losses.append(Loss(name, float(weight), method, reads))
    return tuple(losses)


def needs_teacher(losses: Sequence[Loss]) -> bool:
    """Returns whether any of the losses compares the student with teachers, or reads their outputs."""
    return any(map(_reads_teacher, losses))


def _reads_teacher(loss: Loss) -> bool:
    return hasattr(loss.method, "bind") or bool(getattr(loss.method, "wants", ()))


def bind_losses(
    losses: Sequence[Loss],
    student_shapes,
    teacher_shapes: Sequence,
    *,
    multi_label: bool = False,
) -> TrainingLoss:
    """Returns the training loss, in which the distillation losses are bound to the outputs of the student and the teachers.

    Binding decides which outputs a loss compares and which parameters it owns, such as projections between two widths.

    Args:
      losses: the result of `make_losses`.
      student_shapes: {"logits": shape, endpoint: shape} of `jax.ShapeDtypeStruct`s with a batch axis, see `output_shapes`.
      teacher_shapes: the same for each teacher.
      multi_label: whether the data give each example any number of classes; see `UnboundLoss.multi_label`.

    Raises:
      UserError: a loss compares outputs that a network does not have or that do not fit, a loss needs teachers and there are
        none, or there are teachers and no loss compares with them.
    """
    if needs_teacher(losses) and not teacher_shapes:
        name = next(loss.name for loss in losses if _reads_teacher(loss))
        raise UserError(
            f"config.objective: {name} compares with a teacher: name one in config.distill.teachers, such as"
            ' ({"workdir": DIR},)'
        )
    if teacher_shapes and not needs_teacher(losses):
        raise UserError(
            "config.distill.teachers has no effect: no loss of config.objective compares with them"
        )
    terms, wants = [], []
    for loss in losses:
        objective = loss.method
        if hasattr(objective, "bind"):
            if multi_label:
                objective = getattr(objective, "multi_label", None) or objective
            bound = objective.bind(student_shapes, tuple(teacher_shapes))
            objective = as_objective(loss.name, bound)
        wants += objective.wants
        terms.append(Term(loss.name, loss.weight, objective))
    reads = {loss.name: loss.reads for loss in losses}
    return TrainingLoss(tuple(terms), tuple(dict.fromkeys(wants)), reads)


def check_fit(
    objective: TrainingLoss,
    call: Callable[[Term], Any],
    logits,
    batch: Mapping[str, Any],
) -> None:
    """Checks by shapes alone that all losses can be computed from a network's outputs and the data's batches.

    Args:
      objective: the losses.
      call: computes a loss, or its shapes, and raises any exception if it cannot.
      logits, batch: shapes of the network's logits and of a batch, for the error message.

    Raises:
      UserError: a loss cannot be computed; the line tells what it reads, and what the network and the data give.
    """
    for term in objective.terms:
        try:
            call(term)
        except Exception as error:  # losses index and compute with whatever they get
            reads = objective.reads.get(term.name)
            reads = f"; it reads {reads}" if reads else ""
            raise UserError(
                f"config.objective: the loss {term.name} does not fit: {registry.describe_error(error)}{reads}; the network"
                f" returns {describe_shapes(logits)}, the data give {describe_shapes(batch)}"
            ) from None


def describe_shapes(arrays: Any) -> str:
    """Returns the dtypes and shapes of arrays in words, such as "label int32 [64], mask bool [64]"."""
    if isinstance(arrays, Mapping):
        return ", ".join(f"{k} {describe_shapes(v)}" for k, v in arrays.items())
    if hasattr(arrays, "dtype"):
        return f"{arrays.dtype} {list(arrays.shape)}"
    return type(arrays).__name__


def output_shapes(net: nn.Module, inputs, *, train: bool = False) -> dict[str, Any]:
    """Returns the shapes and dtypes of a network's outputs, without running it.

    Args:
      net: the module; its call takes `train` and returns (logits, endpoints).
      inputs: shapes of its inputs.
      train: whether it is called in training mode.

    Returns:
      {"logits": shape, endpoint: shape} of `jax.ShapeDtypeStruct`s. Several heads give a dict {head: shape} as "logits".
    """

    def run(x):
        key = jax.random.key(0)
        rngs = dict.fromkeys(("params", "dropout", "sample"), key)
        logits, endpoints = net.init_with_output(rngs, x, train=train)[0]
        return {"logits": logits, **endpoints}

    return jax.eval_shape(run, inputs)


def teacher_function(
    networks: Sequence[forward.Network], wants: Sequence[str], inputs: Callable
):
    """Returns a function that runs the teachers on a batch; no gradient flows through its result.

    Args:
      networks: the teachers.
      wants: names of the outputs to return, "logits" or endpoints; a teacher that lacks one leaves it out.
      inputs: batch → inputs of the networks.

    Returns:
      (a tuple of each teacher's variables, batch) → a tuple with one dict {output name: array [b, ...]} per teacher.
    """

    def teach(variables, batch):
        x, outputs = inputs(batch), []
        for network, own in zip(networks, variables, strict=True):
            (logits, endpoints), _ = forward.run(network, own, x)
            available = {"logits": logits, **endpoints}
            outputs.append({k: available[k] for k in wants if k in available})
        return jax.lax.stop_gradient(tuple(outputs))

    return teach
