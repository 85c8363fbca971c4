"""Optimizers and schedules from one config section, all of optax; weight decay by rules."""

import inspect
from collections.abc import Sequence
from typing import Literal

import jax
import optax

from squeeze_jax import methods, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import (
    Count,
    Finite,
    Fraction,
    NonNegative,
    Part,
    Positive,
    Rate,
    Share,
)

# Keys that only some optimizers or schedules read: set for another, they would be dead.
READ_BY = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "b1": ("adamw", "lamb"),
    "b2": ("adamw", "lamb", "rmsprop"),
    "eps": ("adamw", "lamb", "rmsprop"),
    "end": ("cosine", "linear"),
    "boundaries": ("step",),
    "drop": ("step",),
}
DECAY = (("(kernel|embedding)$", 1.0),)  # none on normalisations and biases


def make(
    name: Literal["sgd", "adamw", "lamb", "rmsprop"] = "sgd",
    *,
    steps: Count,
    lr: Positive,
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine",
    warmup: NonNegative = 0,
    end: Share = 0.0,
    boundaries: tuple[Fraction, ...] = (),
    drop: Part = 0.1,
    momentum: Rate = 0.9,
    nesterov: bool = False,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: Positive = 1e-8,
    decay: NonNegative = 0.0,
    decay_rules: tuple[tuple[str, Finite], ...] = DECAY,
    clip: NonNegative = 0.0,
    freeze: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Builds the chain: clip → rule and decay of the optimizer → learning rate.

    Args:
      name: "sgd" decays before the momentum as PyTorch does; "adamw" (arXiv 1711.05101) and "lamb" (arXiv 1904.00962)
        decay after the rescaling; "rmsprop" keeps TensorFlow's initial scale of 1 and decays before.
      steps: length of the run, which the schedule ends with.
      lr: peak learning rate.
      schedule: what follows the linear warmup; "step" multiplies by `drop` at each fraction of the run in `boundaries`.
      warmup: steps of linear warmup from 0; below 1, the share of the run.
      end: final learning rate as a fraction of the peak, for "cosine" and "linear".
      boundaries: increasing fractions of the run, in (0, 1).
      drop: factor at each boundary.
      momentum: of "sgd" and "rmsprop".
      nesterov: for "sgd".
      b1, b2, eps: of "adamw" and "lamb"; `b2` and `eps` of "rmsprop" too (0.9 and 1e-3 for MobileNets).
      decay: weight decay.
      decay_rules: `(regex, factor)` over parameter names, first match wins, no match means none.
      clip: largest global norm of the gradients; 0 for no clipping.
      freeze: regular expressions over parameter names; what one of them finds keeps its values, and takes no memory in
        the optimizer.

    Raises:
      UserError: values out of range; when it is given parameters, a regular expression that finds none.
    """
    _no_dead_keys(locals())
    rate = make_schedule(
        steps, lr, schedule, warmup=warmup, end=end, boundaries=boundaries, drop=drop
    )
    for key, value in (("decay", decay), ("clip", clip)):
        if value < 0:
            raise UserError(f"config.optim.{key} = {value} should not be negative")
    weight_decay = decayed_weights(decay, decay_rules)
    parts = registry.row(
        {
            "sgd": (weight_decay, optax.trace(momentum, nesterov=nesterov)),
            "adamw": (optax.scale_by_adam(b1, b2, eps), weight_decay),
            "lamb": (
                optax.scale_by_adam(b1, b2, eps),
                weight_decay,
                optax.scale_by_trust_ratio(),
            ),
            "rmsprop": (
                weight_decay,
                optax.scale_by_rms(b2, eps, initial_scale=1.0, eps_in_sqrt=True),
                optax.trace(momentum),
            ),
        },
        name,
        "optimizer",
    )
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    chain = optax.chain(*clipping, *parts, optax.scale_by_learning_rate(rate))
    return frozen(chain, freeze) if freeze else chain


def chain(transforms: Sequence[methods.Update]) -> methods.Update:
    """Joins gradient transforms, in order, to one; its state is a tuple of theirs."""

    def project(params, states):
        for transform, state in zip(transforms, states, strict=True):
            if transform.project is not None:
                params = transform.project(params, state)
        return params

    def metrics(params, states):
        values = {}
        for transform, state in zip(transforms, states, strict=True):
            if transform.metrics is not None:
                values |= transform.metrics(params, state)
        return values

    tx = optax.chain(*(transform.tx for transform in transforms))
    changes = any(transform.project is not None for transform in transforms)
    until = max((transform.until for transform in transforms), default=0)
    return methods.Update(tx, project if changes else None, metrics, until)


def _no_dead_keys(given: dict) -> None:
    """Raises a UserError for a key set away from its default that the optimizer or schedule does not read."""
    defaults = inspect.signature(make).parameters
    for key, readers in READ_BY.items():
        chosen = given["schedule" if key in ("end", "boundaries", "drop") else "name"]
        if given[key] != defaults[key].default and chosen not in readers:
            raise UserError(
                f"config.optim.{key} = {given[key]!r} has no effect on {chosen!r}, only on {', '.join(readers)}; leave"
                f" it at {defaults[key].default!r}"
            )
    if given["schedule"] == "step" and not given["boundaries"]:
        raise UserError(
            "config.optim.boundaries is empty: schedule 'step' needs fractions of the run, such as (0.5, 0.75)"
        )


def schedule_of(section: dict, steps: int) -> optax.Schedule:
    """The learning rate that `make(steps=steps, **section)` follows."""
    bound = inspect.signature(make).bind(**section, steps=steps)
    bound.apply_defaults()
    wanted = inspect.signature(make_schedule).parameters
    return make_schedule(**{k: v for k, v in bound.arguments.items() if k in wanted})


def make_schedule(
    steps, lr, schedule="cosine", *, warmup=0, end=0.0, boundaries=(), drop=0.1
) -> optax.Schedule:
    """Returns `step → learning rate`; arguments as in `make`."""
    if lr <= 0:
        raise UserError(f"config.optim.lr = {lr} should be positive")
    if not 0 <= warmup < steps:
        raise UserError(
            f"config.optim.warmup = {warmup} should lie in [0, {steps}), the length of the run, or be a share below 1"
        )
    if warmup >= 1 and warmup != int(warmup):
        raise UserError(
            f"config.optim.warmup = {warmup} should be a whole number of steps, or a share below 1"
        )
    warmup = int(warmup) if warmup >= 1 else round(warmup * steps)
    if sorted(set(boundaries)) != list(boundaries) or not all(
        0 < b < 1 for b in boundaries
    ):
        raise UserError(
            f"config.optim.boundaries = {tuple(boundaries)} should increase within (0, 1)"
        )
    rest = steps - warmup
    after = registry.row(
        {
            "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=end),
            "linear": lambda: optax.linear_schedule(lr, lr * end, rest),
            "step": lambda: optax.piecewise_constant_schedule(
                lr, {round(b * steps) - warmup: drop for b in boundaries}
            ),
            "constant": lambda: optax.constant_schedule(lr),
        },
        schedule,
        "schedule",
    )()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), after], [warmup]
    )


def frozen(tx: optax.GradientTransformation, names: Sequence[str]):
    """`tx` for the parameters that none of the regular expressions `names` finds; the others do not change."""

    def labels(params):
        rules = [(name, "frozen") for name in names]
        found = tree.apply_rules(
            rules, params, default="free", where="config.optim.freeze"
        )
        if "free" not in jax.tree.leaves(found):
            raise UserError(
                f"config.optim.freeze = {tuple(names)} finds every parameter: nothing is left to train"
            )
        return found

    return optax.partition({"free": tx, "frozen": optax.set_to_zero()}, labels)


def decayed_weights(decay: float, rules) -> optax.GradientTransformation:
    """Adds `decay * factor * weight` to each update, the factor from `rules`."""
    if not decay:
        return optax.identity()

    def update(updates, state, params=None):
        factors = tree.apply_rules(
            rules, params, default=0.0, where="config.optim.decay_rules"
        )
        return jax.tree.map(
            lambda u, w, f: u + decay * f * w, updates, params, factors
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
