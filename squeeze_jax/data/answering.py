"""How the job predict goes on where one of its inputs has no answer: a line for the input, and an error at the end."""

from collections.abc import Callable, Sequence
from typing import Any

from squeeze_jax.errors import UserError


def attempt(fn: Callable, *arguments: Any) -> tuple[Any, str]:
    """Calls a function that reads an input.

    Returns:
      What the function returns and "", or None and the line of the UserError that it raised.
    """
    try:
        return fn(*arguments), ""
    except UserError as error:
        return None, str(error)


def check(reasons: Sequence[str], total: int, noun: str) -> None:
    """Raises a UserError if inputs have no answer, which makes the exit status 1.

    Args:
      reasons: a line for each input without an answer.
      total: how many inputs there are.
      noun: what an input is, such as "image".
    """
    if reasons and total == 1:
        raise UserError(reasons[0])
    if reasons:
        raise UserError(
            f"{len(reasons)} of {total} {noun}s have no answer, the first because of: {reasons[0]}"
        )
