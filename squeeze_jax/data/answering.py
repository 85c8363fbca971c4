"""Lets the job predict continue if an input has no answer: it prints a line for the input, and raises an error at the end."""

from collections.abc import Callable, Sequence
from typing import Any

from squeeze_jax.errors import UserError


def attempt(fn: Callable, *arguments: Any) -> tuple[Any, str]:
    """Calls a function and catches a UserError.

    Returns:
      (the function's result, ""), or (None, the message of the UserError).
    """
    try:
        return fn(*arguments), ""
    except UserError as error:
        return None, str(error)


def check(reasons: Sequence[str], total: int, noun: str) -> None:
    """Raises a UserError if any input has no answer; the program's exit status is then 1.

    Args:
      reasons: a line for each input without an answer.
      total: the number of inputs.
      noun: the word for an input, such as "image".
    """
    if reasons and total == 1:
        raise UserError(reasons[0])
    if reasons:
        raise UserError(
            f"{len(reasons)} of {total} {noun}s have no answer, the first because of: {reasons[0]}"
        )
