"""Finds how a Linen module is switched between training and evaluation."""

import inspect
import re

import flax.linen as nn

from squeeze_jax.errors import UserError

# {argument of a module's call that switches its mode: its value in training}; the first one that the call has is used.
ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
_LIKE_A_MODE = re.compile(r"(^|_)(train|eval|infer|inference|test|mode|determin)")


def mode_argument(model: nn.Module, train: bool) -> dict[str, bool]:
    """Returns the keyword argument that switches a module between training and evaluation, as {name: value}.

    The name is the first one of `ARGUMENTS` that the module's call has; "deterministic" and "use_running_average" get the
    opposite value. A call with `**kwargs` gets `train`, and `nn.Sequential` what its first layer gets. Returns {} for a
    module without such an argument, which computes the same in both modes.

    Raises:
      UserError: the module's call needs further arguments, names its mode otherwise, or the module has the mode as a field
        with another value; the message says what to write.
    """
    if isinstance(model, nn.Sequential):
        first = model.layers[0] if model.layers else None
        return mode_argument(first, train) if isinstance(first, nn.Module) else {}
    name = type(model).__name__
    _, *parameters = inspect.signature(type(model).__call__).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [
        p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    mode = next((n for n in ARGUMENTS if any(n == p.name for p in named)), None)
    others = [p for p in named[1:] if p.name != mode]
    choices = ", ".join(ARGUMENTS)
    if mode is None and not open_ended:
        for parameter in others:
            if _LIKE_A_MODE.search(parameter.name):
                raise UserError(
                    f"{name}.__call__ takes {parameter.name}, a name by which it cannot be switched between training and"
                    f" evaluation: call it one of {choices}"
                )
    for parameter in others:
        if parameter.default is parameter.empty:
            raise UserError(
                f"{name}.__call__ needs {parameter.name} besides its inputs: let it take all inputs as one argument, such as a"
                f" dict, and of others only the mode, def __call__(self, x, train=False)"
            )
    if mode is not None:
        return {mode: train == ARGUMENTS[mode]}
    if open_ended:
        return {"train": train}
    for field, in_training in ARGUMENTS.items():
        value = getattr(model, field, None)
        if isinstance(value, bool) and value != (train == in_training):
            raise UserError(
                f"{name} has its mode as a field, {field}={value}, which stays as it is in"
                f" {'training' if train else 'evaluation'}: make it an argument, def __call__(self, x, {field})"
            )
    return {}
