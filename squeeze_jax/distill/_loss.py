"""The interface of distillation losses, and functions that they share: pairs of layers, teacher outputs, projections.

Each loss in `distill/` has a function `make(**options) → UnboundLoss`, which checks the options. `UnboundLoss.bind` gets the
shapes of the outputs of both networks, checks that they fit, and returns the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from squeeze_jax import batches, methods
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.ranges import Range

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Layer = Annotated[int, Range(-1000, 1000)] | str
Layers = str | tuple[tuple[Layer, Layer], ...]
# "skip" and "last" are the mappings of patient knowledge distillation (arXiv 1908.09355). They leave out the last layer,
# which learns from the logits.
MAPPINGS = ("uniform", "skip", "last")


class BoundLoss(NamedTuple):
    """A distillation loss for a student and teachers whose output shapes are known.

    Attributes:
      wants: names of the teacher outputs that the loss needs: endpoints, or "logits".
      init: key → params, {name: array}, which are trained with the student; {} if the loss has no parameters.
      loss: (logits, endpoints, batch, params) → (scalar, {"<name of the file>": scalar}). The first two arguments are
        outputs of the student. `batch["teacher"]` is a tuple with a dict of outputs for each teacher; no gradients flow
        into them.
    """

    wants: tuple[str, ...]
    init: Callable
    loss: Callable


class UnboundLoss(NamedTuple):
    """A distillation loss whose options are known, but not the shapes of the networks.

    Attributes:
      from_shapes: the function of `bind`.
      multi_label: the same loss for data whose examples have any number of classes each; None if it does not differ.
    """

    from_shapes: Callable[[Shapes, Shapes | Sequence[Shapes]], BoundLoss]
    multi_label: "UnboundLoss | None" = None

    def bind(self, student: Shapes, teacher: Shapes | Sequence[Shapes]) -> BoundLoss:
        """Returns the loss for networks with outputs of these shapes.

        Args:
          student: the shapes of the student's outputs, {"logits": shape or dict, endpoint: shape}.
          teacher: the same of the teacher; with several teachers a sequence of these.

        Raises:
          UserError: the shapes do not fit, or are not in a dict.
        """
        is_one = isinstance(teacher, Mapping) or not isinstance(teacher, list | tuple)
        for outputs in (student, *((teacher,) if is_one else teacher)):
            if not isinstance(outputs, Mapping):
                raise UserError(
                    f"a distillation loss is bound to a dict of outputs, such as {{'logits': …}}, not to a"
                    f" {type(outputs).__name__}"
                )
        return self.from_shapes(student, teacher)


def as_objective(name: str, bound: BoundLoss) -> methods.Objective:
    """Returns a bound loss as a method of the plug point objective, which reports its value as the metric `name`."""

    def loss(logits, endpoints, batch, params, own):
        del params
        value, _ = bound.loss(logits, endpoints, batch, own.params)
        return value, {name: value}

    return methods.Objective(
        loss, init=lambda key, params: bound.init(key), wants=tuple(bound.wants)
    )


def paired_loss(
    name: str,
    pairs: Sequence[tuple[str, str]],
    compare: Callable,
    *,
    teacher: int,
    init: Callable = lambda key: {},
) -> BoundLoss:
    """Returns the loss that sums a comparison over pairs of endpoints.

    Args:
      name: name of the loss in records.
      pairs: names of endpoints, (student endpoint, teacher endpoint).
      compare: (student array, teacher array, batch, params, pair) → scalar.
      teacher: number of the teacher in `batch["teacher"]`.
      init: key → params of the loss.
    """

    def loss(logits, endpoints, batch, params):
        del logits
        for student_name, _ in pairs:
            endpoint_shape(endpoints, student_name, "student")
        batch = read_batch(batch, name)
        outputs = teacher_outputs(batch, name, wants, (teacher,))[teacher]
        total = sum(
            compare(endpoints[pair[0]], outputs[pair[1]], batch, params, pair)
            for pair in pairs
        )
        return total, {name: total}

    wants = tuple(dict.fromkeys(t for _, t in pairs))
    return BoundLoss(wants, init, loss)


def read_batch(batch: Mapping, name: str) -> Mapping:
    """Returns the batch of a distillation loss; a missing entry is an error that names the loss, see `batches.read`."""
    advice = (
        "put the teachers' outputs there under 'teacher', a tuple with one dict for each teacher"
        if "teacher" not in batch
        else "add it"
    )
    return batches.read(batch, f"distill.{name}", advice)


def teacher_outputs(
    batch: Mapping, name: str, wants: Sequence[str], numbers: Sequence[int] = ()
) -> tuple[Mapping, ...]:
    """Returns the outputs of all teachers, without gradients.

    Args:
      batch: "teacher", a tuple with a dict of outputs for each teacher.
      name: name of the loss, for errors.
      wants: names of the outputs that the loss reads.
      numbers: numbers of the teachers that the loss reads; () for all.

    Raises:
      UserError: the batch has no teacher outputs, or they are no tuple of dicts with these outputs.
    """
    outputs = batch["teacher"]
    if not isinstance(outputs, list | tuple) or not all(
        isinstance(each, Mapping) for each in outputs
    ):
        raise UserError(
            f"distill.{name} reads batch['teacher'], a tuple with one dict of outputs for each teacher, such as"
            f" ({{'logits': …}},): it is a {type(outputs).__name__}"
        )
    for number in numbers or range(len(outputs)):
        for want in wants:
            if want not in (available := select_teacher(outputs, number)):
                raise UserError(
                    f"the teacher has no endpoint {want!r}{nearest(want, available)}"
                )
    return jax.lax.stop_gradient(tuple(outputs))


def select_teacher(teacher: Shapes | Sequence[Shapes], number: int) -> Shapes:
    """Returns the output shapes of the teacher with a given number, counted from 0.

    Args:
      teacher: the shapes of one teacher, or of several.
      number: the number of the teacher.

    Raises:
      UserError: there is no such teacher.
    """
    teachers = (teacher,) if isinstance(teacher, Mapping) else tuple(teacher)
    if not 0 <= number < len(teachers):
        raise UserError(
            f"teacher = {number}: choose from 0 to {len(teachers) - 1}, there are {len(teachers)}"
        )
    return teachers[number]


def endpoint_shape(endpoints: Shapes, name: str, whose: str) -> tuple[int, ...]:
    """Returns the shape of an endpoint.

    Args:
      endpoints: the output shapes of a network.
      name: name of the endpoint.
      whose: "student" or "teacher", for the error.

    Raises:
      UserError: the network has no such endpoint.
    """
    if name not in endpoints:
        raise UserError(
            f"the {whose} has no endpoint {name!r}{nearest(name, endpoints)}"
        )
    return tuple(endpoints[name].shape)


def check_layers(layers: Layers) -> None:
    """Raises a UserError unless `layers` is the name of a mapping or a non-empty list of pairs; see `layer_pairs`."""
    if isinstance(layers, str):
        if layers not in MAPPINGS:
            raise UserError(f"unknown layers {layers!r}{nearest(layers, MAPPINGS)}")
        return
    for pair in layers:
        fits = isinstance(pair, list | tuple) and len(pair) == 2
        if not fits or not all(isinstance(each, int | str) for each in pair):
            raise UserError(
                f"layers: {pair!r} should be a pair (student's layer, teacher's layer) of numbers or endpoints' names"
            )
    if not layers:
        raise UserError("layers = (): give at least one pair, or one of its names")


def layer_pairs(
    layers: Layers,
    student: Shapes,
    teacher: Shapes,
    prefixes: tuple[str, str] = ("layer", "layer"),
) -> tuple[tuple[str, str], ...]:
    """Returns the names of the endpoints that a loss compares, (student endpoint, teacher endpoint).

    With S layers in the student and T in the teacher, the named mappings are:

    - "uniform" pairs layer n of the student with layer n T / S of the teacher;
    - "skip" does the same, but leaves out the student's last layer;
    - "last" pairs the student's layers n < S with the teacher's layers n + T - S.

    "skip" and "last" leave the last layer to a loss of the logits.

    Args:
      layers: the layers to compare: "uniform" pairs layer n of S with the teacher's layer n T / S of T, "skip" does so without
        the last layer, and "last" pairs the layers before the last with the teacher's last ones. Or pairs (student layer,
        teacher layer) of numbers, counted from 1, or from -1 for the last layer backwards, or of names of endpoints.
      student, teacher: output shapes of the networks; the endpoints of layers are called <prefix>1, <prefix>2, ….
      prefixes: prefixes of the student's and the teacher's endpoints: "layer", "scores" or "attention".

    Raises:
      UserError: the mapping does not fit the numbers of layers, or an endpoint does not exist.
    """
    counts = _count_layers(student, prefixes[0]), _count_layers(teacher, prefixes[1])
    if isinstance(layers, str):
        pairs = _mapped_pairs(layers, *counts)
    else:
        pairs = layers

    def names(pair):
        return tuple(map(_endpoint_name, pair, prefixes, counts))

    named = tuple(map(names, pairs))
    for student_name, teacher_name in named:
        endpoint_shape(student, student_name, "student")
        endpoint_shape(teacher, teacher_name, "teacher")
    return named


def _count_layers(endpoints: Shapes, prefix: str) -> int:
    """Returns the largest n for which all endpoints <prefix>1 to <prefix>n exist."""
    count = 0
    while f"{prefix}{count + 1}" in endpoints:
        count += 1
    return count


def _endpoint_name(layer: int | str, prefix: str, count: int) -> str:
    """Returns the endpoint's name of a layer number; returns a name unchanged."""
    if isinstance(layer, str):
        return layer
    return f"{prefix}{count + 1 + layer if layer < 0 else layer}"


def _mapped_pairs(
    layers: str, student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """Returns the pairs of layer numbers of a named mapping; see `layer_pairs`."""
    if not student_layers or not teacher_layers:
        whose = "teacher" if student_layers else "student"
        raise UserError(
            f"layers = {layers!r}: the {whose} has no numbered layers; give pairs of endpoints' names"
        )
    if layers != "last" and teacher_layers % student_layers:
        raise UserError(
            f"layers = {layers!r}: the teacher's {teacher_layers} layers do not divide into the student's {student_layers};"
            f" give pairs such as (({student_layers}, {teacher_layers}),)"
        )
    offset = teacher_layers - student_layers
    if offset < 0:
        raise UserError(
            f"layers = {layers!r}: the student has {student_layers} layers, the teacher only {teacher_layers}; give pairs"
            f" such as (({student_layers}, {teacher_layers}),)"
        )
    if layers != "uniform" and student_layers == 1:
        raise UserError(
            f"layers = {layers!r} leaves out the last layer, and the student has one; choose 'uniform'"
        )
    if layers == "last":
        return [(n, n + offset) for n in range(1, student_layers)]
    end = student_layers + (layers == "uniform")
    return [(n, n * teacher_layers // student_layers) for n in range(1, end)]


def token_widths(
    loss: str, pair: tuple[str, str], student: Shapes, teacher: Shapes
) -> tuple[int, int]:
    """Returns the numbers of features of a pair of endpoints [b, l, features]: the student's and the teacher's.

    Args:
      loss: name of the loss, for the error.
      pair: names of the endpoints, (student endpoint, teacher endpoint).
      student, teacher: output shapes of the networks.

    Raises:
      UserError: the endpoints have other axes, or different numbers of examples or tokens.
    """
    ours = endpoint_shape(student, pair[0], "student")
    theirs = endpoint_shape(teacher, pair[1], "teacher")
    if len(ours) != 3 or ours[:2] != theirs[:2] or len(theirs) != 3:
        raise UserError(
            f"{loss} compares [b, l, features] of the same tokens: the student's {pair[0]} is {ours}, the teacher's"
            f" {pair[1]} {theirs}"
        )
    return ours[2], theirs[2]


def image_channels(
    loss: str, pair: tuple[str, str], student: Shapes, teacher: Shapes
) -> tuple[int, int]:
    """Returns the numbers of channels of a pair of endpoints [b, h, w, channels]: the student's and the teacher's.

    Args:
      loss, pair, student, teacher: see `token_widths`.

    Raises:
      UserError: the endpoints have other axes, or the height and width of one are no multiples of the other's.
    """
    ours = endpoint_shape(student, pair[0], "student")
    theirs = endpoint_shape(teacher, pair[1], "teacher")
    if len(ours) != 4 or len(theirs) != 4:
        raise UserError(
            f"{loss} compares [b, h, w, channels]: the student's {pair[0]} is {ours}, the teacher's {pair[1]} {theirs}"
        )
    small, large = sorted((ours[1:3], theirs[1:3]))
    if any(l % s for l, s in zip(large, small, strict=True)):
        raise UserError(
            f"{loss}: the student's {pair[0]} has {ours[1]} x {ours[2]} positions, the teacher's {pair[1]} {theirs[1]} x"
            f" {theirs[2]}: choose endpoints of equal size, or of a multiple"
        )
    return ours[3], theirs[3]


def unit_vectors(x: jax.Array, axis: int = -1) -> jax.Array:
    """Divides the vectors along an axis by their Euclidean norm; zero vectors stay zero and have a finite gradient."""
    square = jnp.sum(x * x, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def projection_init(
    widths: Mapping[str, tuple[int, int]], initializer: Callable
) -> Callable:
    """Returns a function key → projections, {name: float32 [student width, teacher width]}.

    Args:
      widths: {name: (student width, teacher width)}.
      initializer: a JAX initializer, (key, shape, dtype) → array.
    """

    def init(key):
        keys = jax.random.split(key, max(len(widths), 1))
        return {
            name: initializer(key, shape, jnp.float32)
            for key, (name, shape) in zip(keys, widths.items(), strict=False)
        }

    return init


def project(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Converts x [..., c] to float32, and multiplies it by `weight` [c, d] unless that is None."""
    x = x.astype(jnp.float32)
    return x if weight is None else x @ weight.astype(jnp.float32)


def needs_projection(
    project: bool | None,
    student_width: int,
    teacher_width: int,
    pair: tuple[str, str],
) -> bool:
    """Returns whether a loss projects the student's array: `project`, or if that is None, whether the widths differ.

    Args:
      project: the option of the loss.
      student_width, teacher_width: features or channels of both arrays.
      pair: names of the endpoints, for the error.

    Raises:
      UserError: the widths differ, but `project` is False.
    """
    if project is False and student_width != teacher_width:
        raise UserError(
            f"the student's {pair[0]} has {student_width} features, the teacher's {pair[1]} {teacher_width}: leave out"
            " project=False"
        )
    return student_width != teacher_width if project is None else project


def pool_to_same_size(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Average-pools the larger of two feature maps [b, h, w, c] to the height and width of the smaller; returns both."""
    height, width = (min(a.shape[i], b.shape[i]) for i in (1, 2))

    def pool(x):
        rows, h, w, channels = x.shape
        if (h, w) == (height, width):
            return x
        blocks = x.reshape(rows, height, h // height, width, w // width, channels)
        return blocks.mean((2, 4))

    return pool(a), pool(b)
