"""What losses of distillation are, which layers they compare, and means over what counts.

A file of `distill/` that is a loss has `make(**options) → Unbound`, which checks the options; `bind` gets the shapes of both
networks' outputs, checks that they fit, and gives the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError, nearest
from squeeze_jax.ranges import Range

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Layer = Annotated[int, Range(-1000, 1000)] | str
Layers = str | tuple[tuple[Layer, Layer], ...]
# Patient knowledge distillation's (arXiv 1908.09355) are the last two, which leave the last layer to the logits.
MAPPINGS = ("uniform", "skip", "last")
# Names of the padding mask in a batch: ours, and the name in `transformers`.
_PADDING = ("attended", "attention_mask")


class Bound(NamedTuple):
    """A loss of two networks whose shapes are known.

    Attributes:
      wants: endpoints that it reads of a teacher, "logits" among them.
      init: key → params, {name: array}; {} where the loss learns nothing. They are trained with the student.
      loss: (logits, endpoints, batch, params) → (scalar, {"<file's name>": scalar}). `batch["teacher"]` is a tuple of
        dicts, one a teacher, of what they gave; no gradient reaches them.
    """

    wants: tuple[str, ...]
    init: Callable
    loss: Callable


class Unbound(NamedTuple):
    """A loss whose options are known.

    Attributes:
      bind: (student, teacher) → Bound, both {"logits": shapes, endpoint: shape}; teacher may be a tuple of these. Raises
        UserError where the two do not fit.
    """

    bind: Callable[[Shapes, Shapes | Sequence[Shapes]], Bound]


def paired(
    name: str,
    pairs: Sequence[tuple[str, str]],
    compare: Callable,
    *,
    teacher: int,
    init: Callable = lambda key: {},
) -> Bound:
    """The loss that is the sum of `compare(student's endpoint, teacher's endpoint, batch, params, pair)` over pairs."""

    def loss(logits, endpoints, batch, params):
        del logits
        given = jax.lax.stop_gradient(batch["teacher"][teacher])
        total = sum(
            compare(endpoints[pair[0]], given[pair[1]], batch, params, pair)
            for pair in pairs
        )
        return total, {name: total}

    return Bound(tuple(dict.fromkeys(t for _, t in pairs)), init, loss)


def one(teacher: Shapes | Sequence[Shapes], number: int) -> Shapes:
    """The shapes of one of the teachers.

    Raises:
      UserError: there are not so many.
    """
    teachers = (teacher,) if isinstance(teacher, Mapping) else tuple(teacher)
    if not 0 <= number < len(teachers):
        raise UserError(
            f"teacher = {number}: choose from 0 to {len(teachers) - 1}, there are {len(teachers)}"
        )
    return teachers[number]


def shape(endpoints: Shapes, name: str, whose: str) -> tuple[int, ...]:
    """The shape of an endpoint.

    Raises:
      UserError: there is none of that name.
    """
    if name not in endpoints:
        raise UserError(
            f"the {whose} has no endpoint {name!r}{nearest(name, endpoints)}"
        )
    return tuple(endpoints[name].shape)


def check_layers(layers: Layers) -> None:
    """Checks that `layers` is a mapping's name or pairs.

    Raises:
      UserError: it is neither.
    """
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
    """Endpoints to be compared, (student's, teacher's).

    Args:
      layers: of S student's and T teacher's layers, "uniform" pairs n with n T / S; "skip" does too but for the last
        layer, and "last" pairs n < S with n + T - S, so that the logits are left to teach the last; otherwise pairs of
        numbers from 1, or from -1 for the last backwards, or of endpoints' names.
      student, teacher: their endpoints; those of layers are called <prefix>1, <prefix>2, ….
      prefixes: of the student's and of the teacher's endpoints, "layer", "scores" or "attention".

    Raises:
      UserError: numbers of layers that a mapping does not fit; an endpoint that is not there.
    """
    counts = _count(student, prefixes[0]), _count(teacher, prefixes[1])
    if isinstance(layers, str):
        pairs = _mapping(layers, *counts)
    else:
        pairs = layers

    def names(pair):
        return tuple(map(_name, pair, prefixes, counts))

    named = tuple(map(names, pairs))
    for ours, theirs in named:
        shape(student, ours, "student")
        shape(teacher, theirs, "teacher")
    return named


def _count(endpoints: Shapes, prefix: str) -> int:
    count = 0
    while f"{prefix}{count + 1}" in endpoints:
        count += 1
    return count


def _name(layer: int | str, prefix: str, count: int) -> str:
    if isinstance(layer, str):
        return layer
    return f"{prefix}{count + 1 + layer if layer < 0 else layer}"


def _mapping(layers: str, students: int, teachers: int) -> list[tuple[int, int]]:
    if not students or not teachers:
        whose = "teacher" if students else "student"
        raise UserError(
            f"layers = {layers!r}: the {whose} has no numbered layers; give pairs of endpoints' names"
        )
    if layers != "last" and teachers % students:
        raise UserError(
            f"layers = {layers!r}: the teacher's {teachers} layers do not divide into the student's {students};"
            f" give pairs such as (({students}, {teachers}),)"
        )
    ahead = teachers - students
    if ahead < 0:
        raise UserError(
            f"layers = {layers!r}: the student has {students} layers, the teacher only {teachers}; give pairs such as"
            f" (({students}, {teachers}),)"
        )
    if layers != "uniform" and students == 1:
        raise UserError(
            f"layers = {layers!r} leaves out the last layer, and the student has one; choose 'uniform'"
        )
    if layers == "last":
        return [(n, n + ahead) for n in range(1, students)]
    last = students + (layers == "uniform")
    return [(n, n * teachers // students) for n in range(1, last)]


def token_widths(
    loss: str, pair: tuple[str, str], student: Shapes, teacher: Shapes
) -> tuple[int, int]:
    """The features of a pair of endpoints [b, l, features].

    Raises:
      UserError: they are of other axes.
    """
    ours = shape(student, pair[0], "student")
    theirs = shape(teacher, pair[1], "teacher")
    if len(ours) != 3 or ours[:2] != theirs[:2] or len(theirs) != 3:
        raise UserError(
            f"{loss} compares [b, l, features] of the same tokens: the student's {pair[0]} is {ours}, the teacher's"
            f" {pair[1]} {theirs}"
        )
    return ours[2], theirs[2]


def image_sizes(
    loss: str, pair: tuple[str, str], student: Shapes, teacher: Shapes
) -> tuple[int, int]:
    """The channels of a pair of endpoints [b, h, w, channels].

    Raises:
      UserError: they are of other axes, or of sizes that are no multiple of each other.
    """
    ours = shape(student, pair[0], "student")
    theirs = shape(teacher, pair[1], "teacher")
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


def example_weights(batch: Mapping, rows: int) -> jax.Array:
    """float32 [rows]: 1 for a row of an example that counts; an example has rows / b of them, choices say."""
    mask = batch["mask"].astype(jnp.float32)
    if mask.ndim != 1:
        raise UserError(
            f"batch['mask'] should be [b], true for examples that count, its shape is {mask.shape}: the padding mask is"
            " 'attended' (or 'attention_mask'), [b, l]"
        )
    return jnp.repeat(mask, rows // mask.shape[0])


def token_weights(batch: Mapping, rows: int, length: int) -> jax.Array:
    """float32 [rows, length]: 1 for real tokens of examples that count."""
    weights = example_weights(batch, rows)[:, None]
    real = attended(batch)
    if real is None:
        return jnp.repeat(weights, length, 1)
    if real.size != rows * length:
        raise UserError(
            f"the batch's padding mask is {tuple(real.shape)}, the network's outputs are of {rows} sequences of {length}"
            " tokens: both should be equal"
        )
    return weights * real.reshape(rows, length).astype(jnp.float32)


def attended(batch: Mapping) -> jax.Array | None:
    """Returns a batch's padding mask, bool [b, l] with True for real tokens; None if all are real.

    Args:
      batch: has it as "attended", or as "attention_mask", its name in `transformers`.

    Raises:
      UserError: both, or neither and an entry that looks like a padding mask under another name.
    """
    masks = [key for key in _PADDING if key in batch]
    if len(masks) > 1:
        raise UserError(f"the batch has its padding mask twice, as {masks}: give one")
    if masks:
        return jnp.asarray(batch[masks[0]]) != 0
    for key in batch:
        if key != "mask" and ("mask" in key.split("_") or key.startswith("attend")):
            raise UserError(
                f"the batch has {key!r}: a padding mask, true for real tokens, is called {' or '.join(map(repr, _PADDING))}"
            )
    return None


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """x / ||x||; the gradient at 0 is finite."""
    square = jnp.sum(x * x, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def projections(
    widths: Mapping[str, tuple[int, int]], initializer: Callable
) -> Callable:
    """key → {name: float32 [student's width, teacher's width]}."""

    def init(key):
        keys = jax.random.split(key, max(len(widths), 1))
        return {
            name: initializer(key, wide, jnp.float32)
            for key, (name, wide) in zip(keys, widths.items(), strict=False)
        }

    return init


def project(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x [..., c] in float32, times weight [c, d] where there is one."""
    x = x.astype(jnp.float32)
    return x if weight is None else x @ weight.astype(jnp.float32)


def needs_projection(
    project: bool | None, ours: int, theirs: int, pair: tuple[str, str]
) -> bool:
    """Whether the student's state is projected: as `project` says, or for None where the widths differ.

    Raises:
      UserError: widths differ, and `project` is False.
    """
    if project is False and ours != theirs:
        raise UserError(
            f"the student's {pair[0]} has {ours} features, the teacher's {pair[1]} {theirs}: leave out project=False"
        )
    return ours != theirs if project is None else project


def same_size(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two maps [b, h, w, c], the larger averaged down to the smaller."""
    height, width = (min(a.shape[i], b.shape[i]) for i in (1, 2))

    def down(x):
        rows, h, w, channels = x.shape
        if (h, w) == (height, width):
            return x
        parts = x.reshape(rows, height, h // height, width, w // width, channels)
        return parts.mean((2, 4))

    return down(a), down(b)
