"""Exceptions whose one line is for the user, the way that line points at a fix, and how any name in it is printed."""

import difflib
import re
import sys
from collections.abc import Iterable


class Reported(Exception):
    """Ends `run.py` with its message, one line, in place of a traceback.

    Attributes:
      status: the program's exit status.
    """

    status = 1


class UserError(Reported, ValueError):
    """A mistake in what the user gave (config, file, data), not in the code; names the culprit and the fix.

    The message is one line: line breaks are written as \\n, and what is too long to read is shortened in its middle.
    """

    def __init__(self, message: object = ""):
        text = str(message).encode(errors="backslashreplace").decode()
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        text = re.sub(r"\S{400,}", lambda match: shortened(match[0], 120), text)
        super().__init__(shortened(text, 1500))


def shortened(text: str, longest: int) -> str:
    """Returns a text, without its middle if it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    first = longest * 2 // 3
    return f"{text[:first]} … {text[first - longest :]}"


def message_of(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its type if it has no message."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # its type is the user's own
        lines = []
    return lines[0] if lines else type(error).__name__


def shown(value: object, longest: int = 100) -> str:
    """Returns how an error shows a value from the user: as Python writes it, shortened."""
    try:
        return shortened(repr(value), longest)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"<{type(value).__name__}>"


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'? choose from a, b, c` for an unknown `name`, ready to end an error's line."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} choose from {', '.join(choices) or '(nothing)'}"


def print_any_name() -> None:
    r"""Lets a program print names that its terminal's encoding lacks, and names that are no UTF-8, as escapes (\udce9)."""
    for stream in (sys.stdout, sys.stderr):
        handler = getattr(stream, "errors", None)
        # In UTF-8, "surrogateescape" prints the bytes of any name; in other encodings it fails for most letters.
        utf8 = (getattr(stream, "encoding", None) or "").lower() == "utf-8"
        if handler == "strict" or (handler == "surrogateescape" and not utf8):
            stream.reconfigure(errors="backslashreplace")
