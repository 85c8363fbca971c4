"""The one exception for mistakes in the input, and the way its message points at a fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave (config, file, data), not in the code.

    The message is one line that names the culprit and the fix; `run.py` prints it without a traceback.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'? choose from a, b, c` for an unknown `name`, ready to end an error's line."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} choose from {', '.join(choices) or '(nothing)'}"
