"""Builds optax optimizers and learning-rate schedules from one config section; rules choose the weight decay."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Literal

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
    Range,
    Rate,
    Share,
)
from squeeze_jax.registry import checked

# Larger values are mistakes: each step of gradient descent enlarges the weights if lr * decay is above 2.
LearningRate = Annotated[float, Range(0, 1e6, open_low=True)]
Decay = Annotated[float, Range(0, 1e3)]
# Keys that only some optimizers or schedules use. `make` rejects them for all others, where they would have no effect.
USED_BY = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "b1": ("adamw", "lamb"),
    "b2": ("adamw", "lamb", "rmsprop"),
    "eps": ("adamw", "lamb", "rmsprop"),
    "end": ("cosine", "linear"),
    "boundaries": ("step",),
    "drop": ("step",),
}
# The default decays kernels and embeddings, but no biases and no parameters of normalisations.
DECAY = (("(kernel|embedding)$", 1.0),)


@checked
def make(
    name: Literal["sgd", "adamw", "lamb", "rmsprop"] = "sgd",
    *,
    steps: Count,
    lr: LearningRate,
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
    decay: Decay = 0.0,
    decay_rules: tuple[tuple[str, Finite], ...] = DECAY,
    clip: NonNegative = 0.0,
    freeze: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Builds an optax chain: gradient clipping → optimizer with weight decay → learning rate.

    Args:
      name: "sgd" adds the weight decay before the momentum, as PyTorch does. "adamw" (arXiv 1711.05101) and "lamb" (arXiv
        1904.00962) add it after rescaling the gradients. "rmsprop" adds it to the gradients, and keeps TensorFlow's
        initial scale of 1.
      steps: number of steps of the run, after which the schedule ends.
      lr: peak learning rate.
      schedule: the schedule after the linear warmup. "step" multiplies the learning rate by `drop` at each of the
        `boundaries`.
      warmup: number of steps of linear warmup from 0; a value below 1 is a fraction of the run.
      end: final learning rate as a fraction of the peak, for "cosine" and "linear".
      boundaries: increasing fractions of the run in (0, 1), for "step".
      drop: factor of the learning rate at each boundary, for "step".
      momentum: decay factor of the accumulated gradients, for "sgd" and "rmsprop".
      nesterov: whether "sgd" uses Nesterov momentum.
      b1: decay rate of the running mean of gradients, for "adamw" and "lamb".
      b2: decay rate of the running mean of squared gradients, for "adamw", "lamb" and "rmsprop" (0.9 for MobileNets).
      eps: added to the denominator, for "adamw", "lamb" and "rmsprop" (1e-3 for MobileNets).
      decay: factor of the weight decay.
      decay_rules: (regular expression, factor) pairs over parameter names. The first match multiplies `decay` by its
        factor; parameters without a match get no weight decay.
      clip: largest global norm of the gradients; 0 for no clipping.
      freeze: regular expressions over parameter names. Parameters that match one keep their values, and take no memory
        in the optimizer.

    Raises:
      UserError: a value is out of range; later, when the chain gets parameters, a regular expression matches none.
    """
    _reject_unused_keys(locals())
    tree.compile_rules(decay_rules, "config.optim.decay_rules")
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
    return freeze_matching(chain, freeze) if freeze else chain


def chain(
    transforms: Sequence[methods.Update | optax.GradientTransformation],
) -> methods.Update:
    """Joins gradient transforms to one, which applies them in order; its state is a tuple of their states.

    Raises:
      UserError: one of them is no gradient transform.
    """
    if isinstance(transforms, methods.Update | optax.GradientTransformation):
        transforms = (transforms,)
    transforms = [methods.update(each, "optim.chain") for each in transforms]

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
    projects = any(transform.project is not None for transform in transforms)
    until = max((transform.until for transform in transforms), default=0)
    return methods.Update(tx, project if projects else None, metrics, until)


def _reject_unused_keys(arguments: dict) -> None:
    """Raises a UserError if an argument of `make` differs from its default, but the optimizer or schedule ignores it."""
    defaults = inspect.signature(make).parameters
    for key, users in USED_BY.items():
        of_schedule = key in ("end", "boundaries", "drop")
        chosen = arguments["schedule" if of_schedule else "name"]
        if arguments[key] != defaults[key].default and chosen not in users:
            raise UserError(
                f"config.optim.{key} = {arguments[key]!r} has no effect on {chosen!r}, only on {', '.join(users)}; leave"
                f" it at {defaults[key].default!r}"
            )
    if arguments["schedule"] == "step" and not arguments["boundaries"]:
        raise UserError(
            "config.optim.boundaries is empty: schedule 'step' needs fractions of the run, such as (0.5, 0.75)"
        )


def schedule_of(section: dict, steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of `make(steps=steps, **section)`: step → learning rate."""
    bound = inspect.signature(make).bind(**section, steps=steps)
    bound.apply_defaults()
    names = inspect.signature(make_schedule).parameters
    return make_schedule(**{k: v for k, v in bound.arguments.items() if k in names})


def make_schedule(
    steps, lr, schedule="cosine", *, warmup=0, end=0.0, boundaries=(), drop=0.1
) -> optax.Schedule:
    """Returns a learning-rate schedule, step → learning rate; the arguments are those of `make`."""
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
    decay_steps = steps - warmup
    after_warmup = registry.row(
        {
            "cosine": lambda: optax.cosine_decay_schedule(lr, decay_steps, alpha=end),
            "linear": lambda: optax.linear_schedule(lr, lr * end, decay_steps),
            "step": lambda: optax.piecewise_constant_schedule(
                lr, {round(b * steps) - warmup: drop for b in boundaries}
            ),
            "constant": lambda: optax.constant_schedule(lr),
        },
        schedule,
        "schedule",
    )()
    if not warmup:
        return after_warmup
    return optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), after_warmup], [warmup]
    )


def freeze_matching(tx: optax.GradientTransformation, patterns: Sequence[str]):
    """Returns a transform that applies `tx` to all parameters, except those whose names match a pattern.

    Args:
      tx: the optax transform of the other parameters.
      patterns: regular expressions over parameter names; parameters that match one keep their values.

    Raises:
      UserError: when the transform gets parameters, all of them match, or a pattern matches none.
    """

    def label(params):
        rules = [(pattern, "frozen") for pattern in patterns]
        labels = tree.apply_rules(
            rules, params, default="free", where="config.optim.freeze"
        )
        if "free" not in jax.tree.leaves(labels):
            raise UserError(
                f"config.optim.freeze = {tuple(patterns)} finds every parameter: nothing is left to train"
            )
        return labels

    return optax.partition({"free": tx, "frozen": optax.set_to_zero()}, label)


def decayed_weights(decay: float, rules) -> optax.GradientTransformation:
    """Returns a transform that adds `decay * factor * weight` to each update.

    Args:
      decay: the weight decay; 0 returns the identity.
      rules: (regular expression, factor) pairs over parameter names; the first match decides, no match means 0.
    """
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
